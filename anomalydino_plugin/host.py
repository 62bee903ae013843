"""What both Lightning models tell anomalib in the same words: no training, no squashing, thresholds, export.

A mixin rather than a base class: anomalib's ``get_model`` finds only direct subclasses of ``AnomalibModule``.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import Batch
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback
from torch import Tensor

from anomalydino_plugin.backbone import FROM_CHECKPOINT
from anomalydino_plugin.errors import ConfigError
from anomalydino_plugin.host_images import name_unreadable, paths_of_loaders, warn_of_other_pixels
from anomalydino_plugin.post_processor import AnomalyDINOPostProcessor

logger = logging.getLogger(__name__)

_ONNX_OPSET = 18  # what torch's exporter writes; a lower one makes it try a conversion that fails
_ONNX_FILE_BYTES = 1_500_000_000  # beyond it the tensors go into a second file: a protobuf holds 2 GB
_EXAMPLE_SIZE = (32, 32)  # traced in place of any height and width
_LARGE_EXPORT_BYTES = 500_000_000
_NO_PRECISION = {
    "bf16-true": "images would lose their last bits before they are resized; use 'bf16-mixed'",
    "64-true": "weights and bank are float32; use '32-true'",
    "transformer-engine": "the encoder has no such layers; use '16-mixed' or 'bf16-mixed'",
    "transformer-engine-float16": "the encoder has no such layers; use '16-mixed' or 'bf16-mixed'",
}


class _NameUnreadable(Callback):
    """Lightning tells callbacks alone that a run failed."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        del pl_module
        loaders = (trainer.predict_dataloaders, trainer.test_dataloaders, trainer.val_dataloaders)
        name_unreadable([path for loader in loaders for path in paths_of_loaders(loader)], exception)


