"""Scores and labels of one category -> histogram, ROC and precision-recall curve, as numbers.

Legend: ``N`` images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jobs.inputs import GOOD

UNLABELLED, OTHER = "unlabelled", "other defects"
_BINS = 40
_MOST_LABELS = 7  # colours that can be told apart
_MOST_POINTS = 400


class Histogram(NamedTuple):
    """Scores by label.

    Attributes:
        low: left edge of the first bin.
        high: right edge of the last.
        counts: (bins,) by label; good first, then the kinds of defect by frequency, unlabelled last.
    """

    low: float
    high: float
    counts: dict[str, NDArray[np.int64]]


class Curve(NamedTuple):
    """A curve and where the run's own threshold lies on it.

    Attributes:
        x: (n,) in [0, 1].
        y: (n,) in [0, 1].
        at_threshold: (x, y), or ``None`` without a threshold.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    at_threshold: tuple[float, float] | None


def histogram(scores: NDArray[np.float64], labels: Sequence[str | None], threshold: float | None) -> Histogram:
    """Count scores in bins of equal width that hold the threshold, too.

    Args:
        scores: (N,) at least one.
        labels: (N,).
        threshold: on the scores.
    """
    within = scores if threshold is None else np.append(scores, threshold)
    low, high = float(within.min()), float(within.max())
    if high <= low:
        low, high = low - 0.5, high + 0.5
    shown = _shown_labels(labels)
    counts = {
        name: np.histogram(scores[[label == name for label in shown]], _BINS, (low, high))[0]
        for name in _ordered(shown)
    }
    return Histogram(low, high, counts)


def _shown_labels(labels: Sequence[str | None]) -> list[str]:
    kinds = Counter(label for label in labels if label not in {None, GOOD})
    named = {kind for kind, _ in kinds.most_common(len(kinds) if len(kinds) <= _MOST_LABELS else _MOST_LABELS - 1)}
    return [UNLABELLED if label is None else label if label == GOOD or label in named else OTHER for label in labels]


def _ordered(labels: Sequence[str]) -> list[str]:
    counts = Counter(labels)
    places = {GOOD: 0, OTHER: 2, UNLABELLED: 3}
    return sorted(counts, key=lambda name: (places.get(name, 1), -counts[name], name))


def curves(
    scores: NDArray[np.float64], labels: Sequence[str | None], threshold: float | None
) -> tuple[Curve, Curve] | None:
    """ROC (false-alarm rate, hit rate) and precision-recall curve (recall, precision).

    Args:
        scores: (N,).
        labels: (N,); images without one do not count.
        threshold: the run's own.

    Returns:
        Both, or ``None`` without labelled images of both kinds.
    """
    from sklearn.metrics import precision_recall_curve, roc_curve

    known = np.array([label is not None for label in labels], dtype=bool)
    defect = np.array([label not in {None, GOOD} for label in labels], dtype=bool)[known]
    values = scores[known]
    if not defect.any() or defect.all():
        return None
    false_rate, hit_rate, _ = roc_curve(defect, values)
    precision, recall, _ = precision_recall_curve(defect, values)
    on_roc = on_pr = None
    if threshold is not None:
        raised = values > threshold
        hits = float(raised[defect].mean())
        on_roc = (float(raised[~defect].mean()), hits)
        on_pr = (hits, float(defect[raised].mean())) if raised.any() else None
    return Curve(*_thinned(false_rate, hit_rate), on_roc), Curve(*_thinned(recall[::-1], precision[::-1]), on_pr)


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if len(x) <= _MOST_POINTS:
        return x, y
    kept = np.linspace(0, len(x) - 1, _MOST_POINTS).round().astype(int)
    return x[kept], y[kept]
