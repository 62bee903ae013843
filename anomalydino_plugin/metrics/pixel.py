"""Metrics of anomaly maps over any number of images, exact, in bounded memory.

Legend: ``H W`` pixels, ``L`` levels, the distinct values of anomalous pixels.

Two passes. The first sees the images with anomalous pixels and keeps the values of these: few, and all that thresholds
need (see ``curves``). The second sees every image, and counts its pixels against these values, a sorted buffer at a
time. No pass keeps a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from anomalydino_plugin.errors import InputError
from anomalydino_plugin.metrics import curves

MAX_LEVELS = 1 << 23  # 8 million: 300 MB with all that is counted
BUFFER_PIXELS = 1 << 24  # 64 MB
PRO_LIMITS = (0.3, 0.05)  # Bergmann et al. 2021, and the stricter limit of later sets
_WAITING_PIXELS = 1 << 21
_CONNECTIVITY = 8  # as the official evaluation of MVTec AD

Map = NDArray[np.float32]
Mask = NDArray[np.bool_]


class PixelMetrics(NamedTuple):
    """Metrics of anomaly maps.

    Attributes:
        pixels: of all images.
        anomalous: pixels.
        regions: connected regions of anomalous pixels.
        auroc: area under the ROC curve.
        average_precision: mean of the precisions at each step of recall, without interpolation.
        f1_max: largest F1 over all thresholds.
        f1_threshold: the highest threshold that reaches it; a pixel counts as found if its value is at least that.
        pro_30: mean overlap of regions, over false-positive rates up to 0.3.
        pro_05: the same up to 0.05.
        dropped_bits: of the 24 that a value has; 0, and the metrics exact, up to ``MAX_LEVELS`` distinct values.
    """

    pixels: int
    anomalous: int
    regions: int
    auroc: float
    average_precision: float
    f1_max: float
    f1_threshold: float
    pro_30: float
    pro_05: float
    dropped_bits: int


class AnomalousLevels:
    """First pass: the values of anomalous pixels.

    Args:
        max_levels: distinct values to keep. Where there are more, values lose their last bits, as many as it takes.
    """

    def __init__(self, max_levels: int = MAX_LEVELS) -> None:
        self.regions = 0
        self.dropped_bits = 0
        self._max_levels = max_levels
        self._levels = np.zeros(0, np.float32)
        self._positives = np.zeros(0, np.int64)
        self._overlap = np.zeros(0, np.float64)
        self._waiting: list[tuple[Map, NDArray[np.float64]]] = []

    def add(self, anomaly_map: Map, mask: Mask) -> None:
        """Add an image that may have anomalous pixels.

        Args:
            anomaly_map: (H, W) float32, larger is more anomalous.
            mask: (H, W) bool, true where anomalous.

        Raises:
            InputError: shapes differ, or a value is not finite.
        """
        if anomaly_map.shape != mask.shape:
            raise InputError(
                f"anomaly map of {anomaly_map.shape} and mask of {mask.shape} pixels: expected one size. Resize the "
                "map to the mask, not the mask."
            )
        _check_finite(anomaly_map)
        count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=_CONNECTIVITY)
        self.regions += count - 1
        own = labels[mask]
        self._waiting.append((anomaly_map[mask].astype(np.float32), 1.0 / stats[own, cv2.CC_STAT_AREA]))
        if sum(len(values) for values, _ in self._waiting) > _WAITING_PIXELS:
            self._merge()

    def finished(self) -> tuple[Map, curves.Counts, NDArray[np.float64]]:
        """(L,) levels, rising, the anomalous pixels of each, and their share of their regions."""
        self._merge()
        return self._levels, self._positives, self._overlap

    def _merge(self) -> None:
        waiting, self._waiting = self._waiting, []
        levels = np.concatenate([self._levels, *(values for values, _ in waiting)])
        ones = np.ones(len(levels) - len(self._levels), np.int64)
        positives = np.concatenate([self._positives, ones])
        overlap = np.concatenate([self._overlap, *(shares for _, shares in waiting)])
        while True:
            levels, positives, overlap = _joined(_rounded(levels, self.dropped_bits), positives, overlap)
            if len(levels) <= self._max_levels:
                break
            self.dropped_bits += 1
        self._levels, self._positives, self._overlap = levels, positives, overlap


class PixelCounts:
    """Second pass: all pixels, counted against the levels of the first.

    Args:
        first: the finished first pass; at least one anomalous pixel.
        buffer_pixels: values sorted at a time.

    Raises:
        InputError: there are no anomalous pixels.
    """

    def __init__(self, first: AnomalousLevels, buffer_pixels: int = BUFFER_PIXELS) -> None:
        self._levels, self._positives, self._overlap = first.finished()
        if not len(self._levels):
            raise InputError("no anomalous pixel in any mask: expected at least one. Check that masks are not empty.")
        self._regions, self._dropped_bits = first.regions, first.dropped_bits
        self._at_least = np.zeros(len(self._levels), np.int64)
        self._above = np.zeros(len(self._levels), np.int64)
        self._pixels = self._filled = 0
        self._buffer = np.empty(buffer_pixels, np.float32)

    def add(self, anomaly_map: Map) -> None:
        """Count the pixels of an image, one of the first pass or another.

        Args:
            anomaly_map: (H, W) float32.

        Raises:
            InputError: a value is not finite.
        """
        _check_finite(anomaly_map)
        values = _rounded(anomaly_map.reshape(-1).astype(np.float32, copy=False), self._dropped_bits)
        lowest = self._levels[0]
        self._pixels += values.size
        # Most of a masked image has the lowest value, or less: such pixels need no sorting.
        higher = values[values > lowest]
        self._at_least[0] += np.count_nonzero(values == lowest) + len(higher)
        while len(higher):
            part = higher[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            higher = higher[len(part) :]
            if self._filled == len(self._buffer):
                self._count()

    def metrics(self) -> PixelMetrics:
        """Metrics of all images added.

        Raises:
            InputError: there are no normal pixels.
        """
        self._count()
        counts = curves.LevelCounts(
            self._levels, self._positives, self._overlap, self._at_least, self._above, self._pixels, self._regions
        )
        if counts.normal <= 0:
            raise InputError(
                f"{counts.pixels} pixels, {counts.anomalous} of them anomalous: expected normal ones as well, and "
                "every image of the first pass in the second."
            )
        f1_max, f1_threshold = curves.best_f1(counts)
        pro_30, pro_05 = (curves.region_overlap_area(counts, limit) for limit in PRO_LIMITS)
        return PixelMetrics(
            pixels=counts.pixels,
            anomalous=counts.anomalous,
            regions=counts.regions,
            auroc=curves.roc_area(counts),
            average_precision=curves.average_precision(counts),
            f1_max=f1_max,
            f1_threshold=f1_threshold,
            pro_30=pro_30,
            pro_05=pro_05,
            dropped_bits=self._dropped_bits,
        )

    def _count(self) -> None:
        own = self._buffer[: self._filled]
        own.sort()
        self._above += len(own) - np.searchsorted(own, self._levels, side="right")
        self._at_least[1:] += len(own) - np.searchsorted(own, self._levels[1:], side="left")
        self._filled = 0


def anomaly_map_metrics(maps: Sequence[Map], masks: Sequence[Mask]) -> PixelMetrics:
    """Metrics of maps that are in memory; larger sets go through ``AnomalousLevels`` and ``PixelCounts`` one by one.

    Args:
        maps: (H, W) float32 each; sizes may differ.
        masks: (H, W) bool each, true where anomalous.

    Raises:
        InputError: numbers or shapes differ, a value is not finite, or one kind of pixels is missing.
    """
    if len(maps) != len(masks):
        raise InputError(f"{len(maps)} maps and {len(masks)} masks: expected one mask for each map.")
    levels = AnomalousLevels()
    for anomaly_map, mask in zip(maps, masks, strict=True):
        levels.add(anomaly_map, mask)
    counts = PixelCounts(levels, min(BUFFER_PIXELS, max(1, sum(anomaly_map.size for anomaly_map in maps))))
    for anomaly_map in maps:
        counts.add(anomaly_map)
    return counts.metrics()


def _joined(
    levels: Map, positives: curves.Counts, overlap: NDArray[np.float64]
) -> tuple[Map, curves.Counts, NDArray[np.float64]]:
    """Equal levels become one."""
    if not len(levels):
        return levels, positives, overlap
    order = np.argsort(levels)
    levels = levels[order]
    starts = np.flatnonzero(np.concatenate([[True], levels[1:] != levels[:-1]]))
    return levels[starts], np.add.reduceat(positives[order], starts), np.add.reduceat(overlap[order], starts)


def _rounded(values: Map, dropped_bits: int) -> Map:
    """Values without the last bits of their significand, nearer to zero: larger ones stay at least as large."""
    if not dropped_bits:
        return values
    bits = np.ascontiguousarray(values).view(np.int32)
    return (bits >> dropped_bits << dropped_bits).view(np.float32)


def _check_finite(anomaly_map: Map) -> None:
    if not np.isfinite(anomaly_map).all():
        raise InputError("the anomaly map has values that are not finite: expected distances.")
