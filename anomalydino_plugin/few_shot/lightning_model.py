"""Few-shot AnomalyDINO in anomalib: translate the host's hooks, call the core, return the host's types.

``Engine.fit`` does no training. The reference images are chosen by the official rule from the sorted paths of the
training set, read by anomalib's own dataset at original size (so that references and test images are decoded alike),
rotated and put into the bank, and thresholds are calibrated on normal images alone.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from anomalib.data import Batch
from anomalib.metrics import AUROC, F1Score
from anomalib.metrics.evaluator import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from torch import Tensor, nn

from anomalydino_plugin.backbone import DEFAULT_BACKBONE, load_backbone
from anomalydino_plugin.calibration import FALSE_ALARM_TARGET
from anomalydino_plugin.engines.choice import EngineName
from anomalydino_plugin.errors import BankError, ConfigError, ImageError
from anomalydino_plugin.few_shot.calibrate import calibrate
from anomalydino_plugin.few_shot.loaders import (
    only_these_images,
    reference_indices,
    refuse_mixed_sizes,
)
from anomalydino_plugin.few_shot.torch_model import FewShotModel
from anomalydino_plugin.host import TrainingFree
from anomalydino_plugin.host_images import image_paths
from anomalydino_plugin.image_tensors import to_uint8
from anomalydino_plugin.kernels.rows import Kernel
from anomalydino_plugin.masking import Morphology
from anomalydino_plugin.patch_model import MapArea, Masking, masking_of
from anomalydino_plugin.pixel_metrics import PixelAUROC
from anomalydino_plugin.post_processor import AnomalyDINOPostProcessor
from anomalydino_plugin.preprocessing import RgbImage
from anomalydino_plugin.scoring import DEFAULT_STATISTIC, SIGMA

logger = logging.getLogger(__name__)
_NO_DISTANCE = 1e-6  # copies of an image differ by the rounding of their features


class _GiveBack(Callback):
    """Lightning tells callbacks alone that a run failed."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        del trainer, exception
        pl_module.on_fit_end()


