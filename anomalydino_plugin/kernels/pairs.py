"""Two blocks of rows searched for each other: every product of the symmetric matrix serves both of its directions.

The first direction is that of ``search``: each thread holds the heaps of its chunk. What reaches the other block's
limits is listed, and taken in when all of the first block has passed. There is room for one product in sixteen; where
more reach a limit, as in a set of blank images, the second direction is searched by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from anomalydino_plugin.kernels import hits as compiled_hits
from anomalydino_plugin.kernels import lowest as compiled
from anomalydino_plugin.kernels.microkernel import LANES, VECTORS
from anomalydino_plugin.kernels.panels import Floats, QueryPanels, RowPanels, pack_queries, row_inside
from anomalydino_plugin.kernels.rows import Lowest
from anomalydino_plugin.kernels.search import CHUNK, TiledRows
from anomalydino_plugin.kernels.threads import run_chunks

_ROOM = 1 / 16  # of all products; some one in a hundred reach a limit


def take_in_each_other(
    one: TiledRows, other: TiledRows, lowest: Sequence[Lowest], other_lowest: Sequence[Lowest], offsets: tuple[int, int]
) -> None:
    """Take the patches of each block into the n highest similarities of the other.

    Args:
        one: a block of images.
        other: a block of other images, laid out in the same precision.
        lowest: of each image of ``one``; updated.
        other_lowest: of each image of ``other``; updated.
        offsets: numbers of the blocks' first rows.
    """
    parts = _parts(one)
    packed: dict[int, QueryPanels] = {}

    def pack(part: _Part) -> None:
        packed[part.rows.start] = pack_queries(one.rows[part.rows], other.panels)

    run_chunks(pack, parts)
    margin = _largest([other.margin(queries) for queries in packed.values()])
    limits = _row_limits(other.panels, _lowest_kept(other_lowest) - margin)
    room = int(CHUNK * len(other.rows) * _ROOM)
    lists: list[_Hits] = []

    def forward(part: _Part) -> None:
        queries, panels = packed[part.rows.start], other.panels
        heap, best, place = (values.numpy()[part.inside] for values in lowest[part.image])  # shares memory
        hits, values = np.empty((room, 2), np.int32), np.empty(room, np.float32)
        found = compiled.find_lowest(
            *(queries.words, panels.words, panels.first, panels.filled, panels.image, -1),
            *(one.rows[part.rows], other.rows, one.again, other.margin(queries), heap, best, place, offsets[1]),
            *(True, part.rows.start, limits, hits, values),
        )
        lists.append(_Hits(hits[:found].copy(), values[:found].copy(), found <= room))

    def backward(part: _Image) -> None:
        heap, best, place = (values.numpy() for values in part.lowest)
        rows = (part.start, part.stop)
        bars = heap.copy() if one.again else heap
        if one.again:
            for hits in lists:
                compiled_hits.raise_bars(hits.places, hits.values, *rows, margin, bars)
        for hits in lists:
            compiled_hits.take_hits(
                *(hits.places, hits.values, *rows, other.rows, one.rows),
                *(one.again, margin, bars, heap, best, place, offsets[0]),
            )

    run_chunks(forward, parts)
    images = _images(other_lowest)
    if all(hits.complete for hits in lists):
        run_chunks(backward, images)
        return
    for image in images:
        queries = torch.from_numpy(other.rows[image.start : image.stop])
        one.take_in(queries, image.lowest, offsets[0], -1, by_image=False)


class _Hits(NamedTuple):
    """What reached the limits of the other block's rows.

    Attributes:
        places: (H, 2) row of the other block, row of this one.
        values: (H,) their products.
        complete: whether there was room for all.
    """

    places: NDArray[np.int32]
    values: Floats
    complete: bool


class _Image(NamedTuple):
    """Rows of one image of a block, from ``start`` to ``stop``, and what is kept for them."""

    start: int
    stop: int
    lowest: Lowest


def _images(lowest: Sequence[Lowest]) -> list[_Image]:
    stops = np.cumsum([len(own.best) for own in lowest]).tolist()
    return [_Image(stop - len(own.best), stop, own) for stop, own in zip(stops, lowest, strict=True)]


def _largest(margins: Sequence[Floats]) -> np.float32:
    """Of what is finite: products with other rows are not numbers, and reach nothing."""
    joined = np.concatenate([np.zeros(1, np.float32), *margins])
    return np.float32(joined[np.isfinite(joined)].max())


def _lowest_kept(lowest: Sequence[Lowest]) -> Floats:
    """(M,) what a similarity with each row of the images must exceed to be kept."""
    return np.concatenate([own.highest[:, 0].numpy() for own in lowest])


def _row_limits(panels: RowPanels, limits: Floats) -> Floats:
    """(groups, 8, 2, 16) the same as the rows lie in their panels; what only fills them up has none to reach."""
    pairs, bits = np.arange(panels.words.shape[1])[:, None], np.arange(VECTORS * LANES)
    inside = row_inside.py_func(pairs, bits).reshape(-1, VECTORS, LANES)
    filled = panels.filled[:, None, None, None]
    rows = panels.first[:, None, None, None] + np.minimum(inside, filled - 1)
    found: Floats = np.where(inside < filled, limits[rows], np.float32(np.inf))
    return found


class _Part:
    """A chunk of a block's rows, all of one image.

    Attributes:
        rows: which.
        image: of the block.
        inside: which rows of the image.
    """

    def __init__(self, rows: slice, image: int, inside: int) -> None:
        count = rows.stop - rows.start
        self.rows, self.image = rows, image
        self.inside = slice(inside, inside + count)


def _parts(block: TiledRows) -> list[_Part]:
    panels = block.panels
    starts = {int(image): int(first) for first, image in zip(panels.first[::-1], panels.image[::-1], strict=True)}
    found = []
    for first, filled, image in zip(panels.first, panels.filled, panels.image, strict=True):
        for start in range(0, int(filled), CHUNK):
            rows = slice(int(first) + start, int(first) + min(start + CHUNK, int(filled)))
            found.append(_Part(rows, int(image), rows.start - starts[int(image)]))
    return found
