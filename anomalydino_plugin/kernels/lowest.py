"""Compiled parts of batched zero-shot's search: the n highest similarities of each query, kept as the products pass.

Of the products that the innermost loop holds, those that reach the lowest of the n kept are taken in at once, so that
the bar rises while the search runs. Products in bfloat16 are compared with ``reach`` to spare, and what reaches that is
computed again in float32; products in float32 are what is kept.

Every function works on one chunk of queries and holds no lock, so that chunks run on threads.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import numpy as np
from numba import njit

from anomalydino_plugin.kernels.heaps import note_nearest, replace_lowest, similarity
from anomalydino_plugin.kernels.microkernel import LANES, QUERIES, VECTORS, lowest_bit, mark_above, mark_above_both
from anomalydino_plugin.kernels.panels import row_inside

_NO_LIMIT = np.float32(np.inf)  # reached by no similarity


@njit(nogil=True, cache=True)
def _limits(words, heap, reach):  # pragma: no cover - compiled
    """Of each query of the chunk; none for what fills up the last tile."""
    found = np.full(words.shape[0] * QUERIES, _NO_LIMIT, np.float32)
    for query in range(len(heap)):
        found[query] = heap[query, 0] - reach[query]
    return found


@njit(nogil=True, cache=True)
def find_lowest(
    words, panels, first, count, image, left_out, queries, rows, again, reach, heap, best, place, offset
):  # pragma: no cover - compiled
    """Take a block's patches into the n highest similarities of each query.

    Args:
        words: (tiles of 8, steps, 8) the queries' panels.
        panels: (groups, 8, steps, 2, 16) the rows'.
        first: (groups,) first row of each group.
        count: (groups,) rows of it.
        image: (groups,) its image.
        left_out: image that is not looked at; -1 for none.
        queries: (Q', D) float32.
        rows: (M, D) float32.
        again: whether what reaches the limit is computed again from ``queries`` and ``rows``.
        reach: (Q',) by how much a product may be off; 0 where products are kept as they are.
        heap: (Q', n) float32, the lowest of them first; updated.
        best: (Q',) highest similarity so far; updated.
        place: (Q',) its row; updated.
        offset: number of the block's first row.
    """
    limits = _limits(words, heap, reach)
    products, masks = np.empty((QUERIES, VECTORS * LANES), np.float32), np.empty(QUERIES, np.uint32)
    for group in range(panels.shape[0]):
        if image[group] == left_out:
            continue
        for tile in range(words.shape[0]):
            for pair in range(panels.shape[1]):
                if mark_above(words, tile, panels, group * panels.shape[1] + pair, limits, products, masks):
                    around = (tile * QUERIES, pair, first[group], count[group], offset)
                    _take_marked(masks, products, around, queries, rows, again, reach, limits, heap, best, place)


@njit(nogil=True, inline="always")
def _take_marked(
    masks, products, around, queries, rows, again, reach, limits, heap, best, place
):  # pragma: no cover - compiled
    """What the masks of a tile mark; ``around``: its first query, pair, the group's first row, rows in it, offset."""
    first_query, pair, first, count, offset = around
    for own in range(QUERIES):
        mask, query = masks[own], first_query + own
        while mask:
            bit = lowest_bit(mask)
            mask &= mask - np.uint32(1)
            inside = row_inside(pair, bit)
            if inside >= count:  # repetitions of the last row
                continue
            value = similarity(queries, query, rows, first + inside) if again else products[own, bit]
            note_nearest(value, first + inside + offset, best, place, query)
            if value > heap[query, 0]:
                replace_lowest(heap, query, value)
                limits[query] = heap[query, 0] - reach[query]


@njit(nogil=True, cache=True)
def find_lowest_both(
    words,
    panels,
    first,
    count,
    queries,
    rows,
    again,
    reach,
    heap,
    best,
    place,
    offset,
    first_query,
    row_limits,
    hits,
    values,
):  # pragma: no cover - compiled
    """``find_lowest``, and a list of what reaches the limits of the rows, whose heaps other threads may hold.

    Args:
        words: as there.
        panels: as there.
        first: as there.
        count: as there.
        queries: as there.
        rows: as there.
        again: as there.
        reach: as there.
        heap: as there.
        best: as there.
        place: as there.
        offset: as there.
        first_query: number of the chunk's first query in its block.
        row_limits: (groups, 8, 2, 16) float32.
        hits: (room, 2) int32 to fill: row, and query in its block.
        values: (room,) float32 to fill: their products.

    Returns:
        How many there are; more than there is room for, if the list is not complete.
    """
    limits = _limits(words, heap, reach)
    products, found = np.empty((QUERIES, VECTORS * LANES), np.float32), 0
    masks, row_masks = np.empty(QUERIES, np.uint32), np.empty(QUERIES, np.uint32)
    for group in range(panels.shape[0]):
        for tile in range(words.shape[0]):
            for pair in range(panels.shape[1]):
                panel = group * panels.shape[1] + pair
                if not mark_above_both(words, tile, panels, panel, limits, products, masks, row_limits, row_masks):
                    continue
                around = (tile * QUERIES, pair, first[group], count[group], offset)
                _take_marked(masks, products, around, queries, rows, again, reach, limits, heap, best, place)
                for own in range(min(QUERIES, len(queries) - tile * QUERIES)):  # the last tile is filled up
                    mask = row_masks[own]
                    while mask:
                        bit = lowest_bit(mask)
                        mask &= mask - np.uint32(1)
                        if found < len(values):
                            hits[found, 0] = first[group] + row_inside(pair, bit)
                            hits[found, 1] = first_query + tile * QUERIES + own
                            values[found] = products[own, bit]
                        found += 1
    return found


@njit(nogil=True, cache=True)
def take_hits(
    hits, values, start, stop, queries, rows, again, heap, best, place, offset
):  # pragma: no cover - compiled
    """Take a list of ``find_lowest_both`` into the n highest similarities of some of its rows: the queries here.

    Args:
        hits: (H, 2) int32.
        values: (H,) float32.
        start: first of these rows.
        stop: one beyond the last.
        queries: (M, D) float32, all rows of their block.
        rows: (Q, D) float32, those of the other block.
        again: as there.
        heap: (stop - start, n) float32; updated.
        best: (stop - start,) highest similarity so far; updated.
        place: (stop - start,) its row; updated.
        offset: number of the other block's first row.
    """
    for number in range(len(values)):
        query, row = hits[number, 0], hits[number, 1]
        if start <= query < stop:
            value = similarity(queries, query, rows, row) if again else values[number]
            note_nearest(value, row + offset, best, place, query - start)
            if value > heap[query - start, 0]:
                replace_lowest(heap, query - start, value)
