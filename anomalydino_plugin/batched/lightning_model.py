"""Batched zero-shot AnomalyDINO in anomalib: no normal image, the test set is compared with itself.

``Engine.fit`` does nothing. ``Engine.test`` and ``Engine.predict`` read each loader twice: before its first batch all
images are encoded, then every batch is scored against all other images of that loader.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from anomalib.data import Batch
from anomalib.metrics import AUROC, F1Max
from anomalib.metrics.evaluator import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.visualization import Visualizer
from rich.progress import track
from torch import nn

from anomalydino_plugin.backbone import DEFAULT_BACKBONE, load_backbone
from anomalydino_plugin.batched.feature_store import DEFAULT_BUDGET, FeatureType
from anomalydino_plugin.batched.first_pass import Transform, count_images, image_key, read_all
from anomalydino_plugin.batched.torch_model import BatchedModel
from anomalydino_plugin.detection import Prediction
from anomalydino_plugin.engines.choice import EngineName
from anomalydino_plugin.errors import ConfigError
from anomalydino_plugin.host import TrainingFree
from anomalydino_plugin.image_tensors import to_uint8
from anomalydino_plugin.kernels.rows import Kernel
from anomalydino_plugin.masking import Morphology
from anomalydino_plugin.mutual import Mode
from anomalydino_plugin.patch_model import MapArea, Masking, masking_of
from anomalydino_plugin.pixel_metrics import PixelAUROC
from anomalydino_plugin.scoring import DEFAULT_STATISTIC, SIGMA

logger = logging.getLogger(__name__)
Item = TypeVar("Item")


class AnomalyDINOBatched(TrainingFree, AnomalibModule):  # type: ignore[misc]  # anomalib has no types here
    """Batched zero-shot AnomalyDINO (arXiv 2405.14529).

    Args:
        backbone: ``dinov2_vit{s,b,l,g}14``, the same with ``_reg``, or the name of a timm vision transformer.
        weights: file of weights; looked up if not given.
        mode: ``"official"``: a patch's distance is the mean of the lowest 0.1 % of its distances to all patches of all
            other images, the paper's setting; ``"musc"``: of the lowest 30 % of its distances to the other images, a
            distance to an image being the lowest to one of its patches (arXiv 2401.16753).
        share: in place of 0.1 % or 30 %.
        resolution: smaller edge after resizing, pixels.
        masking: ``"auto"`` (on where the masking test passes on more than half of the images), ``"on"`` or ``"off"``.
        morphology: of the masks, ``"official"`` or ``"grid"``.
        statistic: image score; see ``scoring.image_score``.
        map_area: ``"crop"`` or ``"official"``; see ``BatchedModel``.
        sigma: smoothing of the anomaly map, pixels.
        image_threshold: on raw image scores, as known from an earlier run; without thresholds nothing is labelled,
            as there are no normal images to set them.
        pixel_threshold: the same for anomaly maps.
        feature_type: of the features kept, ``"float32"`` or ``"float16"``.
        memory_budget_gb: features kept in memory, the rest goes to disk.
        spill_folder: for that; by default the system's temporary folder.
        batch_size: images encoded at a time.
        engine: runs the backbone: ``"auto"``, ``"torch"``, ``"torch_half"``, ``"openvino"`` or ``"openvino_bf16"``.
        kernel: searches for the nearest patches: ``"auto"``, ``"torch"``, ``"tiles_f32"``, ``"tiles_bf16"``,
            ``"tiles_int8"`` or ``"triton"``.
        pre_processor: by default nothing: images must arrive at original size with values in [0, 1].
        post_processor: by default ``AnomalyDINOPostProcessor``.
        evaluator: by default image AUROC and F1-max, and pixel AUROC in bounded memory.
        visualizer: as in anomalib.

    Raises:
        ConfigError, WeightsError: settings or weights that cannot be used.
    """

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        weights: str | None = None,
        mode: Mode = "official",
        share: float | None = None,
        resolution: int = 448,
        masking: Masking | bool = "auto",
        morphology: Morphology = "official",
        statistic: str = DEFAULT_STATISTIC,
        map_area: MapArea = "crop",
        sigma: float = SIGMA,
        image_threshold: float | None = None,
        pixel_threshold: float | None = None,
        feature_type: FeatureType = "float32",
        memory_budget_gb: float = DEFAULT_BUDGET / 1e9,
        spill_folder: str | None = None,
        batch_size: int = 8,
        engine: EngineName = "auto",
        kernel: Kernel = "auto",
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        self.image_threshold, self.pixel_threshold = image_threshold, pixel_threshold
        self.model: BatchedModel = BatchedModel(
            load_backbone(backbone, weights),
            mode=mode,
            share=share,
            resolution=resolution,
            masking=masking_of(masking),
            morphology=morphology,
            statistic=statistic,
            map_area=map_area,
            sigma=sigma,
            batch_size=batch_size,
            engine=engine,
            kernel=kernel,
            feature_type=feature_type,
            memory_budget=int(memory_budget_gb * 1e9),
            spill_folder=spill_folder,
        )
        self._collected: int | None = None  # which loader the model's set came from

    # Fit and validate: nothing

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Nothing to fit, nothing to validate: one training batch, as Lightning wants one."""
        return {**super().trainer_arguments, "limit_train_batches": 1, "limit_val_batches": 0}

    def setup(self, stage: str) -> None:
        """Refuse what would tear the set apart.

        Raises:
            ConfigError: several devices, or a precision that cannot be used.
        """
        super().setup(stage)
        if self.trainer.world_size > 1:
            raise ConfigError(
                f"{self.trainer.world_size} devices: each would see its own part of the set, and images are compared "
                "with all others. Set devices=1; for large sets use the batch job `anomalydino batched`."
            )

    def on_fit_start(self) -> None:
        """Say that fitting does nothing."""
        logger.warning("batched zero-shot has nothing to fit: go on with Engine.test or Engine.predict")

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> None:
        """Nothing is tuned on labelled data."""

    # Test and predict: collect, then score

    def on_test_start(self) -> None:
        """Start afresh."""
        self._start()
        self.warn_of_other_pixels(self.trainer.test_dataloaders)
        split = getattr(getattr(self.trainer, "datamodule", None), "val_split_mode", None)
        if getattr(split, "value", split) == "from_test":
            logger.warning(
                "val_split_mode=from_test took part of the test images away: the set that is compared is smaller. "
                "Set val_split_mode='same_as_test'."
            )

    def on_predict_start(self) -> None:
        """Start afresh."""
        self._start()
        self.warn_of_other_pixels(self.trainer.predict_dataloaders)

    def on_test_end(self) -> None:
        """Release the features."""
        self.model.clear()

    def on_predict_end(self) -> None:
        """Release the features."""
        self.model.clear()

    def on_test_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Before the first batch of a loader: encode all its images."""
        del batch, batch_idx
        self._collect(self.trainer.test_dataloaders, self.trainer.num_test_batches, dataloader_idx)

    def on_predict_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Before the first batch of a loader: encode all its images."""
        del batch, batch_idx
        self._collect(self.trainer.predict_dataloaders, self.trainer.num_predict_batches, dataloader_idx)

    def _start(self) -> None:
        self._collected = None
        self.model.clear()
        self.apply_thresholds()

    def _collect(self, loaders: Any, limits: Any, index: int) -> None:
        if self._collected == index:
            return
        loader = loaders[index] if isinstance(loaders, list | tuple) else loaders
        limit = limits[index] if isinstance(limits, list | tuple) else limits
        transform: Transform | None = getattr(self.pre_processor, "transform", None)
        images = self._shown(read_all(loader, limit, transform), count_images(loader, limit))
        with self.trainer.precision_plugin.forward_context():  # as for a step: Lightning wraps no other hook
            self.model.collect(images)
        self.model.require_set()
        self._collected = index
        store = self.model.store
        logger.info(
            "%d images, %d patches collected (%.2f GB on disk); foreground masks %s",
            len(store),
            store.patches,
            store.bytes_on_disk / 1e9,
            "on" if self.model.use_mask else "off",
        )
        self.model.match_all(lambda steps: self._shown(steps, len(steps), "Matching all images"))

    def _shown(
        self, items: Iterable[Item], total: int | None, title: str = "Collecting patch features"
    ) -> Iterator[Item]:
        """With a progress bar, unless the trainer's is turned off."""
        if self.trainer.progress_bar_callback is None:
            yield from items
        else:
            yield from track(items, title, total=total, transient=True)

    def _scored(self, batch: Batch) -> Prediction:
        """Against all other images of its loader."""
        pixels = to_uint8(batch.image)
        paths = batch.image_path or [None] * len(pixels)
        found = [self.model.store.find(image_key(path, own)) for path, own in zip(paths, pixels, strict=True)]
        known = iter(self.model.score_stored([index for index in found if index is not None]))
        detections = [
            self.model.score_stranger(own) if index is None else next(known)
            for index, own in zip(found, pixels, strict=True)
        ]
        return self.model.prediction(detections, like=batch.image)

    # Export

    def to_onnx(self, *args: Any, **kwargs: Any) -> Any:
        """A graph that scores the images of one input batch against each other; at least two of them.

        Raises:
            ConfigError: ``masking="auto"``, which votes over a set.
        """
        if self.model.masking == "auto":
            raise ConfigError(
                "masking='auto' votes over a set, a graph cannot: set masking to 'on' or 'off' to export. To score a "
                "large set, use Engine.predict or the batch job `anomalydino batched`."
            )
        return super().to_onnx(*args, **kwargs)

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Metrics that need no threshold."""
        return Evaluator(
            test_metrics=[
                AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
                F1Max(fields=["pred_score", "gt_label"], prefix="image_"),
                PixelAUROC(),
            ]
        )
