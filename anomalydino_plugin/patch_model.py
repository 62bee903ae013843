"""What few-shot and batched zero-shot share: images to patch features, patch distances to scores and maps.

Legend: ``B`` images, ``H W`` pixels, ``h w`` patch grid, ``P = h * w``, ``D`` features.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anomalydino_plugin.backbone import Backbone
from anomalydino_plugin.decoding import read_image
from anomalydino_plugin.detection import Detection, Prediction, detect
from anomalydino_plugin.engines.choice import Engine, EngineName, engine_for, load_engine, reduced_precision
from anomalydino_plugin.errors import ConfigError, ImageError
from anomalydino_plugin.graph.foreground import first_component, foreground
from anomalydino_plugin.graph.images import Sizes, plan_sizes, prepare
from anomalydino_plugin.graph.scores import anomaly_map as traced_map
from anomalydino_plugin.graph.scores import image_score as traced_score
from anomalydino_plugin.graph.tokens import patch_features
from anomalydino_plugin.image_tensors import normalise, on_device
from anomalydino_plugin.masking import (
    CENTRE_MIN_SHARE,
    FOREGROUND_THRESHOLD,
    MaskingDecision,
    Morphology,
    foreground_or_all,
    patch_foreground,
)
from anomalydino_plugin.preprocessing import Geometry, RgbImage, plan_geometry, prepare_pixels
from anomalydino_plugin.scoring import DEFAULT_STATISTIC, SIGMA, anomaly_map, parse_statistic

Masking = Literal["auto", "on", "off"]
MapArea = Literal["crop", "official"]
PREPROCESSING = "pillow-bicubic-8bit/1"  # changes when the same image would give other pixels
ImageSource = str | os.PathLike[str] | RgbImage


class PatchModel(nn.Module):
    """Encoder, masks, scores and maps; subclasses say what patches are compared with.

    Args:
        backbone: from ``load_backbone``.
        resolution: smaller edge after resizing, pixels.
        masking: foreground masks on test images: ``"on"``, ``"off"``, or ``"auto"`` (the masking test decides once).
        morphology: of masks; see ``masking.foreground_mask``.
        statistic: image score; see ``scoring.image_score``.
        map_area: where a crop happened, ``"crop"`` puts the map on the cropped area, ``"official"`` stretches it.
        sigma: smoothing of the map, pixels.
        batch_size: images encoded at a time.
        engine: runs the backbone; see ``engines.choice``.

    Raises:
        ConfigError: a setting out of range.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        resolution: int = 448,
        masking: Masking = "auto",
        morphology: Morphology = "official",
        statistic: str = DEFAULT_STATISTIC,
        map_area: MapArea = "crop",
        sigma: float = SIGMA,
        batch_size: int = 8,
        engine: EngineName = "auto",
    ) -> None:
        super().__init__()
        check_choice("masking", masking, ("auto", "on", "off"))
        check_choice("morphology", morphology, ("official", "grid"))
        check_choice("map_area", map_area, ("crop", "official"))
        parse_statistic(statistic)
        check_positive("batch_size", batch_size)
        if resolution < backbone.patch_size:
            raise ConfigError(f"resolution={resolution}: expected at least one patch, {backbone.patch_size} pixels.")
        if sigma < 0:
            raise ConfigError(f"sigma={sigma}: expected 0 (no smoothing) or more pixels.")
        self.backbone = backbone
        self.resolution = resolution
        self.masking = masking
        self.morphology = morphology
        self.statistic = statistic
        self.map_area = map_area
        self.sigma = sigma
        self.batch_size = batch_size
        engine_for(engine, backbone)
        self.engine: EngineName = engine
        self._engines: dict[tuple[object, ...], Engine] = {}

    @property
    def masking_decision(self) -> MaskingDecision | None:
        """What the masking test said; ``None`` before it ran, and unless ``masking="auto"``."""
        return None

    @property
    def use_mask(self) -> bool:
        """Whether test images are masked; with ``"auto"``, what the masking test said."""
        if self.masking == "auto":
            return self.masking_decision is not None and self.masking_decision.use_mask
        return self.masking == "on"

    # Images to patches

    def fingerprint(self) -> dict[str, str]:
        """What patch features depend on; see ``feature_fingerprint``."""
        return feature_fingerprint(
            self.backbone.name, self.backbone.weights_sha256, self.resolution, reduced_precision(self.engine)
        )

    def plan(self, image: RgbImage) -> Geometry:
        """Sizes of image and patch grid."""
        return self.plan_size(image.shape[0], image.shape[1])

    def plan_size(self, height: int, width: int) -> Geometry:
        """The same from the image's size in pixels."""
        return plan_geometry(height, width, self.resolution, self.backbone.patch_size)

    def prepare(self, image: RgbImage) -> RgbImage:
        """Resize and crop, 8 bit."""
        return prepare_pixels(image, self.resolution, self.backbone.patch_size)

    @torch.inference_mode()
    def encode(self, pixels: Sequence[RgbImage]) -> Tensor:
        """Patch features of prepared images of one size.

        Args:
            pixels: (h * patch_size, w * patch_size, 3) uint8 each.

        Returns:
            (B, P, D) float32.

        Raises:
            ImageError: no images, or of several sizes.
        """
        sizes = {image.shape for image in pixels}
        if len(sizes) != 1:
            found = ", ".join(map(str, sorted(sizes))) or "none"
            raise ImageError(f"images to encode: {found}; expected at least one, all of one size. Group them by size.")
        device = next(self.backbone.parameters()).device
        engine = self._loaded_engine()
        parts = (pixels[start : start + self.batch_size] for start in range(0, len(pixels), self.batch_size))
        return torch.cat([engine(normalise(on_device(part, device))) for part in parts])

    def _loaded_engine(self) -> Engine:
        """Made on first use: the backbone may have been moved, rounded or loaded since."""
        name, parameter = engine_for(self.engine, self.backbone), next(self.backbone.parameters())
        version = 0 if parameter.is_inference() else parameter._version
        key = name, torch.get_num_threads(), parameter.device, parameter.dtype, parameter.data_ptr(), version
        if key not in self._engines:
            self._engines = {key: load_engine(name, self.backbone)}
        return self._engines[key]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PatchModel:
        self._engines.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self._engines.clear()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles load their engine again."""
        return {**self.__dict__, "_engines": {}}

    def foreground(self, features: Tensor, grid: tuple[int, int]) -> NDArray[np.bool_]:
        """(h, w) bool: foreground of one image from its (P, D) features; all true where masking is off or hides all."""
        return foreground_or_all(self.foreground_found(features, grid))

    def foreground_found(self, features: Tensor, grid: tuple[int, int]) -> NDArray[np.bool_]:
        """The same as the mask says it: all false where there is no foreground."""
        if not self.use_mask:
            return np.ones(grid, dtype=bool)
        return patch_foreground(features.float().cpu().numpy(), grid, self.morphology).reshape(grid)

    # Patch distances to results

    def detection(self, distances: Tensor, rows: Tensor, foreground: NDArray[np.bool_], plan: Geometry) -> Detection:
        """Score one image.

        Args:
            distances: (P,) float32, 0 where masked.
            rows: (P,) int64, what each patch matched; -1 where it matched nothing.
            foreground: (h, w) bool.
            plan: sizes.
        """
        return detect(distances, rows, foreground, plan, self.statistic)

    def anomaly_map(self, detection: Detection, size: tuple[int, int] | None = None) -> NDArray[np.float32]:
        """(H, W) float32 anomaly map of a detection, by default at the size of its image."""
        plan = detection.geometry
        coverage = plan.coverage if self.map_area == "crop" else (1.0, 1.0)
        distances = torch.from_numpy(detection.distances)
        with torch.autocast("cpu", enabled=False):  # the encoder alone runs in reduced precision
            return anomaly_map(distances, size or plan.image_size, sigma=self.sigma, coverage=coverage).numpy()

    def prediction(self, detections: Sequence[Detection], like: Tensor) -> Prediction:
        """Detections as a batch, maps at the size of the batch's images.

        Args:
            detections: B of them.
            like: (B, 3, H, W), the images as the host framework passed them.
        """
        size = (like.shape[-2], like.shape[-1])
        maps = torch.from_numpy(np.stack([self.anomaly_map(detection, size) for detection in detections]))
        scores = torch.tensor([detection.score for detection in detections], dtype=torch.float32)
        return Prediction(scores.to(like.device), maps[:, None].to(like.device))

    # The same inside an exported graph

    def traced_patches(self, images: Tensor) -> tuple[Tensor, Tensor, Sizes]:
        """Patch features (B, P, D), foreground (B, P) as 0 and 1, and sizes of a batch of (B, 3, H, W) images."""
        sizes = plan_sizes(images.shape[2], images.shape[3], self.resolution, self.backbone.patch_size)
        features = patch_features(self.backbone, prepare(images, sizes, self.backbone.patch_size), sizes.grid)
        if not self.use_mask:
            return features, torch.ones_like(features[..., 0]), sizes
        kept = foreground(
            first_component(features), sizes.grid, FOREGROUND_THRESHOLD, CENTRE_MIN_SHARE, self.morphology
        )
        return features, kept, sizes

    def traced_prediction(self, distances: Tensor, sizes: Sizes) -> Prediction:
        """Scores and maps from (B, P) distances."""
        scores = traced_score(distances, *parse_statistic(self.statistic))
        crop = self.map_area == "crop"
        return Prediction(scores, traced_map(distances, sizes, self.sigma, self.backbone.patch_size, crop=crop))


def feature_fingerprint(
    backbone: str, weights_sha256: str, resolution: int, precision: str | None = None
) -> dict[str, str]:
    """What patch features depend on; only those with equal ones can be compared.

    Args:
        backbone: name.
        weights_sha256: of its weights.
        resolution: smaller edge after resizing, pixels.
        precision: of the engine, where it is not float32.
    """
    return {
        **({} if precision is None else {"precision": precision}),
        "backbone": backbone,
        "weights": weights_sha256,
        "preprocessing": PREPROCESSING,
        "resolution": str(resolution),
    }


def refuse_unusable(features: Tensor) -> None:
    """Features that are not finite would pass any threshold.

    Raises:
        ImageError: some are NaN or infinite.
    """
    if not bool(torch.isfinite(features).all()):
        raise ImageError("patch features are not finite; check the image and the backbone's precision.")


def as_image(source: ImageSource) -> RgbImage:
    """Read a path; check an array.

    Raises:
        ImageError: unreadable, or an array that is not (H, W, 3) uint8.
    """
    if not isinstance(source, np.ndarray):
        return read_image(source)
    if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
        raise ImageError(
            f"image array of shape {source.shape} and dtype {source.dtype}: expected (H, W, 3) uint8 RGB. "
            "Pass a path to let read_image convert it."
        )
    return source


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
    """Errors about an image that do not know its name, with the name in front."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{key!r}: {error}") from error


def masking_of(value: Masking | bool) -> Masking:
    """YAML reads a bare ``on`` and ``off`` as booleans; take them for what was written."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return value


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ``ConfigError`` unless the value is one of the choices."""
    if value not in choices:
        raise ConfigError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}.")


def check_positive(name: str, value: int) -> None:
    """Raise ``ConfigError`` unless the value is at least 1."""
    if value < 1:
        raise ConfigError(f"{name}={value}: expected at least 1.")
