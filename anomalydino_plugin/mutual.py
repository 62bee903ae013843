"""Mutual scoring: how far each patch of an image is from the patches of all other images of the set.

Legend: ``Q`` query patches, ``R`` reference patches of a block, ``M`` all reference patches, ``N`` images, ``D``
features, ``n`` lowest distances kept.

The other images come in blocks; what is kept of them is the n lowest distances of every query, so memory does not grow
with the set. All rows are L2-normalised, cosine distance is ``1 - q . r``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anomalydino_plugin.errors import ConfigError, InputError
from anomalydino_plugin.full_precision import full_precision
from anomalydino_plugin.kernels.rows import NEVER, Lowest, SearchRows

Mode = Literal["official", "musc"]
MODES: tuple[Mode, ...] = ("official", "musc")

LOWEST_PATCHES = 0.001  # AnomalyDINO, batched zero-shot, and its official code: the lowest 0.1 % of all patch distances
LOWEST_IMAGES = 0.3  # MuSc, arXiv 2401.16753: the lowest 30 % of the images' minima
_ROWS_AT_ONCE = 8192  # whose similarities are held, unless one image has more
_GROUP = 16  # similarities compared as one before the partial sort
_NO_ROW = torch.iinfo(torch.int64).max  # any row comes before it


def lowest_count(mode: Mode, images: int, patches: int, share: float | None = None) -> int:
    """How many lowest distances a patch's distance is the mean of.

    ``"official"`` averages the patch distances below the floor(share * M)-th smallest: the floor(share * M) - 1 lowest.
    ``"musc"`` averages the floor(share * (N - 1)) lowest of the other images' minima. At least one in both.

    Args:
        mode: see above.
        images: N - 1, the other images.
        patches: M, patches of the other images.
        share: in (0, 1]; by default that of the mode's paper.

    Raises:
        InputError: there is no other image.
        ConfigError: an unknown mode or a share outside (0, 1].
    """
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r}: expected one of {', '.join(map(repr, MODES))}.")
    if images < 1:
        raise InputError(
            "batched zero-shot compares the images of a set with each other: expected at least two, found one. Add "
            "images, or use the few-shot model with a normal reference image."
        )
    share = share if share is not None else LOWEST_PATCHES if mode == "official" else LOWEST_IMAGES
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"share={share}: expected more than 0 and at most 1.")
    count = math.floor(share * patches) - 1 if mode == "official" else math.floor(share * images)
    return max(1, count)


class MutualMatch(NamedTuple):
    """What each query patch came out at.

    Attributes:
        distances: (Q,) float32, mean of the n lowest distances, in [0, 2].
        rows: (Q,) int64, the nearest reference patch, counted over all blocks in their order.
    """

    distances: Tensor
    rows: Tensor


class RunningLowest:
    """The n lowest distances of every query patch over the blocks seen so far.

    Args:
        queries: (Q, D) float32, L2-normalised.
        count: n.
        mode: ``"official"`` keeps distances to patches, ``"musc"`` to images.
    """

    def __init__(self, queries: Tensor, count: int, mode: Mode = "official") -> None:
        self._queries, self._count, self._mode = queries, count, mode
        # Similarities, whose highest are the lowest distances. Ascending, so that every row is a heap too, as the CPU's
        # kernels want it.
        self._highest = queries.new_full((len(queries), count), NEVER)
        self._best = queries.new_full((len(queries),), NEVER)
        self._rows = torch.full((len(queries),), _NO_ROW, dtype=torch.int64, device=queries.device)
        self._seen = 0

    def update(
        self, references: Tensor | SearchRows, images: Sequence[int], first_row: int, leave_out: int | None = None
    ) -> None:
        """Take in a block of images.

        Args:
            references: (R, D) float32, L2-normalised; or what ``search_rows`` made of them and ``images``.
            images: patches of each image of the block, summing to R.
            first_row: number of the block's first patch, for ``MutualMatch.rows``.
            leave_out: position in the block of the image that the queries are from.
        """
        others = [length for place, length in enumerate(images) if place != leave_out]
        self._seen += len(others) if self._mode == "musc" else sum(others)
        by_image = self._mode == "musc"
        layout = references.layout if isinstance(references, SearchRows) else None
        left_out = -1 if leave_out is None else leave_out
        with full_precision(self._queries.device.type):
            if layout is not None and layout.take_in(
                self._queries, self._lowest, first_row, left_out, by_image=by_image
            ):
                return
            rows = references.rows if isinstance(references, SearchRows) else references
            start = 0
            for place, part in _parts(images, leave_out):
                end = start + sum(part)
                if place != leave_out:
                    self._take_in(rows[start:end], part, first_row + start)
                start = end

    @property
    def _lowest(self) -> Lowest:
        return Lowest(self._highest, self._best, self._rows)

    def _take_in(self, references: Tensor, images: Sequence[int], first_row: int) -> None:
        if not len(references):
            return
        similarity = self._queries @ references.T
        groups = _group_maxima(similarity)
        self._note_nearest(similarity, groups, first_row)
        kept = (
            _highest(similarity, groups, self._count)
            if self._mode == "official"
            else torch.stack([part.amax(dim=1) for part in torch.split(similarity, list(images), dim=1)], dim=1)
        )
        joined = torch.cat([self._highest, kept], dim=1)
        self._highest = joined.topk(self._count, dim=1).values.flip(1)

    def result(self) -> MutualMatch:
        """Distances over all blocks."""
        available = min(self._count, self._seen)
        highest = self._highest.sort(dim=1, descending=True).values[:, :available]
        distances = (1.0 - highest.double()).clamp(0.0, 2.0).mean(dim=1)
        return MutualMatch(distances.float(), self._rows)

    def _note_nearest(self, similarity: Tensor, groups: Tensor, first_row: int) -> None:
        values, group = groups.max(dim=1)
        members = group[:, None] * _GROUP + torch.arange(_GROUP, device=similarity.device)
        members = members.clamp(max=similarity.shape[1] - 1)
        row = members.gather(1, similarity.gather(1, members).argmax(dim=1, keepdim=True))[:, 0]
        better = values > self._best
        self._best = torch.where(better, values, self._best)
        self._rows = torch.where(better, row + first_row, self._rows)


class SetBlock(NamedTuple):
    """Neighbouring images of a set whose images are all queries and references.

    Attributes:
        rows: theirs, from ``search_rows``.
        first_row: number of the first, counted over the set.
        running: one for each image, whose queries are the image's rows.
    """

    rows: SearchRows
    first_row: int
    running: list[RunningLowest]


def _parts(images: Sequence[int], leave_out: int | None) -> Iterator[tuple[int, list[int]]]:
    """Neighbouring images to compare at once, each part with the place of its first; the one left out is a part."""
    first, part = 0, list[int]()
    for place, length in enumerate(images):
        if part and (sum(part) + length > _ROWS_AT_ONCE or leave_out in (place, first)):
            yield first, part
            first, part = place, []
        part.append(length)
    if part:
        yield first, part


def update_each_other(one: SetBlock, other: SetBlock) -> None:
    """Take two blocks of different images into each other: as ``update`` both ways, with half the products if it can.

    The similarity of two patches is the same from either side. Kernels that hold a tile of them in registers take the
    maxima in both directions before they let go of it.
    """
    layout = one.rows.layout
    official = all(lowest._mode == "official" for lowest in [*one.running, *other.running])
    done = (
        official
        and layout is not None
        and layout.take_in_each_other(
            other.rows.layout,
            [lowest._lowest for lowest in one.running],
            [lowest._lowest for lowest in other.running],
            (one.first_row, other.first_row),
        )
    )
    for block, opposite in ((one, other), (other, one)):
        for lowest in block.running:
            if done:
                lowest._seen += len(opposite.rows.rows)
            else:
                lowest.update(opposite.rows, opposite.rows.lengths, opposite.first_row)


def _group_maxima(similarity: Tensor) -> Tensor:
    """(Q, ceil(R / 16)): the largest of each 16 neighbours."""
    missing = -similarity.shape[1] % _GROUP
    padded = F.pad(similarity, (0, missing), value=NEVER) if missing else similarity
    return padded.view(len(similarity), -1, _GROUP).amax(dim=2)


def _highest(similarity: Tensor, groups: Tensor, count: int) -> Tensor:
    """The highest ``count`` of each row, in any order.

    A value among the highest n lies in one of the n groups with the highest maxima, so the partial sort runs on those.
    """
    if groups.shape[1] <= count:
        return similarity.topk(min(count, similarity.shape[1]), dim=1).values
    chosen = groups.topk(count, dim=1).indices
    members = (chosen[:, :, None] * _GROUP + torch.arange(_GROUP, device=similarity.device)).flatten(1)
    outside = members >= similarity.shape[1]
    values = similarity.gather(1, members.clamp(max=similarity.shape[1] - 1))
    return values.masked_fill(outside, NEVER).topk(count, dim=1).values
