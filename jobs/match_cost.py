"""What batched zero-shot matching costs, before it starts: operations, bytes read, hours on the cluster at hand.

Two products of D numbers for each pair of patches; the time follows from a rate measured on a worker with the same
kernel and width, and from reading every reference once for each round of a query shard.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np

from jobs.config import MatchConfig

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


def lowest_of_a_block(count: int, blocks: float) -> int:
    """How many of the n lowest a block brings on average, where they come in random order: the b-th brings n / b.

    Args:
        count: n.
        blocks: how many there are.
    """
    whole = max(1, round(blocks))
    return max(1, round(count * sum(1.0 / number for number in range(1, whole + 1)) / whole))


class RateProbe:
    """Measures a worker: ``run`` gives FLOP/s of the matching kernel and bytes/s of reading embeddings.

    The first block of a set costs more than later ones, as all of its n lowest are new: the probe, which has one block,
    keeps as many as a block brings on average.

    Args:
        config: of matching.
        count: n, lowest distances kept.
        references: patches that will be compared with each query.
        device: ``"cpu"`` or ``"cuda"``.
    """

    work = "measuring the matching rate"

    def __init__(self, config: MatchConfig, count: int, references: int, device: str) -> None:
        self.config, self.count, self.references, self.device = config, count, references, device

    def run(self, embeddings: Any) -> tuple[float, float]:
        """Measure on an ``EmbeddingSet``: its first images against each other, as matching will compare them."""
        started = time.perf_counter()
        block = next(embeddings.blocks())
        bytes_per_second = sum(image.features.nbytes for image in block) / (time.perf_counter() - started)
        return self._flop_per_second([image.features for image in block]), bytes_per_second

    def _flop_per_second(self, images: list[Any]) -> float:
        import torch

        from anomalydino_plugin import RunningLowest, search_rows

        lengths = [len(image) for image in images]
        rows = torch.nn.functional.normalize(torch.tensor(np.concatenate(images), device=self.device), dim=1)
        laid_out = search_rows(rows, lengths, self.config.kernel)
        queries = rows[: lengths[0]][:_PROBE_QUERIES]
        count = lowest_of_a_block(self.count, self.references / len(rows))
        times: list[float] = []
        while len(times) < 2 or sum(times) < _PROBE_SECONDS:  # the first one warms up
            lowest = RunningLowest(queries, count, self.config.mode)
            started = time.perf_counter()
            lowest.update(laid_out, lengths, 0)
            if self.device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return 2.0 * rows.shape[1] * len(queries) * len(rows) * (len(times) - 1) / sum(times[1:])
