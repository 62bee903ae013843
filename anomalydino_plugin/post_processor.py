"""anomalib post-processing with thresholds from normal images alone.

anomalib's own post-processor tunes its threshold on labelled validation data, by default the test set, and clamps
normalised values to [0, 1], which changes ranking metrics. Here validation sets nothing, and normalisation is
``s / (s + t)``: 0.5 at the threshold, strictly increasing, never clamped, the same for every image.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.post_processing import PostProcessor
from torch import Tensor

from anomalydino_plugin.calibration import normalise_score, threshold_from_normals
from anomalydino_plugin.errors import ConfigError
from anomalydino_plugin.exact_buffers import ExactBuffers

logger = logging.getLogger(__name__)


class AnomalyDINOPostProcessor(ExactBuffers, PostProcessor):  # type: ignore[misc]  # anomalib has no types here
    """Normalises and labels by thresholds that calibration set; arguments are those of anomalib's post-processor.

    Without thresholds values pass through raw and nothing is labelled. The scores of the normal images are kept, so
    that a checkpoint can be given another false-alarm target without building its bank again.

    Attributes:
        calibrated: whether thresholds are set. A plain flag: exported graphs cannot branch on a buffer.
    """

    any_length = ("normal_scores", "normal_peaks")
    normal_scores: Tensor
    normal_peaks: Tensor
    _image_threshold: Tensor
    _pixel_threshold: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calibrated = False
        for name in self.any_length:
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))

    def calibrate(self, scores: Sequence[float], peaks: Sequence[float], false_alarm: float) -> None:
        """Set thresholds from raw values of normal images, and keep these.

        Args:
            scores: image scores.
            peaks: maxima of the anomaly maps.
            false_alarm: share of normal images that may exceed the image threshold.
        """
        self.normal_scores = torch.tensor(scores, dtype=torch.float64, device=self.normal_scores.device)
        self.normal_peaks = torch.tensor(peaks, dtype=torch.float64, device=self.normal_peaks.device)
        self.retarget(false_alarm)

    def retarget(self, false_alarm: float) -> None:
        """Set thresholds for another false-alarm target; nothing happens where no normal scores are kept."""
        if len(self.normal_scores):
            self.set_thresholds(
                threshold_from_normals(self.normal_scores.tolist(), false_alarm=false_alarm),
                threshold_from_normals(self.normal_peaks.tolist(), false_alarm=false_alarm),
            )

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
        self.calibrated = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.calibrated = not bool(self._image_threshold.isnan())

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Labelled validation data never sets a threshold."""

    def on_validation_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Labelled validation data never sets a threshold."""

    def post_process_batch(self, batch: Batch) -> None:
        """Normalise and label a batch in place; a batch stays raw where there are no thresholds."""
        if self.calibrated:
            super().post_process_batch(batch)

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Normalise and label predictions, for inference and export."""
        if not self.calibrated:
            return InferenceBatch(pred_score=predictions.pred_score, anomaly_map=predictions.anomaly_map)
        return super().forward(predictions)

    # The three below replace anomalib's because some of its versions branch on the value of a threshold, which an
    # exported graph cannot.

    @property
    def image_threshold(self) -> Tensor:
        """On raw image scores; NaN where there is none."""
        return self._image_threshold

    @property
    def pixel_threshold(self) -> Tensor:
        """On raw anomaly maps; NaN where there is none."""
        return self._pixel_threshold

    @staticmethod
    def _apply_threshold(preds: Tensor | None, threshold: Tensor) -> Tensor | None:
        return None if preds is None else preds > threshold

    @staticmethod
    def _normalize(preds: Tensor | None, norm_min: Tensor, norm_max: Tensor, threshold: Tensor) -> Tensor | None:
        del norm_min, norm_max  # kept by anomalib; a range of seen values would need clamping
        if preds is None:
            return None
        return normalise_score(preds, threshold.to(preds.device, torch.float32))
