"""Few-shot AnomalyDINO as a torch module.

Legend: ``B`` images, ``H W`` pixels, ``h w`` patch grid, ``P = h * w``, ``D`` features, ``M`` bank rows.

Reference: Damm et al., AnomalyDINO, arXiv 2405.14529, section 3. Defaults are those of the official code; where
we differ stands in ``docs/deviations.md``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from anomalydino_plugin.backbone import Backbone
from anomalydino_plugin.bank_editing import BankEstimate, drop_images, estimate_bank, merge_banks
from anomalydino_plugin.detection import Detection, Prediction
from anomalydino_plugin.engines.choice import EngineName
from anomalydino_plugin.errors import BankError, ImageError
from anomalydino_plugin.few_shot.bank_module import BankModule
from anomalydino_plugin.few_shot.search import search_bank
from anomalydino_plugin.graph.scores import nearest_distance
from anomalydino_plugin.image_tensors import to_uint8
from anomalydino_plugin.kernels.rows import KERNELS, Kernel
from anomalydino_plugin.masking import MaskingDecision, Morphology, masking_test
from anomalydino_plugin.matching import BLOCK_ELEMENTS
from anomalydino_plugin.memory_bank import BankBuilder, MemoryBank, check_fingerprint, require_finite
from anomalydino_plugin.patch_model import (
    ImageSource,
    MapArea,
    Masking,
    PatchModel,
    as_image,
    check_choice,
    check_positive,
    naming,
    refuse_unusable,
)
from anomalydino_plugin.preprocessing import Geometry, RgbImage, rotate_image, rotation_angles
from anomalydino_plugin.scoring import DEFAULT_STATISTIC, SIGMA

_DECISIONS = "masking_decisions"  # note of a bank: the masking test of each of its images


class FewShotModel(PatchModel):
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
        block_elements: similarities that the kernel ``"torch"`` holds at a time.
        engine: runs the backbone; see ``engines.choice``.
        kernel: searches the bank; see ``search_rows``.

    Raises:
        ConfigError: a setting out of range.
    """

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
        engine: EngineName = "auto",
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__(
            backbone,
            resolution=resolution,
            masking=masking,
            morphology=morphology,
            statistic=statistic,
            map_area=map_area,
            sigma=sigma,
            batch_size=batch_size,
            engine=engine,
        )
        check_positive("k", k)
        check_positive("block_elements", block_elements)
        self.angles = rotation_angles(rotations)
        self.reference_masking = reference_masking
        self.k = k
        self.block_elements = block_elements
        check_choice("kernel", kernel, KERNELS)  # whether it can run is known where the rows are
        self.kernel: Kernel = kernel
        self.memory = BankModule(backbone.embed_dim).to(next(backbone.parameters()).device)
        self._builder = BankBuilder()
        self._decisions: dict[str, MaskingDecision] = {}  # of references not yet in the bank

    # Building the bank

    def fit(self, references: Iterable[ImageSource]) -> FewShotModel:
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
        return self._install(self._bank_of(references, first=0))

    def extend(self, references: Iterable[ImageSource]) -> FewShotModel:
        """Add normal images to the bank; scores equal those of a bank built from all of them.

        Args:
            references: as for ``fit``.

        Returns:
            The model itself.

        Raises:
            BankError: an image that is in the bank already, or as ``fit``.
            ImageError: an unreadable one.
        """
        old = self.bank
        numbers = [int(name) for name in old.image_ids if name.isdecimal()]
        return self._install(merge_banks([old, self._bank_of(references, first=max(numbers, default=-1) + 1)]))

    def drop(self, image_ids: Iterable[str]) -> FewShotModel:
        """Remove reference images by their id; scores equal those of a bank built without them.

        Raises:
            BankError: an image that is not there, nothing would be left, or the masking test on the image that is
                then the first says otherwise, so that the bank must be built again.
        """
        before, bank = self.use_mask, drop_images(self.bank, image_ids)
        after = masking_decision_of(bank)
        if self.masking == "auto" and after is not None and after.use_mask != before:
            raise BankError(
                f"without these images {bank.image_ids[0]!r} is the first reference, and its masking test says "
                f"{after.reason!r}: fit again on the images that stay, or set masking to 'on' or 'off'."
            )
        return self._install(bank)

    def estimate(self, height: int, width: int, references: int) -> BankEstimate:
        """Rows and bytes of a bank of so many references of one size, before it is built."""
        return estimate_bank(references, len(self.angles), self.plan_size(height, width).grid, self.backbone.embed_dim)

    def clear(self) -> None:
        """Forget bank and masking decision."""
        self._restart()
        self.memory.clear()

    def add_reference(self, image: RgbImage, image_id: str) -> None:
        """Encode all rotations of one reference image; the first one also decides ``masking="auto"``.

        Args:
            image: (H, W, 3) uint8 at original size.
            image_id: stable name.

        Raises:
            BankError: reference masking leaves nothing.
            ImageError: an image that cannot be used, by its name.
        """
        with naming(image_id):  # before it is turned: the border of a long strip grows with the square of its length
            plan = self.plan(image)
        views = [rotate_image(image, angle) if angle else image for angle in self.angles]
        features = self.encode([self.prepare(view) for view in views])
        require_finite(features, image_id)  # before the masking test, whose decomposition has no answer for NaN
        if self.masking == "auto":
            upright = features[0] if self.angles[0] == 0 else self.encode([self.prepare(image)])[0]
            self._decisions[image_id] = masking_test(upright.cpu().numpy(), plan.grid, self.morphology)
        for angle, view in zip(self.angles, features, strict=True):
            self._builder.add(
                view,
                plan.grid,
                image_id=image_id,
                size=plan.image_size,
                angle=angle,
                foreground=torch.from_numpy(self.foreground_found(view, plan.grid).reshape(-1)),
                keep_background=not self.reference_masking,
            )

    def freeze(self) -> MemoryBank:
        """Turn the references added so far into the bank.

        Raises:
            BankError: there are none.
        """
        return self._install(self._frozen()).bank

    def _bank_of(self, references: Iterable[ImageSource], first: int) -> MemoryBank:
        self._restart()
        try:
            for position, reference in enumerate(references, first):
                is_array = isinstance(reference, np.ndarray)
                name = str(position) if is_array else os.fspath(cast("str | os.PathLike[str]", reference))
                self.add_reference(as_image(reference), name)
            return self._frozen()
        finally:  # references before a failure are no part of a later bank
            self._restart()

    def _restart(self) -> None:
        self._builder, self._decisions = BankBuilder(), {}

    def _frozen(self) -> MemoryBank:
        decisions = json.dumps({name: list(decision) for name, decision in self._decisions.items()})
        return dataclasses.replace(self._builder.freeze(self.fingerprint()), notes={_DECISIONS: decisions})

    def _install(self, bank: MemoryBank) -> FewShotModel:
        self._restart()
        self.memory.put(bank)
        return self

    # The bank

    @property
    def masking_decision(self) -> MaskingDecision | None:
        """The masking test on the first reference image; ``None`` unless ``masking="auto"``."""
        if len(self.memory):
            return masking_decision_of(self.memory.get())
        return next(iter(self._decisions.values()), None)

    def fingerprint(self) -> dict[str, str]:
        """What the bank's rows depend on."""
        return {
            **super().fingerprint(),
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
        return self.memory.get()

    def set_bank(self, bank: MemoryBank) -> None:
        """Install a bank made with the same settings, as ``merge_banks`` and the subsampling functions return.

        Raises:
            BankError: made with other settings.
        """
        check_fingerprint(bank.fingerprint, self.fingerprint(), "given")
        self._install(bank)

    def save_bank(self, path: str | os.PathLike[str]) -> None:
        """Write bank and masking decisions as safetensors.

        Raises:
            BankError: the bank is empty.
        """
        self.bank.save(path)

    def load_bank(self, path: str | os.PathLike[str]) -> None:
        """Read a bank written by ``save_bank`` with the same settings.

        Raises:
            BankError: missing, damaged, or made with other settings.
        """
        self._install(MemoryBank.load(path, expected=self.fingerprint()))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(f"{prefix}memory._extra_state")
        if stored:  # a checkpoint of other settings would give wrong scores
            check_fingerprint(stored["fingerprint"], self.fingerprint(), "checkpoint")
        super()._load_from_state_dict(state_dict, prefix, *args)

    # Scoring

    def score(self, image: ImageSource) -> Detection:
        """Score one image.

        Args:
            image: a path, or (H, W, 3) uint8.

        Raises:
            BankError: the bank is empty.
            ImageError: the image cannot be used.
        """
        pixels = as_image(image)
        with contextlib.nullcontext() if isinstance(image, np.ndarray) else naming(os.fspath(image)):
            plan = self.plan(pixels)
            return self.score_features(self.encode([self.prepare(pixels)])[0], plan)

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
        self.memory.require()
        refuse_unusable(features)
        foreground = self.foreground(features, plan.grid)
        distances, rows = search_bank(
            features,
            self.memory.search_rows(self.kernel),
            foreground,
            k=self.k,
            block_elements=self.block_elements,
        )
        return self.detection(distances, rows, foreground, plan)

    def forward(self, images: Tensor) -> Prediction:
        """Score a batch as anomalib feeds it.

        Args:
            images: (B, 3, H, W) float in [0, 1], not resized, not normalised.
        """
        if torch.compiler.is_exporting():
            return self._traced(images)
        pixels = to_uint8(images)
        plan = self.plan(pixels[0])
        features = self.encode([self.prepare(image) for image in pixels])
        return self.prediction([self._scored(place, part, plan) for place, part in enumerate(features)], like=images)

    def _scored(self, place: int, features: Tensor, plan: Geometry) -> Detection:
        try:
            return self.score_features(features, plan)
        except ImageError as error:
            raise ImageError(f"image {place} of the batch: {error}") from error

    def _traced(self, images: Tensor) -> Prediction:
        features, foreground, sizes = self.traced_patches(images)
        queries = nn.functional.normalize(features, dim=2)
        return self.traced_prediction(nearest_distance(queries, self.memory.rows, self.k) * foreground, sizes)


def masking_decision_of(bank: MemoryBank) -> MaskingDecision | None:
    """The masking test on a bank's first reference image; ``None`` where it was not run."""
    stored = json.loads(bank.notes.get(_DECISIONS, "{}"))
    return next((MaskingDecision(*stored[name]) for name in bank.image_ids if name in stored), None)
