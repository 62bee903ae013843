"""Pixel metrics from counts at the values that anomalous pixels have.

Legend: ``L`` levels, the distinct values of anomalous pixels, rising.

Nothing else is needed for exact results. Between two levels only false positives change: F1 and precision are best at
a level, recall and overlap stay as they are, and the curves run straight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anomalydino_plugin.errors import ConfigError

Counts = NDArray[np.int64]


class LevelCounts(NamedTuple):
    """What was counted.

    Attributes:
        levels: (L,) float32, rising.
        positives: (L,) anomalous pixels of that value.
        overlap: (L,) float64, their share of their region, summed.
        at_least: (L,) pixels of any kind with that value or more.
        above: (L,) pixels of any kind with more.
        pixels: all of them.
        regions: connected regions of anomalous pixels.
    """

    levels: NDArray[np.float32]
    positives: Counts
    overlap: NDArray[np.float64]
    at_least: Counts
    above: Counts
    pixels: int
    regions: int

    @property
    def anomalous(self) -> int:
        """Anomalous pixels."""
        return int(self.positives.sum())

    @property
    def normal(self) -> int:
        """Normal pixels."""
        return self.pixels - self.anomalous


def _from_above(values: NDArray[Any]) -> NDArray[Any]:
    """(L,) sums of this and all higher levels."""
    return np.cumsum(values[::-1])[::-1]


def roc_area(counts: LevelCounts) -> float:
    """Probability that an anomalous pixel has more than a normal one; ties count half."""
    found = _from_above(counts.positives)
    normal_at_least = counts.at_least - found
    normal_above = counts.above - (found - counts.positives)
    below = counts.normal - 0.5 * (normal_at_least + normal_above)
    return float(np.dot(counts.positives / counts.anomalous, below / counts.normal))


def average_precision(counts: LevelCounts) -> float:
    """Mean of the precision at each step of recall, without interpolation."""
    precision = _from_above(counts.positives) / counts.at_least
    return float(np.dot(counts.positives / counts.anomalous, precision))


def best_f1(counts: LevelCounts) -> tuple[float, float]:
    """Largest F1 over all thresholds, and the highest threshold that reaches it."""
    f1 = 2 * _from_above(counts.positives) / (counts.anomalous + counts.at_least)
    best = len(f1) - 1 - int(f1[::-1].argmax())
    return float(f1[best]), float(counts.levels[best])


def region_overlap_area(counts: LevelCounts, limit: float) -> float:
    """PRO (Bergmann et al. 2021): mean overlap of regions over the false-positive rate, up to a limit.

    Args:
        counts: what was counted.
        limit: largest false-positive rate, in (0, 1]; the area is divided by it.

    Raises:
        ConfigError: a limit outside (0, 1].
    """
    if not 0.0 < limit <= 1.0:
        raise ConfigError(f"limit={limit}: expected a false-positive rate above 0 and at most 1, such as 0.3.")
    rate, overlap = _overlap_curve(counts)
    left, right = rate[:-1], np.minimum(rate[1:], limit)
    inside = left < right
    left, right, end = left[inside], right[inside], rate[1:][inside]
    low, high = overlap[:-1][inside], overlap[1:][inside]
    high = low + (high - low) * (right - left) / (end - left)
    return float(np.dot(right - left, low + high) / 2 / limit)


def _overlap_curve(counts: LevelCounts) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(2 L + 2,) false-positive rates, rising, and mean overlaps: just above each level, and at it."""
    found = _from_above(counts.positives)
    covered = _from_above(counts.overlap)
    rate, overlap = np.zeros(2 * len(found) + 2), np.zeros(2 * len(found) + 2)
    rate[1:-1:2] = (counts.above - (found - counts.positives))[::-1] / counts.normal
    rate[2:-1:2] = (counts.at_least - found)[::-1] / counts.normal
    overlap[1:-1:2] = (covered - counts.overlap)[::-1] / counts.regions
    overlap[2:-1:2] = covered[::-1] / counts.regions
    rate[-1] = overlap[-1] = 1.0
    return rate, overlap
