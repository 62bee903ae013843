"""Pixel AUROC in bounded memory, for anomalib's Evaluator.

The exact metric keeps every pixel: 10 GB and more for 160 images of 1024 x 1024. Two histograms keep 1 MB. Values
that share a bin count as ties; with 2^17 bins over [0, 2] the difference from the exact area is at most half of the
probability that a normal and an anomalous pixel fall into one bin.
"""

from __future__ import annotations

from typing import Any

import torch
from anomalib.metrics.base import AnomalibMetric
from torch import Tensor
from torchmetrics import Metric

_BINS = 1 << 17
_HIGHEST = 2.0  # cosine distances; normalised values stay below 1


class _HistogramAUROC(Metric):  # type: ignore[misc]  # torchmetrics is untyped here
    """Area under the ROC curve from histograms.

    ``update`` takes predictions (any shape, float in [0, 2]) and targets (same number of elements, 0 or 1).
    """

    full_state_update = False
    higher_is_better = True
    positive: Tensor
    negative: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("positive", "negative"):
            self.add_state(name, torch.zeros(_BINS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count values."""
        bins = (preds.detach().flatten() * (_BINS / _HIGHEST)).long().clamp_(0, _BINS - 1)
        anomalous = target.flatten() > 0
        self.positive += torch.bincount(bins[anomalous], minlength=_BINS)
        self.negative += torch.bincount(bins[~anomalous], minlength=_BINS)

    def compute(self) -> Tensor:
        """Area; NaN where one of the classes is missing."""
        positive, negative = self.positive.double(), self.negative.double()
        below = negative.cumsum(0) - negative
        wins = (positive * (below + 0.5 * negative)).sum()
        return (wins / (positive.sum() * negative.sum())).float()


class PixelAUROC(AnomalibMetric, _HistogramAUROC):  # type: ignore[misc]
    """Pixel AUROC that anomalib's Evaluator logs as ``pixel_AUROC``."""

    default_fields = ("anomaly_map", "gt_mask")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(strict=False, **kwargs)
        self.name = "pixel_AUROC"
