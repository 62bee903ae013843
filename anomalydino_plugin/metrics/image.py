"""Metrics of image scores, by scikit-learn; error rates at a threshold, with intervals by SciPy.

Legend: ``N`` images.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anomalydino_plugin.errors import InputError

CONFIDENCE = 0.95
_TINY = np.finfo(float).tiny


class ImageMetrics(NamedTuple):
    """Metrics of image scores; ``None`` where one of the two classes is missing.

    Attributes:
        auroc: area under the ROC curve.
        average_precision: mean of the precisions at each step of recall, without interpolation.
        f1_max: largest F1 over all thresholds.
        f1_threshold: the highest threshold that reaches it; an image counts as found if its score is at least that.
    """

    auroc: float | None
    average_precision: float | None
    f1_max: float | None
    f1_threshold: float | None


class ErrorRate(NamedTuple):
    """Share of wrong verdicts, with its Clopper-Pearson interval.

    Attributes:
        errors: wrong verdicts.
        images: verdicts.
        share: errors / images.
        low: lower end of the interval.
        high: upper end.
    """

    errors: int
    images: int
    share: float
    low: float
    high: float


def image_metrics(scores: NDArray[np.floating], anomalous: NDArray[np.bool_]) -> ImageMetrics:
    """Metrics of image scores.

    Args:
        scores: (N,) float, larger is more anomalous.
        anomalous: (N,) bool, the truth.

    Raises:
        InputError: lengths differ, or a score is not finite.
    """
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(anomalous, dtype=bool)
    if values.shape != truth.shape or values.ndim != 1 or not np.isfinite(values).all():
        raise InputError(
            f"scores of shape {values.shape} and labels of shape {truth.shape}: expected one finite score and one "
            "label for each image."
        )
    if truth.all() or not truth.any():
        return ImageMetrics(None, None, None, None)
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

    precision, recall, thresholds = precision_recall_curve(truth, values)
    f1 = 2 * precision[:-1] * recall[:-1] / np.maximum(precision[:-1] + recall[:-1], _TINY)
    best = len(f1) - 1 - int(f1[::-1].argmax())
    return ImageMetrics(
        float(roc_auc_score(truth, values)),
        float(average_precision_score(truth, values)),
        float(f1[best]),
        float(thresholds[best]),
    )


def error_rate(wrong: NDArray[np.bool_]) -> ErrorRate | None:
    """Share of wrong verdicts and its 95 % Clopper-Pearson interval; ``None`` without any verdict.

    Clopper and Pearson 1934: never covers less than it says, also for few images and for no error at all.

    Args:
        wrong: (N,) bool.
    """
    if not len(wrong):
        return None
    from scipy.stats import binomtest

    errors = int(np.count_nonzero(wrong))
    interval = binomtest(errors, len(wrong)).proportion_ci(CONFIDENCE, method="exact")
    return ErrorRate(errors, len(wrong), errors / len(wrong), float(interval.low), float(interval.high))