class TrainingFree:
    """Hooks of a model that is never trained. Mix in before ``AnomalibModule``.

    Attributes:
        image_threshold: overrides the calibrated threshold on raw image scores.
        pixel_threshold: the same for anomaly maps.
    """

    model: Any
    trainer: Any
    post_processor: Any
    device: torch.device
    _scored: Any  # batch -> prediction
    image_threshold: float | None = None
    pixel_threshold: float | None = None

    # Life cycle

    def setup(self, stage: str) -> None:
        """Refuse a precision that would change what the images are.

        Raises:
            ConfigError: naming the precision to use instead.
        """
        del stage
        reason = _NO_PRECISION.get(str(self.trainer.precision))
        if reason is not None:
            raise ConfigError(f"precision={self.trainer.precision!r}: {reason}.")

    def configure_callbacks(self) -> list[Callback]:
        """Anomalib's, and one that names the file where anomalib's reader failed."""
        return [*super().configure_callbacks(), _NameUnreadable()]  # type: ignore[misc]

    @staticmethod
    def warn_of_other_pixels(loaders: Any) -> None:
        """Warn of files that anomalib reads otherwise than `anomalydino score` does; reads their headers."""
        warn_of_other_pixels(paths_of_loaders(loaders))

    def test_step(self, batch: Batch, batch_idx: int, *args: Any, **kwargs: Any) -> Batch:
        """Score a batch as the model's ``_scored`` does."""
        del batch_idx, args, kwargs
        return batch.update(**self._scored(batch)._asdict())

    def predict_step(self, batch: Batch, batch_idx: int, *args: Any, **kwargs: Any) -> Batch:
        """Score a batch as the model's ``_scored`` does."""
        del batch_idx, args, kwargs
        return batch.update(**self._scored(batch)._asdict())

    @staticmethod
    def configure_optimizers() -> None:
        """Nothing is trained."""

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Tensor:
        """Nothing is trained; Lightning wants a loss."""
        del batch, args, kwargs
        return torch.zeros((), requires_grad=True, device=self.device)

    def apply_thresholds(self) -> None:
        """Put the thresholds that the user set in place of those of the checkpoint or of calibration."""
        post_processor = self.post_processor
        if not isinstance(post_processor, AnomalyDINOPostProcessor):
            return
        if self.image_threshold is None and self.pixel_threshold is None:
            return
        image, pixel = self.image_threshold, self.pixel_threshold
        calibrated: Any = post_processor
        if not post_processor.calibrated and (image is None or pixel is None):
            raise ConfigError(
                f"image_threshold={image}, pixel_threshold={pixel}: expected both, as nothing else sets the other."
            )
        post_processor.set_thresholds(
            float(calibrated.image_threshold) if image is None else image,
            float(calibrated.pixel_threshold) if pixel is None else pixel,
        )

    # What anomalib asks of every model

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One epoch, no sanity check, no gradients to clip."""
        return {"gradient_clip_val": 0, "max_epochs": 1, "num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """ONE_CLASS: with FEW_SHOT or ZERO_SHOT anomalib's Engine validates instead of fitting, testing, predicting."""
        return LearningType.ONE_CLASS

    @classmethod
    def configure_pre_processor(cls, image_size: tuple[int, int] | None = None) -> PreProcessor:
        """No transform: the model resizes by itself, with the filter that parity needs."""
        if image_size is not None:
            raise ConfigError(f"image_size={image_size}: this model keeps the aspect ratio; set resolution instead.")
        return PreProcessor(transform=None)

    @staticmethod
    def configure_post_processor() -> AnomalyDINOPostProcessor:
        """Thresholds from normal images."""
        return AnomalyDINOPostProcessor()

    # Checkpoints

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """As anomalib's; the backbone's weights come from the checkpoint, so no other file is looked for.

        Settings given as keywords replace the stored ones, ``false_alarm`` and ``image_threshold`` among them.
        """
        kwargs.setdefault("weights", FROM_CHECKPOINT)
        model = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)  # type: ignore[misc]
        model.apply_thresholds()
        return model

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which weights the checkpoint carries."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        checkpoint["anomalydino_weights"] = self.model.backbone.weights_sha256

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the name of the weights where the model was built without any."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        if self.model.backbone.weights_sha256 == FROM_CHECKPOINT:
            self.model.backbone.weights_sha256 = checkpoint["anomalydino_weights"]

    # Export

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Resizing, masking, bank, map and thresholds as one graph, into ``weights/onnx`` as anomalib does it.

        Not anomalib's own method: its probes and its operator set differ between versions, and one version's probe is
        smaller than a patch.

        Args:
            export_root: folder.
            model_file_name: without suffix.
            input_size: (H, W) of all images; ``None`` for any. The batch is dynamic either way.
            **kwargs: for ``torch.onnx.export``.

        Returns:
            The file.

        Raises:
            ConfigError: options of torch's former exporter.
            BankError: there is nothing to export yet.
        """
        if kwargs.pop("dynamo", True) is False or "dynamic_axes" in kwargs:
            raise ConfigError(
                "dynamo=False and dynamic_axes belong to torch's former exporter, which cannot trace this model: give "
                "input_size for a fixed size, or dynamic_shapes."
            )
        self.require_exportable()
        self._announce_export()
        self.apply_thresholds()
        folder = Path(export_root) / "weights" / "onnx"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{model_file_name}.onnx"
        example = torch.zeros(2, 3, *(input_size or _EXAMPLE_SIZE), device=self.device)
        module: Any = self.eval()  # type: ignore[attr-defined]
        with torch.inference_mode():
            outputs = [name for name, value in module(example)._asdict().items() if value is not None]
        axes = {0: "batch_size"} if input_size else {0: "batch_size", 2: "height", 3: "width"}
        options: dict[str, Any] = {
            "opset_version": _ONNX_OPSET,
            "input_names": ["input"],
            "output_names": outputs,
            "dynamic_shapes": ({axis: torch.export.Dim(name) for axis, name in axes.items()},),
            "external_data": _size(module) > _ONNX_FILE_BYTES,
            "verbose": False,
            **kwargs,
        }
        torch.onnx.export(module, (example,), str(path), dynamo=True, **options)
        return path

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """As anomalib's: a pickle of the model. Load it only where you trust its source.

        Raises:
            BankError: there is nothing to export yet.
        """
        self.require_exportable()
        self._announce_export()
        self.apply_thresholds()
        return super().to_torch(export_root, model_file_name)  # type: ignore[misc,no-any-return]

    def require_exportable(self) -> None:
        """Raise where an exported model could score nothing."""

    def _announce_export(self) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.model.buffers())
        if size > _LARGE_EXPORT_BYTES:
            logger.warning(
                "the bank of %.1f GB goes into the exported file, and into memory with it. Take fewer references, "
                "rotations='informed', or subsample the bank (subsample_coreset) before exporting.",
                size / 1e9,
            )


def _size(module: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))
