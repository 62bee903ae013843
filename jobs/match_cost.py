"""What batched zero-shot matching costs, before it starts: operations, bytes read, hours on the cluster at hand.

Two operations for each of D numbers of each pair of patches, every query read once and every reference once for each
round of a query shard, each query patch scored and written: the time follows from what a worker does of each in a
second.
"""

from __future__ import annotations

from typing import NamedTuple


class CategoryCost(NamedTuple):
    """One category.

    Attributes:
        queries: query patches.
        references: reference patches.
        passes: times that all references are read.
        bytes_read: over all passes, and the queries once.
    """

    queries: int
    references: int
    passes: int
    bytes_read: int


class Rates(NamedTuple):
    """What one worker does in a second, as ``match_rates`` measures it.

    Attributes:
        flop_per_second: of similarities, reduction included.
        bytes_per_second: of features read from the store, normalised, and laid out for the kernel.
        patches_per_second: scored and written.
    """

    flop_per_second: float
    bytes_per_second: float
    patches_per_second: float


class Estimate(NamedTuple):
    """What matching will take.

    Attributes:
        flop: floating-point operations of the similarities.
        bytes_read: from the store.
        patches: to score and write.
        rates: of one worker.
        seconds: wall time on all workers.
    """

    flop: float
    bytes_read: int
    patches: int
    rates: Rates
    seconds: float

    def __str__(self) -> str:
        hours = f"{self.seconds / 3600:.1f} h" if self.seconds > 5400 else f"{self.seconds:.0f} s"
        return (
            f"{self.flop / 1e12:.3g} TFLOP, {self.bytes_read / 1e9:.3g} GB to read, {self.patches} patches to write; "
            f"about {hours} at {self.rates.flop_per_second / 1e9:.0f} GFLOP/s, "
            f"{self.rates.bytes_per_second / 1e6:.0f} MB/s and {self.rates.patches_per_second:.0f} patches/s a worker"
        )

    def as_json(self) -> dict[str, float]:
        """All figures side by side, for ``job.json``."""
        return {**{k: v for k, v in self._asdict().items() if k != "rates"}, **self.rates._asdict()}


def estimate(costs: list[CategoryCost], width: int, rates: Rates, workers: int) -> Estimate:
    """Time from counts and measured rates.

    Args:
        costs: of each category.
        width: D.
        rates: of one worker.
        workers: how many work at a time.
    """
    flop = 2.0 * width * sum(cost.queries * cost.references for cost in costs)
    bytes_read = sum(cost.bytes_read for cost in costs)
    patches = sum(cost.queries for cost in costs)
    work = zip((flop, bytes_read, patches), rates, strict=True)
    return Estimate(flop, bytes_read, patches, rates, sum(amount / rate for amount, rate in work) / workers)
