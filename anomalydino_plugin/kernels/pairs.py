"""Two blocks of rows searched for each other: every product of the symmetric matrix serves both of its directions.

Legend: ``A`` and ``B`` rows of the two blocks, ``T`` tiles of 16 of A's rows.

The first direction is that of ``search``. What the second needs, the maxima of each of B's rows over tiles of A's,
comes out of the same registers and is kept until all of A has passed: 4 B T bytes, which bounds the size of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from anomalydino_plugin.kernels import tiles
from anomalydino_plugin.kernels.microkernel import LANES, QUERIES
from anomalydino_plugin.kernels.panels import pack_queries
from anomalydino_plugin.kernels.rows import SUM_ERROR, Lowest
from anomalydino_plugin.kernels.search import CHUNK, Floats, TiledRows, run_chunks


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
    columns = np.full((len(other.rows), len(one.panels.first) * LANES), tiles.NEVER, np.float32)
    lost = np.zeros(len(one.rows), np.float32)
    sums = np.float32(one.rows.shape[1] * SUM_ERROR)

    def forward(part: _Part) -> None:
        words, own_lost = pack_queries(one.rows[part.rows], one.bfloat16)
        lost[part.rows] = own_lost
        maxima = np.empty((len(words) * QUERIES, len(other.panels.first) * LANES), np.float32)
        panels = other.panels
        tiles.tile_maxima_both(words, panels.words, panels.first, panels.filled, maxima, columns[:, part.tiles])
        residual = np.float32(panels.residual)
        reach = own_lost + residual + own_lost * residual + sums
        _compare(one, part, other, maxima, reach, lowest, offsets[1])

    def backward(part: _Part) -> None:
        own, residual = np.float32(other.panels.residual), lost.max()
        reach = np.full(part.rows.stop - part.rows.start, own + residual + own * residual + sums, np.float32)
        _compare(other, part, one, columns[part.rows], reach, other_lowest, offsets[0])

    run_chunks(forward, _parts(one))
    run_chunks(backward, _parts(other))


class _Part:
    """A chunk of a block's rows, all of one image.

    Attributes:
        rows: which.
        tiles: their tiles of 16, as the block's panels count them.
        image: of the block.
        inside: which rows of the image.
    """

    def __init__(self, rows: slice, tile: int, image: int, inside: int) -> None:
        count = rows.stop - rows.start
        self.rows, self.image = rows, image
        self.tiles = slice(tile, tile - (-count // LANES))
        self.inside = slice(inside, inside + count)


def _parts(block: TiledRows) -> list[_Part]:
    panels = block.panels
    starts = {int(image): int(first) for first, image in zip(panels.first[::-1], panels.image[::-1], strict=True)}
    found = []
    for group, (first, filled, image) in enumerate(zip(panels.first, panels.filled, panels.image, strict=True)):
        for start in range(0, int(filled), CHUNK):
            rows = slice(int(first) + start, int(first) + min(start + CHUNK, int(filled)))
            tile = group * LANES + start // LANES
            found.append(_Part(rows, tile, int(image), rows.start - starts[int(image)]))
    return found


def _compare(
    queries: TiledRows,
    part: _Part,
    references: TiledRows,
    maxima: Floats,
    reach: NDArray[np.float32],
    lowest: Sequence[Lowest],
    offset: int,
) -> None:
    heap, best, place = (values.numpy()[part.inside] for values in lowest[part.image])  # shares memory
    panels = references.panels
    tiles.find_lowest(
        *(queries.rows[part.rows], references.rows, panels.first, panels.filled),
        *(maxima, reach, heap, best, place, offset),
    )
