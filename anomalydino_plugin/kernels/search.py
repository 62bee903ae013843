"""The compiled search behind plain functions: packs, cuts queries into chunks, runs them on threads.

Imported only where the kernel is used: numba takes a second to load, and its first use on a machine compiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anomalydino_plugin.kernels import tiles
from anomalydino_plugin.kernels.microkernel import LANES, QUERIES
from anomalydino_plugin.kernels.panels import RowPanels, pack_queries, pack_rows

Floats = NDArray[np.float32]
_CHUNK = 8 * QUERIES  # queries that share a pass over the panels; their own panels stay in the cache
_SUM_ERROR = 2.0**-23  # of float32 sums, for each feature


class TiledRows(NamedTuple):
    """Reference rows, twice: as they are, and as panels.

    Attributes:
        rows: (M, D) float32.
        panels: the same in the search's layout and precision.
        bfloat16: that precision; else float32.
    """

    rows: Floats
    panels: RowPanels
    bfloat16: bool


def tile_rows(rows: Tensor, lengths: Sequence[int], *, bfloat16: bool) -> TiledRows:
    """Lay out reference rows of unit length.

    Args:
        rows: (M, D) float32 on the CPU, D even.
        lengths: rows of each image.
        bfloat16: search in bfloat16; else in float32.
    """
    values = np.ascontiguousarray(rows.numpy(), dtype=np.float32)
    return TiledRows(values, pack_rows(values, lengths, bfloat16), bfloat16)


def nearest_rows(queries: Tensor, references: TiledRows, k: int) -> Tensor:
    """(Q, k) int64: the k most similar rows."""
    values = np.ascontiguousarray(queries.numpy(), dtype=np.float32)
    found = np.empty((len(values), k), np.int64)
    similarities = np.empty((len(values), k), np.float32)

    def work(chunk: _Chunk) -> None:
        part = chunk.part
        tiles.find_nearest(
            *(values[part], references.rows, references.panels.first, references.panels.filled),
            *(chunk.maxima(-1), chunk.reach, found[part], similarities[part]),
        )

    _run(values, references, work)
    return torch.from_numpy(found)


class LowestState(NamedTuple):
    """The n highest similarities of every query so far.

    Attributes:
        heap: (Q, n) float32, each row a heap with its lowest first; -2 where nothing is yet.
        best: (Q,) float32.
        place: (Q,) int64, row of ``best``.
    """

    heap: Floats
    best: Floats
    place: NDArray[np.int64]


def take_in(
    queries: Tensor, references: TiledRows, state: LowestState, offset: int, left_out: int, *, by_image: bool
) -> None:
    """Take a block of images into the state.

    Args:
        queries: (Q, D) float32 on the CPU.
        references: the block.
        state: updated.
        offset: number of the block's first row.
        left_out: image of the block that is not looked at; -1 for none.
        by_image: an image counts with its highest similarity alone.
    """
    values = np.ascontiguousarray(queries.numpy(), dtype=np.float32)
    rows, panels = references.rows, references.panels

    def work(chunk: _Chunk) -> None:
        part, maxima = chunk.part, chunk.maxima(left_out)
        own = (state.heap[part], state.best[part], state.place[part], offset)
        if by_image:
            tiles.find_lowest_images(
                values[part], rows, panels.first, panels.filled, panels.image, maxima, chunk.reach, *own
            )
        else:
            tiles.find_lowest(values[part], rows, panels.first, panels.filled, maxima, chunk.reach, *own)

    _run(values, references, work)


class _Chunk(NamedTuple):
    """Some of the queries."""

    part: slice
    words: NDArray[np.generic]
    panels: RowPanels
    reach: Floats

    def maxima(self, left_out: int) -> Floats:
        """(Q', T) float32, rows of whole tiles of queries."""
        panels = self.panels
        found = np.empty((len(self.words) * QUERIES, len(panels.first) * LANES), np.float32)
        tiles.tile_maxima(self.words, panels.words, panels.filled, panels.image, left_out, found)
        return found


def _chunks(queries: Floats, references: TiledRows) -> Iterator[_Chunk]:
    words, lost = pack_queries(queries, references.bfloat16)
    residual = np.float32(references.panels.residual)
    reach = lost + residual + lost * residual + np.float32(queries.shape[1] * _SUM_ERROR)
    for start in range(0, len(queries), _CHUNK):
        part = slice(start, start + _CHUNK)
        yield _Chunk(part, words[start // QUERIES : (start + _CHUNK) // QUERIES], references.panels, reach[part])


def _run(queries: Floats, references: TiledRows, work: Callable[[_Chunk], None]) -> None:
    threads = torch.get_num_threads()
    if threads == 1 or len(queries) <= _CHUNK:
        for chunk in _chunks(queries, references):
            work(chunk)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, _chunks(queries, references)):
            pass
