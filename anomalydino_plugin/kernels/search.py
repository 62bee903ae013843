"""The compiled search behind plain functions: packs, cuts queries into chunks, runs them on threads.

Imported only where the kernel is used: numba takes a second to load, and its first use on a machine compiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anomalydino_plugin.kernels import lowest as compiled
from anomalydino_plugin.kernels import tiles
from anomalydino_plugin.kernels.microkernel import LANES, QUERIES
from anomalydino_plugin.kernels.panels import RowPanels, pack_queries, pack_rows
from anomalydino_plugin.kernels.rows import SUM_ERROR, Lowest

Floats = NDArray[np.float32]
T = TypeVar("T")
CHUNK = 16 * QUERIES  # queries that share a pass over the panels, and what they fetch of the rows


class TiledRows(NamedTuple):
    """Reference rows, twice: as they are, and as panels. A ``Layout``.

    Attributes:
        rows: (M, D) float32.
        panels: the same in the search's layout and precision.
        bfloat16: that precision; else float32.
    """

    rows: Floats
    panels: RowPanels
    bfloat16: bool

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See ``Layout``; distances are summed in float64."""
        values = np.ascontiguousarray(queries.numpy(), dtype=np.float32)
        found = np.empty((len(values), k), np.int64)
        distances = np.empty((len(values), k), np.float32)

        def work(part: slice) -> None:
            maxima, reach = _maxima(values[part], self, -1)
            tiles.find_nearest(
                *(values[part], self.rows, self.panels.first, self.panels.filled),
                *(maxima, reach, found[part], distances[part]),
            )

        run_chunks(work, _chunks(len(values)))
        return torch.from_numpy(distances), torch.from_numpy(found)

    def take_in(self, queries: Tensor, lowest: Lowest, offset: int, left_out: int, *, by_image: bool) -> bool:
        """See ``Layout``."""
        values = np.ascontiguousarray(queries.numpy(), dtype=np.float32)
        heap, best, place = (part.numpy() for part in lowest)  # shares memory
        rows, panels = self.rows, self.panels

        def work(part: slice) -> None:
            own = (heap[part], best[part], place[part], offset)
            if by_image:
                maxima, reach = _maxima(values[part], self, left_out)
                image = (panels.first, panels.filled, panels.image)
                tiles.find_lowest_images(values[part], rows, *image, maxima, reach, *own)
            else:
                words, lost = pack_queries(values[part], self.bfloat16)
                compiled.find_lowest(
                    *(words, panels.words, panels.first, panels.filled, panels.image, left_out),
                    *(values[part], rows, self.bfloat16, self.margin(lost), *own),
                )

        run_chunks(work, _chunks(len(values)))
        return True

    def margin(self, lost: Floats) -> Floats:
        """(Q,) by how much a product may be off what is kept: nothing in float32, where it is kept itself.

        Args:
            lost: (Q,) norms of what rounding took from the queries.
        """
        return _reach(lost, self) if self.bfloat16 else np.zeros_like(lost)

    def take_in_each_other(
        self, other: Any, lowest: Sequence[Lowest], other_lowest: Sequence[Lowest], offsets: tuple[int, int]
    ) -> bool:
        """See ``Layout``; of two blocks laid out alike."""
        from anomalydino_plugin.kernels.pairs import take_in_each_other  # which builds on this module

        if not isinstance(other, TiledRows) or other.bfloat16 != self.bfloat16:
            return False
        take_in_each_other(self, other, lowest, other_lowest, offsets)
        return True


def tile_rows(rows: Tensor, lengths: Sequence[int], *, bfloat16: bool) -> TiledRows:
    """Lay out reference rows of unit length.

    Args:
        rows: (M, D) float32 on the CPU, D even.
        lengths: rows of each image.
        bfloat16: search in bfloat16; else in float32.
    """
    values = np.ascontiguousarray(rows.numpy(), dtype=np.float32)
    return TiledRows(values, pack_rows(values, lengths, bfloat16), bfloat16)


def _maxima(queries: Floats, references: TiledRows, left_out: int) -> tuple[Floats, Floats]:
    """(Q', T) maxima of tiles, Q' up to whole tiles of queries; and (Q,) by how much they may be off."""
    panels = references.panels
    words, lost = pack_queries(queries, references.bfloat16)
    found = np.empty((len(words) * QUERIES, len(panels.first) * LANES), np.float32)
    tiles.tile_maxima(words, panels.words, panels.filled, panels.image, left_out, found)
    return found, _reach(lost, references)


def _reach(lost: Floats, references: TiledRows) -> Floats:
    """(Q,) by how much a product may be off the similarity of the float32 rows."""
    residual = np.float32(references.panels.residual)
    sums = np.float32(references.rows.shape[1] * SUM_ERROR)
    found: Floats = lost + residual + lost * residual + sums
    return found


def run_chunks(work: Callable[[T], None], parts: Sequence[T]) -> None:
    """This thread and as many others as torch may use take the parts one by one."""
    left = iter(parts)

    def take() -> None:
        while (part := next(left, None)) is not None:  # iterators of lists are safe to share
            work(part)

    others = min(torch.get_num_threads(), len(parts)) - 1
    if others < 1:
        take()
        return
    with ThreadPoolExecutor(others) as pool:
        waiting = [pool.submit(take) for _ in range(others)]
        take()
        for other in waiting:
            other.result()


def _chunks(queries: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, queries, CHUNK)]
