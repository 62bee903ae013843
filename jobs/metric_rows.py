"""Metrics of a run by category, their mean over categories, and their spread over runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RATES = ("false_alarms", "misses")
IMAGE_METRICS = ("auroc", "average_precision", "f1_max")
PIXEL_METRICS = ("pixel_auroc", "pixel_average_precision", "pixel_f1_max", "pro_30", "pro_05")
METRICS = (*IMAGE_METRICS, *RATES, *PIXEL_METRICS)


class CategoryMetrics(NamedTuple):
    """Metrics of one category; ``None`` where labels, masks or a threshold are missing.

    Attributes:
        category: which.
        images: scored images.
        failed: images that could not be processed: they are in no metric.
        labelled: scored images with a label.
        defects: labelled images that are not good.
        auroc: of image scores, as the next three: see ``anomalydino_plugin.ImageMetrics``.
        average_precision: -
        f1_max: -
        f1_threshold: raw score.
        threshold: the run's own, raw score.
        false_alarms: share of good images above the run's own threshold.
        false_alarms_low: lower end of its 95 % Clopper-Pearson interval.
        false_alarms_high: upper end.
        misses: share of defects at or below the threshold.
        misses_low: lower end of its interval.
        misses_high: upper end.
        pixel_images: images in the pixel metrics: good ones, and those with a readable mask; 0 without such metrics.
        pixel_regions: connected anomalous regions in them.
        pixel_auroc: of anomaly maps, as what follows: see ``anomalydino_plugin.PixelMetrics``.
        pixel_average_precision: -
        pixel_f1_max: -
        pixel_f1_threshold: patch distance.
        pro_30: -
        pro_05: -
        pixel_dropped_bits: 0 where pixel metrics are exact.
        mask_problems: masks that could not be used, a message for each.
    """

    category: str
    images: int
    failed: int
    labelled: int
    defects: int
    auroc: float | None = None
    average_precision: float | None = None
    f1_max: float | None = None
    f1_threshold: float | None = None
    threshold: float | None = None
    false_alarms: float | None = None
    false_alarms_low: float | None = None
    false_alarms_high: float | None = None
    misses: float | None = None
    misses_low: float | None = None
    misses_high: float | None = None
    pixel_images: int = 0
    pixel_regions: int = 0
    pixel_auroc: float | None = None
    pixel_average_precision: float | None = None
    pixel_f1_max: float | None = None
    pixel_f1_threshold: float | None = None
    pro_30: float | None = None
    pro_05: float | None = None
    pixel_dropped_bits: int = 0
    mask_problems: tuple[str, ...] = ()


class Spread(NamedTuple):
    """One metric over runs.

    Attributes:
        category: which; ``None`` for the mean over categories.
        metric: its name.
        runs: that have it.
        mean: over those.
        standard_deviation: of the sample (divided by runs - 1); ``None`` for one run.
    """

    category: str | None
    metric: str
    runs: int
    mean: float
    standard_deviation: float | None


def mean_over_categories(rows: Sequence[CategoryMetrics]) -> dict[str, float | None]:
    """Mean of each metric over the categories that have it, each counting once."""
    means: dict[str, float | None] = {}
    for name in METRICS:
        values = [value for row in rows if (value := getattr(row, name)) is not None]
        means[name] = float(np.mean(values)) if values else None
    return means


def spread_over_runs(runs: Sequence[Sequence[CategoryMetrics]]) -> list[Spread]:
    """Mean and standard deviation of each metric over runs, by category, then of the mean over categories.

    That mean is over the categories that all runs hold: others would add the difference of categories to the spread.
    """
    by_category: dict[str | None, list[dict[str, float | None]]] = {}
    for row in sorted((row for rows in runs for row in rows), key=lambda row: row.category):
        by_category.setdefault(row.category, []).append({name: getattr(row, name) for name in METRICS})
    shared = set.intersection(*({row.category for row in rows} for rows in runs))
    by_category[None] = [mean_over_categories([row for row in rows if row.category in shared]) for rows in runs]
    found = []
    for category, measured in by_category.items():
        for name in METRICS:
            values = [value for one in measured if (value := one[name]) is not None]
            if values:
                deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
                found.append(Spread(category, name, len(values), float(np.mean(values)), deviation))
    return found
