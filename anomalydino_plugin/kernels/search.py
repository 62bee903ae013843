"""The compiled search behind plain functions: packs, cuts queries into chunks, runs them on threads.

Imported only where the kernel is used: numba takes a second to load, and its first use on a machine compiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anomalydino_plugin.kernels import lowest as compiled
from anomalydino_plugin.kernels import tiles
from anomalydino_plugin.kernels.microkernel import LANES, QUERIES
from anomalydino_plugin.kernels.panels import Floats, QueryPanels, RowPanels, pack_queries, pack_rows
from anomalydino_plugin.kernels.rows import NEVER, Lowest, Precision
from anomalydino_plugin.kernels.threads import run_chunks

CHUNK = 16 * QUERIES  # queries that share a pass over the panels, and what they fetch of the rows


class TiledRows(NamedTuple):
    """Reference rows, twice: as they are, and as panels. A ``Layout``.

    Attributes:
        rows: (M, D) float32.
        panels: the same in the search's layout and precision.
    """

    rows: Floats
    panels: RowPanels

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See ``Layout``; distances are summed in float64."""
        values = np.ascontiguousarray(queries.numpy(), dtype=np.float32)
        found = np.empty((len(values), k), np.int64)
        distances = np.empty((len(values), k), np.float32)

        def work(part: slice) -> None:
            if k == 1:
                self._find_nearest_one(values[part], found[part, 0])
            else:
                maxima, reach = _maxima(values[part], self.panels, -1)
                panels = (self.panels.first, self.panels.filled)
                tiles.find_nearest(values[part], self.rows, *panels, maxima, reach, found[part])
            tiles.measure(values[part], self.rows, found[part], distances[part])

        run_chunks(work, _chunks(len(values)))
        return torch.from_numpy(distances), torch.from_numpy(found)

    def _find_nearest_one(self, queries: Floats, found: NDArray[np.int64]) -> None:
        """The best of one that is kept; compared again in float32 too, so that all precisions find the same row."""
        packed, panels = pack_queries(queries, self.panels), self.panels
        heap, best = (np.full(shape, NEVER, np.float32) for shape in ((len(queries), 1), len(queries)))
        found[:] = 0
        compiled.find_lowest(
            *(packed.words, panels.words, panels.first, panels.filled, panels.image, -1),
            *(queries, self.rows, True, packed.reach, heap, best, found, 0, *compiled.ONE_WAY),
        )

    def take_in(self, queries: Tensor, lowest: Lowest, offset: int, left_out: int, *, by_image: bool) -> bool:
        """See ``Layout``."""
        values = np.ascontiguousarray(queries.numpy(), dtype=np.float32)
        heap, best, place = (part.numpy() for part in lowest)  # shares memory
        rows, panels = self.rows, self.panels

        def work(part: slice) -> None:
            own = (heap[part], best[part], place[part], offset)
            if by_image:
                maxima, reach = _maxima(values[part], panels, left_out)
                image = (panels.first, panels.filled, panels.image)
                tiles.find_lowest_images(values[part], rows, *image, maxima, reach, *own)
            else:
                packed = pack_queries(values[part], panels)
                compiled.find_lowest(
                    *(packed.words, panels.words, panels.first, panels.filled, panels.image, left_out),
                    *(values[part], rows, self.again, self.margin(packed), *own, *compiled.ONE_WAY),
                )

        run_chunks(work, _chunks(len(values)))
        return True

    @property
    def again(self) -> bool:
        """Whether products are computed again in float32; else they are kept as they are."""
        return self.panels.precision != "float32"

    def margin(self, queries: QueryPanels) -> Floats:
        """(Q,) by how much a product may be off what is kept: nothing in float32, where it is kept itself."""
        return queries.reach if self.again else np.zeros_like(queries.reach)

    def take_in_each_other(
        self, other: Any, lowest: Sequence[Lowest], other_lowest: Sequence[Lowest], offsets: tuple[int, int]
    ) -> bool:
        """See ``Layout``; of two blocks laid out alike."""
        from anomalydino_plugin.kernels.pairs import take_in_each_other  # which builds on this module

        if not isinstance(other, TiledRows) or other.panels.precision != self.panels.precision:
            return False
        take_in_each_other(self, other, lowest, other_lowest, offsets)
        return True


def tile_rows(rows: Tensor, lengths: Sequence[int], precision: Precision) -> TiledRows:
    """Lay out reference rows of unit length.

    Args:
        rows: (M, D) float32 on the CPU, D even.
        lengths: rows of each image.
        precision: of the search; float32 where a feature is not finite, which is then its own row's matter.
    """
    values = np.ascontiguousarray(rows.numpy(), dtype=np.float32)
    if precision != "float32" and not np.isfinite(values.sum(dtype=np.float64)):
        precision = "float32"
    return TiledRows(values, pack_rows(values, lengths, precision))


def _maxima(queries: Floats, panels: RowPanels, left_out: int) -> tuple[Floats, Floats]:
    """(Q', T) maxima of tiles, Q' up to whole tiles of queries; and (Q,) by how much they may be off."""
    packed = pack_queries(queries, panels)
    found = np.empty((len(packed.words) * QUERIES, len(panels.first) * LANES), np.float32)
    tiles.tile_maxima(packed.words, panels.words, panels.filled, panels.image, left_out, found)
    return found, packed.reach


def _chunks(queries: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, queries, CHUNK)]
