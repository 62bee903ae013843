"""Batched zero-shot AnomalyDINO as a torch module.

Legend: ``B`` images of a batch, ``N`` of the set, ``H W`` pixels, ``h w`` patch grid, ``P = h * w``, ``D`` features.

Reference: Damm et al., AnomalyDINO, arXiv 2405.14529, batched zero-shot: no normal image is needed; each patch is
compared with the patches of all other images of the test set. Mode ``"musc"`` follows Li et al., MuSc, arXiv
2401.16753, in how distances are aggregated over images.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from anomalydino_plugin.backbone import Backbone
from anomalydino_plugin.batched.feature_store import BLOCK_ROWS, DEFAULT_BUDGET, FeatureStore, FeatureType
from anomalydino_plugin.batched.whole_set import Steps, match_blocks, set_bytes
from anomalydino_plugin.detection import Detection, Prediction
from anomalydino_plugin.engines.choice import EngineName
from anomalydino_plugin.errors import ConfigError, InputError
from anomalydino_plugin.graph.mutual import mutual_distance
from anomalydino_plugin.image_tensors import to_uint8
from anomalydino_plugin.kernels.rows import KERNELS, Kernel, block_rows, kernel_for, search_rows
from anomalydino_plugin.masking import Morphology, foreground_and_test, foreground_or_all, vote_on_masks
from anomalydino_plugin.mutual import MODES, Mode, MutualMatch, RunningLowest, lowest_count
from anomalydino_plugin.patch_model import (
    ImageSource,
    MapArea,
    Masking,
    PatchModel,
    as_image,
    check_choice,
    naming,
    refuse_unusable,
)
from anomalydino_plugin.preprocessing import Geometry, RgbImage
from anomalydino_plugin.scoring import DEFAULT_STATISTIC, SIGMA


class BatchedModel(PatchModel):
    """Scores the images of a set against each other.

    Args:
        backbone: from ``load_backbone``.
        mode: ``"official"``: mean of the lowest 0.1 % of all patch distances; ``"musc"``: of the lowest 30 % of the
            images' minima.
        share: in place of 0.1 % or 30 %.
        resolution: smaller edge after resizing, pixels.
        masking: foreground masks: ``"on"``, ``"off"``, or ``"auto"`` (on where the masking test passes on more than
            half of the images; there is no reference image to ask).
        morphology: of masks; see ``masking.foreground_mask``.
        statistic: image score; see ``scoring.image_score``.
        map_area: where a crop happened, ``"crop"`` puts the map on the cropped area, ``"official"`` stretches it.
        sigma: smoothing of the map, pixels.
        batch_size: images encoded at a time.
        feature_type: of the features kept, ``"float32"`` or ``"float16"``.
        memory_budget: bytes of features kept in memory, the rest goes to disk; and of what matching a whole set at
            once may take beside them.
        spill_folder: for that; by default the system's temporary folder.
        engine: runs the backbone; see ``engines.choice``.
        kernel: matches patches; see ``search_rows``.

    Raises:
        ConfigError: a setting out of range.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        mode: Mode = "official",
        share: float | None = None,
        resolution: int = 448,
        masking: Masking = "auto",
        morphology: Morphology = "official",
        statistic: str = DEFAULT_STATISTIC,
        map_area: MapArea = "crop",
        sigma: float = SIGMA,
        batch_size: int = 8,
        feature_type: FeatureType = "float32",
        memory_budget: int = DEFAULT_BUDGET,
        spill_folder: str | None = None,
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
        check_choice("mode", mode, MODES)
        lowest_count(mode, 1, 1, share)  # refuses a share out of range now, not after the first pass
        self.mode: Mode = mode
        self.share = share
        check_choice("kernel", kernel, KERNELS)  # whether it can run is known where the rows are
        self.kernel: Kernel = kernel
        self.memory_budget = memory_budget
        self._feature_type, self._spill_folder = feature_type, spill_folder
        self.store = self._new_store()

    # The set

    def score_set(self, images: Sequence[ImageSource]) -> list[Detection]:
        """Score images against each other.

        Args:
            images: at least two paths or (H, W, 3) uint8 arrays, of any sizes.

        Returns:
            A detection for each; ``matched_rows`` count patches over the whole set, see ``source``.

        Raises:
            InputError: fewer than two images.
            ImageError: an unreadable one.
        """
        names = [
            str(place) if isinstance(image, np.ndarray) else os.fspath(image) for place, image in enumerate(images)
        ]
        self.collect(zip(names, map(as_image, images), strict=True))
        self.match_all()
        return self.score_stored(range(len(names)))

    def collect(self, images: Iterable[tuple[str, RgbImage]]) -> None:
        """Encode a set, replacing an earlier one.

        Args:
            images: key and (H, W, 3) uint8 of each; neighbours of one size are encoded together.

        Raises:
            ImageError: an image that cannot be used, named by its key.
        """
        self.clear()
        waiting: list[tuple[str, Geometry, RgbImage]] = []
        for key, image in images:
            with naming(key):
                item = key, self.plan(image), self.prepare(image)
            if waiting and (waiting[0][2].shape != item[2].shape or len(waiting) == self.batch_size):
                self._encode_waiting(waiting)
                waiting = []
            waiting.append(item)
        if waiting:
            self._encode_waiting(waiting)

    def clear(self) -> None:
        """Forget the set."""
        self.store.close()
        self.store = self._new_store()

    def _new_store(self) -> FeatureStore:
        return FeatureStore(self.backbone.embed_dim, self._feature_type, self.memory_budget, self._spill_folder)

    def _encode_waiting(self, waiting: list[tuple[str, Geometry, RgbImage]]) -> None:
        for (key, plan, _), features in zip(waiting, self.encode([item[2] for item in waiting]), strict=True):
            with naming(key):
                refuse_unusable(features)
            foreground, passes = self._mask_and_vote(features, plan.grid)
            self.store.add(key, nn.functional.normalize(features, dim=1), foreground, passes, plan)

    def _mask_and_vote(
        self, features: Tensor, grid: tuple[int, int]
    ) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.bool_]], bool | None]:
        """Foreground of an image, and whether the masking test passes on it."""
        if self.masking == "off":
            return np.ones(grid, dtype=bool), None
        mask, decision = foreground_and_test(features.float().cpu().numpy(), grid, self.morphology)
        return foreground_or_all(mask).reshape(grid), decision.use_mask if self.masking == "auto" else None

    @property
    def use_mask(self) -> bool:
        """Whether patches are masked; with ``"auto"``, the vote of the collected images."""
        if self.masking != "auto":
            return self.masking == "on"
        return vote_on_masks(bool(image.masking) for image in self.store.images)

    def source(self, row: int) -> tuple[str, int, int]:
        """Key of the image, grid row and column of a matched row.

        Raises:
            ConfigError: no such row.
        """
        if not 0 <= row < self.store.patches:
            raise ConfigError(f"row {row}: expected 0 to {self.store.patches - 1}.")
        starts = [image.first_row for image in self.store.images]
        image = self.store.images[int(np.searchsorted(starts, row, side="right")) - 1]
        columns = image.geometry.grid[1]
        return image.key, (row - image.first_row) // columns, (row - image.first_row) % columns

    # Scoring

    @torch.inference_mode()
    def match_all(self, steps: Steps = iter) -> bool:
        """Match all collected images at once, where the kernel compares each pair once and the memory budget allows.

        ``score_stored`` then finds its matches ready; they are the same without.

        Args:
            steps: wraps the sequence of steps, for a progress bar.

        Returns:
            Whether it was done.

        Raises:
            InputError: the set has fewer than two images.
        """
        self.require_set()
        lengths = [image.foreground.size for image in self.store.images]
        width, device = self.backbone.embed_dim, next(self.backbone.parameters()).device
        if (
            self.mode != "official"
            or not kernel_for(self.kernel, device.type, width).startswith("tiles")
            or set_bytes(lengths, width, self.mode, self.share) + self.store.bytes_to_copy > self.memory_budget
        ):
            return False
        blocks = list(self.store.blocks(BLOCK_ROWS, device))
        self.store.matches = match_blocks(blocks, self.mode, self.share, self.kernel, steps)
        return True

    @torch.inference_mode()
    def score_stored(self, indices: Iterable[int]) -> list[Detection]:
        """Score images of the collected set against all others, in groups that fit into ``memory_budget``.

        Each block of references is read once for a group.

        Raises:
            InputError: the set has fewer than two images.
        """
        chosen = list(indices)
        own = [self.store.images[index] for index in chosen]
        ready = self.store.matches
        matches = (
            [ready[index] for index in chosen]
            if ready is not None
            else [match for group in self._groups(chosen) for match in self._match(group)]
        )
        return [
            self._detection(match, image.foreground, image.geometry) for match, image in zip(matches, own, strict=True)
        ]

    @torch.inference_mode()
    def score_stranger(self, image: RgbImage) -> Detection:
        """Score an image that is not in the collected set against all of it.

        Args:
            image: (H, W, 3) uint8.

        Raises:
            InputError: the set is empty.
        """
        plan = self.plan(image)
        features = self.encode([self.prepare(image)])[0]
        refuse_unusable(features)
        foreground, _ = self._mask_and_vote(features, plan.grid)
        (match,) = self._match([(None, nn.functional.normalize(features, dim=1))])
        return self._detection(match, foreground, plan)

    def _groups(self, indices: list[int]) -> Iterator[list[tuple[int | None, Tensor]]]:
        """Images, with their features, whose lowest distances fit into the memory budget together."""
        patches = max((image.foreground.size for image in self.store.images), default=1)
        count = lowest_count(self.mode, len(self.store) - 1, self.store.patches - patches, self.share)
        together = max(1, self.memory_budget // (4 * patches * (self.backbone.embed_dim + count)))
        for start in range(0, len(indices), together):
            yield [(index, self.store.features(index)) for index in indices[start : start + together]]

    def _match(self, queries: Sequence[tuple[int | None, Tensor]]) -> list[MutualMatch]:
        """Stream all images past the queries; a query with an index leaves out its own image."""
        device = next(self.backbone.parameters()).device
        running = []
        for index, features in queries:
            others = len(self.store) - (index is not None)
            patches = self.store.patches - (len(features) if index is not None else 0)
            count = lowest_count(self.mode, others, patches, self.share)
            running.append((index, RunningLowest(features.to(device), count, self.mode)))
        for block in self.store.blocks(block_rows(self.kernel, str(device), self.backbone.embed_dim), device):
            rows = search_rows(block.rows, block.lengths, self.kernel)
            for index, lowest in running:
                last = block.first + len(block.lengths)
                own = index - block.first if index is not None and block.first <= index < last else None
                lowest.update(rows, block.lengths, self.store.images[block.first].first_row, own)
            del rows, block  # before the next one is read and laid out beside them
        return [lowest.result() for _, lowest in running]

    def _detection(
        self, match: MutualMatch, foreground: np.ndarray[tuple[int, ...], np.dtype[np.bool_]], plan: Geometry
    ) -> Detection:
        if not self.use_mask:
            foreground = np.ones(plan.grid, dtype=bool)
        kept = torch.from_numpy(foreground.reshape(-1)).to(match.distances.device)
        return self.detection(match.distances * kept, match.rows.masked_fill(~kept, -1), foreground, plan)

    def forward(self, images: Tensor) -> Prediction:
        """Score the images of one batch against each other.

        Args:
            images: (B, 3, H, W) float in [0, 1], B >= 2, not resized, not normalised.

        Raises:
            InputError: a single image.
        """
        if torch.compiler.is_exporting():
            return self._traced(images)
        self.collect((str(index), image) for index, image in enumerate(to_uint8(images)))
        self.match_all()
        predicted = self.prediction(self.score_stored(range(len(images))), like=images)
        self.clear()
        return predicted

    def _traced(self, images: Tensor) -> Prediction:
        if self.masking == "auto":
            raise ConfigError("masking='auto' votes over a set, a graph cannot: set masking to 'on' or 'off'.")
        features, foreground, sizes = self.traced_patches(images)
        rows = nn.functional.normalize(features, dim=2)
        return self.traced_prediction(mutual_distance(rows, self.mode, self.share) * foreground, sizes)

    def require_set(self) -> None:
        """Raise ``InputError`` unless at least two images were collected."""
        if len(self.store) < 2:
            raise InputError(
                f"batched zero-shot compares the images of a set with each other: expected at least two, found "
                f"{len(self.store)}. Add images, or use the few-shot model with a normal reference image."
            )
