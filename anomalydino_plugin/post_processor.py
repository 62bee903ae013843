"""anomalib post-processing with thresholds from normal images alone.

anomalib's own post-processor tunes its threshold on labelled validation data, by default the test set, and clamps
normalised values to [0, 1], which changes ranking metrics. Here validation sets nothing, and normalisation is
``s / (s + t)``: 0.5 at the threshold, strictly increasing, never clamped.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.post_processing import PostProcessor
from torch import Tensor

from anomalydino_plugin.calibration import normalise_score
from anomalydino_plugin.errors import ConfigError

logger = logging.getLogger(__name__)


class AnomalyDINOPostProcessor(PostProcessor):
    """Normalises and labels by thresholds that calibration set; arguments are those of anomalib's post-processor.

    Without thresholds values pass through raw and nothing is labelled.
    """

    def set_thresholds(self, image: float, pixel: float) -> None:
        """Set thresholds on raw values; they are saved in checkpoints.

        Args:
            image: for image scores.
            pixel: for anomaly maps.

        Raises:
            ConfigError: a threshold that is not positive.
        """
        if not (image > 0 and pixel > 0):
            raise ConfigError(f"thresholds image={image}, pixel={pixel}: expected positive numbers.")
        self._image_threshold.fill_(image)
        self._pixel_threshold.fill_(pixel)

    @property
    def calibrated(self) -> bool:
        """Whether thresholds are set."""
        return not bool(self._image_threshold.isnan())

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Labelled validation data never sets a threshold."""

    def on_validation_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Labelled validation data never sets a threshold."""

    def post_process_batch(self, batch: Batch) -> None:
        """Normalise and label a batch in place; a batch stays raw where there are no thresholds."""
        if not self.calibrated:
            logger.warning("no thresholds: scores stay raw and are not labelled; fit the model, or set_thresholds")
            return
        super().post_process_batch(batch)

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Normalise and label predictions, for inference and export."""
        if not self.calibrated:
            return InferenceBatch(pred_score=predictions.pred_score, anomaly_map=predictions.anomaly_map)
        return super().forward(predictions)

    @staticmethod
    def _normalize(preds: Tensor | None, norm_min: Tensor, norm_max: Tensor, threshold: Tensor) -> Tensor | None:
        del norm_min, norm_max  # kept by anomalib; a range of seen values would need clamping
        if preds is None:
            return None
        return normalise_score(preds, threshold.to(preds.device, torch.float32))