class AnomalyDINOFewShot(TrainingFree, AnomalibModule):  # type: ignore[misc]  # anomalib has no types here
    """Few-shot AnomalyDINO (arXiv 2405.14529).

    Args:
        backbone: ``dinov2_vit{s,b,l,g}14``, the same with ``_reg``, or the name of a timm vision transformer.
        weights: file of weights; looked up if not given.
        resolution: smaller edge after resizing, pixels.
        shots: reference images; ``None`` takes the whole training set.
        seed: takes the sorted training images ``seed * shots`` to ``(seed + 1) * shots - 1``.
        rotations: of the references, ``"agnostic"`` (8) or ``"informed"`` (none).
        masking: ``"auto"`` (masking test on the first reference), ``"on"`` or ``"off"``.
        reference_masking: keep only foreground patches of references, too.
        morphology: of the masks, ``"official"`` or ``"grid"``.
        k: neighbours averaged for a patch distance.
        statistic: image score; see ``scoring.image_score``.
        map_area: ``"crop"`` or ``"official"``; see ``FewShotModel``.
        sigma: smoothing of the anomaly map, pixels.
        calibration_shots: this many further training images set the thresholds; 0 uses the references alone.
        false_alarm: share of normal images that may exceed the threshold; may be changed for a fitted model.
        image_threshold: on raw image scores, in place of the calibrated one.
        pixel_threshold: the same for anomaly maps.
        batch_size: images encoded at a time.
        engine: runs the backbone: ``"auto"``, ``"torch"``, ``"torch_half"``, ``"openvino"`` or ``"openvino_bf16"``.
        kernel: searches for the nearest patches: ``"auto"``, ``"torch"``, ``"tiles_f32"``, ``"tiles_bf16"``,
            ``"tiles_int8"`` or ``"triton"``.
        pre_processor: by default nothing: images must arrive at original size with values in [0, 1].
        post_processor: by default ``AnomalyDINOPostProcessor``.
        evaluator: by default anomalib's four metrics, pixel AUROC in bounded memory.
        visualizer: as in anomalib.

    Raises:
        ConfigError, WeightsError: settings or weights that cannot be used.
    """

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        weights: str | None = None,
        resolution: int = 448,
        shots: int | None = 1,
        seed: int = 0,
        rotations: str = "agnostic",
        masking: Masking | bool = "auto",
        reference_masking: bool = False,
        morphology: Morphology = "official",
        k: int = 1,
        statistic: str = DEFAULT_STATISTIC,
        map_area: MapArea = "crop",
        sigma: float = SIGMA,
        calibration_shots: int = 0,
        false_alarm: float = FALSE_ALARM_TARGET,
        image_threshold: float | None = None,
        pixel_threshold: float | None = None,
        batch_size: int = 8,
        engine: EngineName = "auto",
        kernel: Kernel = "auto",
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        if shots is not None and shots < 1:
            raise ConfigError(f"shots={shots}: expected at least 1, or None for the whole training set.")
        self.shots, self.seed = shots, seed
        self.calibration_shots, self.false_alarm = calibration_shots, false_alarm
        self.image_threshold, self.pixel_threshold = image_threshold, pixel_threshold
        self.model: FewShotModel = FewShotModel(
            load_backbone(backbone, weights),
            resolution=resolution,
            rotations=rotations,
            masking=masking_of(masking),
            reference_masking=reference_masking,
            morphology=morphology,
            k=k,
            statistic=statistic,
            map_area=map_area,
            sigma=sigma,
            batch_size=batch_size,
            engine=engine,
            kernel=kernel,
        )
        # Several devices: torch's DistributedDataParallel refuses a module in which nothing could be trained.
        self.untrained = nn.Parameter(torch.zeros(()))
        self._restore_train_data: Any = None

    # Fit: choose, build, calibrate

    def on_fit_start(self) -> None:
        """Choose the references before anything is decoded, and keep the other training images out of the loader."""
        datamodule = self.trainer.datamodule
        if datamodule is not None and not hasattr(datamodule, "val_data"):
            self.trainer.limit_val_batches = 0  # val_split_mode=none: the datamodule would fail to make a loader
        if datamodule is None or not hasattr(datamodule, "train_data"):
            return  # a bare loader: it decodes all its images, the bank still takes the chosen ones alone
        self._restore_train_data = (datamodule, datamodule.train_data)
        datamodule.train_data = only_these_images(datamodule.train_data, self._chosen(datamodule.train_data)[0][:1])

    def on_train_start(self) -> None:
        """Build and calibrate the bank; the training epoch that follows does nothing."""
        dataset = self._take_back_train_data()
        chosen, held_out = self._chosen(dataset)
        paths = image_paths(dataset)
        logger.warning("%d reference image(s) of %d: %s", len(chosen), len(paths), [paths[i] for i in chosen][:8])
        self.model.clear()
        with self.trainer.precision_plugin.forward_context():  # references in the precision that images will be in
            for position, index in enumerate(chosen, 1):
                self.model.add_reference(self._read(dataset, index), paths[index])
                logger.info("reference image %d of %d", position, len(chosen))
            self.model.freeze()
            if self.model.masking_decision is not None:
                logger.info("masking test: %s", self.model.masking_decision.reason)
            self._calibrate([self._read(dataset, index) for index in held_out])

    def on_fit_end(self) -> None:
        """Give the datamodule back as it was, also where a resumed run had nothing left to do."""
        if self._restore_train_data is not None:
            self._take_back_train_data()

    def configure_callbacks(self) -> list[Callback]:
        """Anomalib's, and one that gives the datamodule back after a failure."""
        return [*super().configure_callbacks(), _GiveBack()]

    def _take_back_train_data(self) -> Any:
        if self._restore_train_data is None:
            return self.trainer.train_dataloader.dataset
        datamodule, dataset = self._restore_train_data
        datamodule.train_data, self._restore_train_data = dataset, None
        return dataset

    def _chosen(self, dataset: Any) -> tuple[list[int], list[int]]:
        """Indices of references and of held-out normals, by the sorted paths."""
        return reference_indices(image_paths(dataset), self.shots, self.seed, self.calibration_shots)

    @staticmethod
    def _read(dataset: Any, index: int) -> RgbImage:
        """One training image at original size, (H, W, 3) uint8."""
        path = image_paths(dataset)[index]
        try:
            pixels: RgbImage = to_uint8(dataset[index].image[None])[0]
            return pixels
        except ImageError:
            raise
        except Exception as error:  # the dataset's reader raises Pillow's errors
            raise ImageError(
                f"cannot read reference image {path!r}: {type(error).__name__}: {error}. Replace or remove it."
            ) from error

    def _calibrate(self, held_out: list[RgbImage]) -> None:
        if not isinstance(self.post_processor, AnomalyDINOPostProcessor):
            return
        try:
            calibration = calibrate(self.model, held_out or None, false_alarm=self.false_alarm)
        except BankError as error:
            logger.warning("no thresholds: %s", error)
            return
        if min(calibration.image_threshold, calibration.pixel_threshold) < _NO_DISTANCE:
            logger.warning(
                "no thresholds: the normal images score nearly 0, as copies of each other or all background do. Take "
                "other references or calibration_shots, or give image_threshold and pixel_threshold."
            )
            return
        logger.info("thresholds from %d %s normal images", calibration.images, calibration.source)
        self.post_processor.calibrate(calibration.scores, calibration.peaks, self.false_alarm)
        self.apply_thresholds()

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Tensor:
        """Nothing is trained; Lightning wants a loss. On several devices each builds the same bank."""
        del batch, args, kwargs
        return self.untrained * 0.0

    def apply_thresholds(self) -> None:
        """Thresholds for the target and the overrides that this model was given, whatever the checkpoint had."""
        if isinstance(self.post_processor, AnomalyDINOPostProcessor):
            self.post_processor.retarget(self.false_alarm)
        super().apply_thresholds()

    def require_exportable(self) -> None:
        """Raise ``BankError`` where the bank is empty."""
        self.model.memory.require()

    # Validate, test, predict

    def on_validation_start(self) -> None:
        """Refuse batches that anomalib would squash; apply thresholds."""
        refuse_mixed_sizes(self.trainer.val_dataloaders)
        self.apply_thresholds()

    def on_test_start(self) -> None:
        """Refuse batches that anomalib would squash; apply thresholds."""
        refuse_mixed_sizes(self.trainer.test_dataloaders)
        self.warn_of_other_pixels(self.trainer.test_dataloaders)
        self.apply_thresholds()

    def on_predict_start(self) -> None:
        """Refuse batches that anomalib would squash; apply thresholds."""
        refuse_mixed_sizes(self.trainer.predict_dataloaders)
        self.warn_of_other_pixels(self.trainer.predict_dataloaders)
        self.apply_thresholds()

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Batch | None:
        """Predictions for the evaluator's validation metrics; nothing where there are none."""
        del args, kwargs
        if self.evaluator is None or not len(self.evaluator.val_metrics):
            return None
        return batch.update(**self._scored(batch)._asdict())

    def _scored(self, batch: Batch) -> Any:
        """As anomalib's; errors name the files."""
        try:
            return self.model(batch.image)
        except ImageError as error:
            names = ", ".join(repr(str(path)) for path in batch.image_path or [])
            raise ImageError(f"cannot score {names or 'a batch without paths'}: {error}") from error

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Anomalib's four default metrics."""
        return Evaluator(
            test_metrics=[
                AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
                F1Score(fields=["pred_label", "gt_label"], prefix="image_"),
                PixelAUROC(),
                F1Score(fields=["pred_mask", "gt_mask"], prefix="pixel_", strict=False),
            ]
        )
