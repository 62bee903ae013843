"""Few-shot AnomalyDINO as a torch module.

Legend: ``B`` images, ``H W`` pixels, ``h w`` patch grid, ``P = h * w``, ``D`` features, ``M`` bank rows.

Reference: Damm et al., AnomalyDINO, arXiv 2405.14529, section 3. Defaults are those of the official code; where
we differ stands in ``docs/deviations.md``.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from anomalydino_plugin.backbone import Backbone
from anomalydino_plugin.decoding import read_image
from anomalydino_plugin.errors import BankError, ConfigError, ImageError
from anomalydino_plugin.few_shot.detection import Detection, Prediction
from anomalydino_plugin.masking import MaskingDecision, Morphology, masking_test, patch_foreground
from anomalydino_plugin.matching import BLOCK_ELEMENTS, nearest
from anomalydino_plugin.memory_bank import BankBuilder, MemoryBank, check_fingerprint
from anomalydino_plugin.preprocessing import (
    Geometry,
    RgbImage,
    normalise,
    plan_geometry,
    prepare_pixels,
    rotate_image,
    rotation_angles,
    to_uint8,
)
from anomalydino_plugin.scoring import DEFAULT_STATISTIC, SIGMA, anomaly_map, image_score, parse_statistic

Masking = Literal["auto", "on", "off"]
MapArea = Literal["crop", "official"]

PREPROCESSING = "pillow-bicubic-8bit/1"  # changes when the same image would give other pixels


class FewShotModel(nn.Module):
    """Scores images against a memory bank of a few normal ones.

    Args:
        backbone: from ``load_backbone``.
        resolution: smaller edge after resizing, pixels.
        rotations: ``"agnostic"`` (8 angles), ``"informed"`` (none) or angles in degrees.
        masking: foreground masks on test images: ``"on"``, ``"off"``, or ``"auto"`` (the masking test on the first
            reference image decides).
        reference_masking: keep only foreground patches of references, too.
        morphology: of masks; see ``masking.foreground_mask``.
        k: neighbours averaged for a patch distance.
        statistic: image score; see ``scoring.image_score``.
        map_area: where a crop happened, ``"crop"`` puts the map on the cropped area, ``"official"`` stretches it.
        sigma: smoothing of the map, pixels.
        batch_size: images encoded at a time.
        block_elements: similarities held at a time while matching.

    Raises:
        ConfigError: a setting out of range.
    """

    bank_rows: Tensor
    bank_sources: Tensor
    bank_foreground: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        resolution: int = 448,
        rotations: str | Sequence[float] = "agnostic",
        masking: Masking = "auto",
        reference_masking: bool = False,
        morphology: Morphology = "official",
        k: int = 1,
        statistic: str = DEFAULT_STATISTIC,
        map_area: MapArea = "crop",
        sigma: float = SIGMA,
        batch_size: int = 8,
        block_elements: int = BLOCK_ELEMENTS,
    ) -> None:
        super().__init__()
        _check_choice("masking", masking, ("auto", "on", "off"))
        _check_choice("morphology", morphology, ("official", "grid"))
        _check_choice("map_area", map_area, ("crop", "official"))
        parse_statistic(statistic)
        for name, value in (("k", k), ("batch_size", batch_size), ("block_elements", block_elements)):
            if value < 1:
                raise ConfigError(f"{name}={value}: expected at least 1.")
        if resolution < backbone.patch_size:
            raise ConfigError(f"resolution={resolution}: expected at least one patch, {backbone.patch_size} pixels.")
        self.backbone = backbone
        self.resolution = resolution
        self.angles = rotation_angles(rotations)
        self.masking = masking
        self.reference_masking = reference_masking
        self.morphology = morphology
        self.k = k
        self.statistic = statistic
        self.map_area = map_area
        self.sigma = sigma
        self.batch_size = batch_size
        self.block_elements = block_elements
        self.masking_decision: MaskingDecision | None = None
        self._builder = BankBuilder()
        self._provenance: dict[str, Any] = {}
        self.register_buffer("bank_rows", torch.empty(0, backbone.embed_dim))
        self.register_buffer("bank_sources", torch.empty(0, 4, dtype=torch.int32))
        self.register_buffer("bank_foreground", torch.empty(0, dtype=torch.bool))

    # Building the bank

    def fit(self, references: Iterable[str | os.PathLike[str] | RgbImage]) -> FewShotModel:
        """Build the bank from normal images, replacing any earlier one.

        Args:
            references: paths or (H, W, 3) uint8 arrays; paths name the rows, arrays are named by position.

        Returns:
            The model itself.

        Raises:
            BankError: no reference image, or one without foreground.
            ImageError: an unreadable one.
        """
        self.clear()
        for position, reference in enumerate(references):
            is_array = isinstance(reference, np.ndarray)
            name = str(position) if is_array else os.fspath(cast("str | os.PathLike[str]", reference))
            self.add_reference(_as_image(reference), name)
        self.freeze()
        return self

    def clear(self) -> None:
        """Forget bank and masking decision."""
        self._builder = BankBuilder()
        self.masking_decision = None
        self.set_bank(None)

    def add_reference(self, image: RgbImage, image_id: str) -> None:
        """Encode all rotations of one reference image; the first one also decides ``masking="auto"``.

        Args:
            image: (H, W, 3) uint8 at original size.
            image_id: stable name.

        Raises:
            BankError: reference masking leaves nothing.
        """
        views = [rotate_image(image, angle) if angle else image for angle in self.angles]
        plan = self.plan(image)
        features = self.encode([self.prepare(view) for view in views])
        if self.masking_decision is None and self.masking == "auto":
            upright = features[0] if self.angles[0] == 0 else self.encode([self.prepare(image)])[0]
            self.masking_decision = masking_test(upright.cpu().numpy(), plan.grid, self.morphology)
        for angle, view in zip(self.angles, features, strict=True):
            self._builder.add(
                view,
                plan.grid,
                image_id=image_id,
                size=plan.image_size,
                angle=angle,
                foreground=torch.from_numpy(self.foreground(view, plan.grid).reshape(-1)),
                keep_background=not self.reference_masking,
            )

    def freeze(self) -> MemoryBank:
        """Turn the references added so far into the bank.

        Raises:
            BankError: there are none.
        """
        bank = self._builder.freeze(self.fingerprint())
        self._builder = BankBuilder()
        self.set_bank(bank)
        return bank

    # The bank

    @property
    def use_mask(self) -> bool:
        """Whether test images are masked; with ``"auto"``, what the masking test said."""
        if self.masking == "auto":
            return self.masking_decision is not None and self.masking_decision.use_mask
        return self.masking == "on"

    def fingerprint(self) -> dict[str, str]:
        """What the bank's rows depend on."""
        return {
            "backbone": self.backbone.name,
            "weights": self.backbone.weights_sha256,
            "preprocessing": PREPROCESSING,
            "resolution": str(self.resolution),
            "rotations": json.dumps(self.angles),
            "reference_masking": str(self.reference_masking),
            "masking": f"{self.masking}/{self.morphology}",
        }

    @property
    def bank(self) -> MemoryBank:
        """The frozen bank.

        Raises:
            BankError: it is empty.
        """
        self._require_bank()
        return MemoryBank(self.bank_rows, self.bank_sources, self.bank_foreground, **self._provenance)

    def _require_bank(self) -> None:
        if len(self.bank_rows) == 0:
            raise BankError("memory bank is empty: fit the model on normal images, or load a bank, before scoring.")

    def set_bank(self, bank: MemoryBank | None) -> None:
        """Install a bank (``None`` empties it); see ``load_bank`` for the checked way."""
        device = self.bank_rows.device
        if bank is None:
            self.bank_rows = torch.empty(0, self.backbone.embed_dim, device=device)
            self.bank_sources = torch.empty(0, 4, dtype=torch.int32, device=device)
            self.bank_foreground = torch.empty(0, dtype=torch.bool, device=device)
            self._provenance = {}
            return
        self.bank_rows = bank.rows.to(device)
        self.bank_sources = bank.sources.to(device)
        self.bank_foreground = bank.foreground.to(device)
        self._provenance = {
            "image_ids": bank.image_ids,
            "angles": bank.angles,
            "sizes": bank.sizes,
            "fingerprint": bank.fingerprint,
            "notes": bank.notes,
        }

    def save_bank(self, path: str | os.PathLike[str]) -> None:
        """Write bank and masking decision as safetensors.

        Raises:
            BankError: the bank is empty.
        """
        dataclasses.replace(self.bank, notes={"masking_decision": json.dumps(self._plain_decision())}).save(path)

    def load_bank(self, path: str | os.PathLike[str]) -> None:
        """Read a bank written by ``save_bank`` with the same settings.

        Raises:
            BankError: missing, damaged, or made with other settings.
        """
        bank = MemoryBank.load(path, expected=self.fingerprint())
        self._restore_decision(json.loads(bank.notes.get("masking_decision", "null")))
        self.set_bank(bank)

    # Checkpoints: buffers of any length, and what is no tensor as plain types

    def get_extra_state(self) -> dict[str, Any]:
        """Provenance and masking decision as plain types, loadable with ``weights_only=True``."""
        return {"provenance": dict(self._provenance), "masking_decision": self._plain_decision()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Inverse of ``get_extra_state``; a bank made with other settings is refused.

        Raises:
            BankError: the settings differ.
        """
        if state["provenance"]:
            check_fingerprint(state["provenance"]["fingerprint"], self.fingerprint(), "checkpoint")
        self._provenance = dict(state["provenance"])
        self._restore_decision(state["masking_decision"])

    def _plain_decision(self) -> list[Any] | None:
        return None if self.masking_decision is None else list(self.masking_decision)

    def _restore_decision(self, plain: list[Any] | None) -> None:
        self.masking_decision = None if plain is None else MaskingDecision(*plain)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("bank_rows", "bank_sources", "bank_foreground"):
            stored = state_dict.get(prefix + name)
            if stored is not None:  # the bank's length is data, not architecture
                setattr(self, name, torch.empty_like(stored, device=self.bank_rows.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    # Scoring

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
        """
        parameter = next(self.backbone.parameters())
        batch = torch.from_numpy(np.stack(pixels))
        parts = [
            self.backbone(normalise(part.to(parameter.device)).to(parameter.dtype)).float()
            for part in torch.split(batch, self.batch_size)
        ]
        return torch.cat(parts)

    def foreground(self, features: Tensor, grid: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """(h, w) bool: foreground of one image from its (P, D) features; all true where masking is off."""
        if not self.use_mask:
            return np.ones(grid, dtype=bool)
        return patch_foreground(features.float().cpu().numpy(), grid, self.morphology).reshape(grid)

    def score(self, image: str | os.PathLike[str] | RgbImage) -> Detection:
        """Score one image.

        Args:
            image: a path, or (H, W, 3) uint8.

        Raises:
            BankError: the bank is empty.
            ImageError: the image cannot be used.
        """
        pixels = _as_image(image)
        features = self.encode([self.prepare(pixels)])[0]
        return self.score_features(features, self.plan(pixels))

    @torch.inference_mode()
    def score_features(self, features: Tensor, plan: Geometry) -> Detection:
        """Score one image from its patch features.

        Args:
            features: (P, D) float32, not normalised.
            plan: from ``plan``.

        Raises:
            BankError: the bank is empty.
            ImageError: features that are not finite.
        """
        self._require_bank()
        if not bool(torch.isfinite(features).all()):
            raise ImageError("patch features are not finite; check the image and the backbone's precision.")
        foreground = self.foreground(features, plan.grid)
        kept = torch.from_numpy(foreground.reshape(-1)).to(features.device)
        queries = nn.functional.normalize(features[kept].float(), dim=1)
        match = nearest(queries, self.bank_rows, k=self.k, block_elements=self.block_elements)
        distances = torch.zeros(len(kept), device=features.device)
        distances[kept] = match.distances.mean(dim=1)
        rows = torch.full((len(kept),), -1, device=features.device)
        rows[kept] = match.rows[:, 0]
        return Detection(
            score=float(image_score(distances, self.statistic)),
            distances=distances.cpu().numpy().reshape(plan.grid),
            foreground=foreground,
            matched_rows=rows.cpu().numpy().reshape(plan.grid),
            geometry=plan,
        )

    def anomaly_map(self, detection: Detection) -> np.ndarray[Any, np.dtype[np.float32]]:
        """(H, W) float32 anomaly map of a detection at the size of its image."""
        plan = detection.geometry
        coverage = plan.coverage if self.map_area == "crop" else (1.0, 1.0)
        distances = torch.from_numpy(detection.distances)
        return anomaly_map(distances, plan.image_size, sigma=self.sigma, coverage=coverage).numpy()

    def forward(self, images: Tensor) -> Prediction:
        """Score a batch as anomalib feeds it.

        Args:
            images: (B, 3, H, W) float in [0, 1], not resized, not normalised.
        """
        pixels = to_uint8(images)
        plan = self.plan(pixels[0])
        features = self.encode([self.prepare(image) for image in pixels])
        detections = [self.score_features(part, plan) for part in features]
        maps = torch.from_numpy(np.stack([self.anomaly_map(detection) for detection in detections]))
        scores = torch.tensor([detection.score for detection in detections])
        return Prediction(scores.to(images.device), maps[:, None].to(images.device))


def _as_image(source: str | os.PathLike[str] | RgbImage) -> RgbImage:
    """Read a path; check an array."""
    if not isinstance(source, np.ndarray):
        return read_image(source)
    if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
        raise ImageError(
            f"image array of shape {source.shape} and dtype {source.dtype}: expected (H, W, 3) uint8 RGB. "
            "Pass a path to let read_image convert it."
        )
    return source


def masking_of(value: Masking | bool) -> Masking:
    """YAML reads a bare ``on`` and ``off`` as booleans; take them for what was written."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return value


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}.")
