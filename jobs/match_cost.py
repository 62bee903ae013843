"""What batched zero-shot matching costs, before it starts: operations, bytes read, hours on the cluster at hand.

Two products of D numbers for each pair of patches; the time follows from a rate measured on a worker with the same
kernel, count and width, and from reading every reference once for each round of a query shard.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

_PROBE_QUERIES, _PROBE_SECONDS = 1024, 1.0


class CategoryCost(NamedTuple):
    """One category.

    Attributes:
        queries: query patches.
        references: reference patches.
        passes: times that all references are read.
        bytes_read: over all passes.
    """

    queries: int
    references: int
    passes: int
    bytes_read: int


class Estimate(NamedTuple):
    """What matching will take.

    Attributes:
        flop: floating-point operations of the similarities.
        bytes_read: from the store.
        flop_per_second: of one worker, measured, reduction included.
        bytes_per_second: of one worker, measured on one row group of the embeddings.
        seconds: wall time on all workers.
    """

    flop: float
    bytes_read: int
    flop_per_second: float
    bytes_per_second: float
    seconds: float

    def __str__(self) -> str:
        hours = f"{self.seconds / 3600:.1f} h" if self.seconds > 5400 else f"{self.seconds:.0f} s"
        return (
            f"{self.flop / 1e12:.3g} TFLOP, {self.bytes_read / 1e9:.3g} GB to read; about {hours} at "
            f"{self.flop_per_second / 1e9:.0f} GFLOP/s and {self.bytes_per_second / 1e6:.0f} MB/s a worker"
        )


def estimate(
    costs: list[CategoryCost], width: int, flop_per_second: float, bytes_per_second: float, workers: int
) -> Estimate:
    """Time from counts and measured rates.

    Args:
        costs: of each category.
        width: D.
        flop_per_second: of one worker.
        bytes_per_second: of one worker.
        workers: how many work at a time.
    """
    flop = 2.0 * width * sum(cost.queries * cost.references for cost in costs)
    bytes_read = sum(cost.bytes_read for cost in costs)
    seconds = (flop / flop_per_second + bytes_read / bytes_per_second) / workers
    return Estimate(flop, bytes_read, flop_per_second, bytes_per_second, seconds)


class RateProbe:
    """Measures a worker: ``run`` gives FLOP/s of the matching kernel and bytes/s of reading embeddings.

    Args:
        count: n, lowest distances kept.
        mode: of matching.
        block_rows: reference patches compared at a time.
        device: ``"cpu"`` or ``"cuda"``.
    """

    def __init__(self, count: int, mode: str, block_rows: int, device: str) -> None:
        self.count, self.mode, self.block_rows, self.device = count, mode, block_rows, device

    def run(self, embeddings: Any) -> tuple[float, float]:
        """Measure on an ``EmbeddingSet``."""
        import torch

        from anomalydino_plugin import RunningLowest

        started = time.perf_counter()
        block = next(embeddings.blocks())
        read = sum(image.features.nbytes for image in block)
        bytes_per_second = read / (time.perf_counter() - started)
        rows = torch.nn.functional.normalize(torch.tensor(block[0].features, device=self.device), dim=1)
        references = torch.cat([rows] * (self.block_rows // len(rows) + 1))[: self.block_rows]
        lowest = RunningLowest(rows[:_PROBE_QUERIES], self.count, self.mode)  # type: ignore[arg-type]
        images = [len(references) // 8] * 7
        images.append(len(references) - sum(images))
        lowest.update(references, images, 0)  # warms up
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < _PROBE_SECONDS:
            lowest.update(references, images, 0)
            if self.device != "cpu":
                torch.cuda.synchronize()
            done += 1
        flop = 2.0 * rows.shape[1] * len(rows[:_PROBE_QUERIES]) * len(references) * done
        return flop / (time.perf_counter() - started), bytes_per_second
