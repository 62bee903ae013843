"""Compiled search for the n highest similarities of each query, kept as the products pass.

For batched zero-shot n is what it averages; the nearest row is the best of n = 1.

Of the products with a group of 256 rows, those that reach the lowest of the n kept are listed. What they are at least
is counted in bins when the group has passed: the edge above which there are n is the bar, which rises while the search
runs. What still reaches it when the list is full or the block ends is kept: products in float32 as they are; those in
less, which may be off by ``reach``, are computed again in float32 first.

Every function works on one chunk of queries and holds no lock, so that chunks run on threads. The loops over products
call nothing that takes arrays: numba counts each one that is handed over as a reference, which takes longer than what
there is to do.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import numpy as np
from numba import njit

from anomalydino_plugin.kernels.heaps import NEVER, is_nearer, replace_lowest, similarity
from anomalydino_plugin.kernels.microkernel import LANES, QUERIES, VECTORS, lowest_bit, mark_above, mark_above_both
from anomalydino_plugin.kernels.panels import GROUP, row_inside

_NO_LIMIT = np.float32(np.inf)  # reached by no similarity
_ROOM = 1024  # products of a query that are listed, beside those of one group
_BINS = 512  # from -1 to 1
_OFTEN = 8  # times that the bars are raised after 32 rows, then after a group
_PER_BIN = np.float32(_BINS / 2)
_EDGE = np.float32(2.0**-20)  # by which an edge lies low, as a value is rounded before its bin is known
# the last arguments of a search that lists nothing for the rows
ONE_WAY = (False, 0, np.empty((0, 8, VECTORS, LANES), np.float32), np.empty((0, 2), np.int32), np.empty(0, np.float32))


@njit(nogil=True, cache=True)
def find_lowest(
    words,
    panels,
    first,
    count,
    image,
    left_out,
    queries,
    rows,
    again,
    reach,
    heap,
    best,
    place,
    offset,
    both,
    first_query,
    row_limits,
    hits,
    hit_values,
):  # pragma: no cover - compiled
    """Take a block's patches into the n highest similarities of each query.

    Where asked, also list what reaches the limits of the rows, whose heaps other threads may hold.

    Args:
        words: (tiles of 8, steps, 8) the queries' panels.
        panels: (groups, 8, steps, 2, 16) the rows'.
        first: (groups,) first row of each group.
        count: (groups,) rows of it.
        image: (groups,) its image.
        left_out: image that is not looked at; -1 for none.
        queries: (Q', D) float32.
        rows: (M, D) float32.
        again: whether what may reach the limit is computed again from ``queries`` and ``rows``.
        reach: (Q',) by how much a product may be off; 0 where products are kept as they are.
        heap: (Q', n) float32, the lowest of them first; updated.
        best: (Q',) highest similarity so far; updated.
        place: (Q',) its row; updated.
        offset: number of the block's first row.
        both: whether to look at the rows' limits; what follows is not read otherwise, see ``ONE_WAY``.
        first_query: number of the chunk's first query in its block.
        row_limits: (groups, 8, 2, 16) float32.
        hits: (room, 2) int32 to fill: row, and query in its block.
        hit_values: (room,) float32 to fill: their products.

    Returns:
        How many are listed for the rows; more than there is room for, if the list is not complete.
    """
    limits, bins, bar, above = _bars(words, heap, reach)
    row_numbers, values, listed, seen = _lists(words)
    products, found, looked = np.empty((QUERIES, VECTORS * LANES), np.float32), 0, 0
    masks, row_masks = np.empty(QUERIES, np.uint32), np.zeros(QUERIES, np.uint32)
    for group in range(panels.shape[0]):
        if image[group] == left_out:
            continue
        for pair in range(panels.shape[1]):
            panel = group * panels.shape[1] + pair
            for tile in range(words.shape[0]):
                if both:
                    any_of = mark_above_both(words, tile, panels, panel, limits, products, masks, row_limits, row_masks)
                else:
                    any_of = mark_above(words, tile, panels, panel, limits, products, masks)
                if not any_of:
                    continue
                for own in range(QUERIES):
                    mask, query = masks[own], tile * QUERIES + own
                    while mask:
                        bit = lowest_bit(mask)
                        mask &= mask - np.uint32(1)
                        row_numbers[query, listed[query]] = first[group] + row_inside(pair, bit)
                        values[query, listed[query]] = products[own, bit]
                        listed[query] += 1
                    mask = row_masks[own] if query < len(queries) else np.uint32(0)  # the last tile is filled up
                    while mask:
                        bit = lowest_bit(mask)
                        mask &= mask - np.uint32(1)
                        if found < len(hit_values):
                            hits[found, 0] = first[group] + row_inside(pair, bit)
                            hits[found, 1] = first_query + query
                            hit_values[found] = products[own, bit]
                        found += 1
            if looked < _OFTEN or pair == panels.shape[1] - 1:
                looked += 1
                end = first[group] + count[group]
                _count(row_numbers, values, listed, seen, end, reach, heap.shape[1], limits, bins, bar, above)
        _settle(
            _ROOM, row_numbers, values, listed, seen, limits, queries, rows, again, reach, heap, best, place, offset
        )
    _settle(0, row_numbers, values, listed, seen, limits, queries, rows, again, reach, heap, best, place, offset)
    return found


@njit(nogil=True, cache=True)
def _bars(words, heap, reach):  # pragma: no cover - compiled
    """From the heaps: limits of the queries, bins, and of each query the bar's bin and how many are in it or above."""
    size = words.shape[0] * QUERIES
    limits = np.full(size, _NO_LIMIT, np.float32)  # of what fills up the last tile
    bins, bar, above = np.zeros((size, _BINS), np.int32), np.zeros(size, np.int64), np.zeros(size, np.int64)
    for query in range(len(heap)):
        limits[query] = heap[query, 0] - reach[query]
        bar[query] = _bin(heap[query, 0])
        for value in heap[query]:
            if value > NEVER:
                bins[query, _bin(value)] += 1
                above[query] += 1
    return limits, bins, bar, above


@njit(nogil=True, cache=True, inline="always")
def _bin(value):  # pragma: no cover - compiled
    return min(max(int((value + np.float32(1.0)) * _PER_BIN), 0), _BINS - 1)


@njit(nogil=True, cache=True)
def _lists(words):  # pragma: no cover - compiled
    """Of each query: rows and products, how many there are, and how many of them are counted."""
    size, room = words.shape[0] * QUERIES, _ROOM + GROUP
    listed, seen = np.zeros(size, np.int64), np.zeros(size, np.int64)
    return np.empty((size, room), np.int32), np.empty((size, room), np.float32), listed, seen


@njit(nogil=True, cache=True)
def _count(
    row_numbers, values, listed, seen, end, reach, kept, limits, bins, bar, above
):  # pragma: no cover - compiled
    """Raise the limits by what the rows of a group before row ``end`` have brought, ``kept`` being n."""
    for query in range(len(reach)):
        place, lowest, found = seen[query], bar[query], above[query]
        for number in range(seen[query], listed[query]):
            value, row = values[query, number], row_numbers[query, number]
            if row >= end:  # repetitions of the last row
                continue
            row_numbers[query, place], values[query, place] = row, value
            place += 1
            at = _bin(value - reach[query])
            if at >= lowest:
                bins[query, at] += 1
                found += 1
        while found - bins[query, lowest] >= kept:
            found -= bins[query, lowest]
            lowest += 1
        if found >= kept and lowest > 0:  # the lowest bin has no edge: roundings lie below -1
            edge = np.float32(lowest) / _PER_BIN - np.float32(1.0) - _EDGE
            limits[query] = max(limits[query], edge - reach[query])
        listed[query], seen[query], bar[query], above[query] = place, place, lowest, found


@njit(nogil=True, cache=True)
def _settle(
    room, row_numbers, values, listed, seen, limits, queries, rows, again, reach, heap, best, place, offset
):  # pragma: no cover - compiled
    """Keep what is listed and among the n highest, of queries with more than ``room`` of it, and empty their lists.

    Where it is computed again, what lies above the bar comes first: few others may count then.
    """
    at, exact = np.empty(values.shape[1], np.int64), np.empty(values.shape[1], np.float32)
    for query in range(len(queries)):
        if listed[query] <= room:
            continue
        highest, nearest = best[query], place[query]
        limit = limits[query] + np.float32(2.0) * reach[query]
        for _ in range(2):
            chosen = 0
            for number in range(listed[query]):
                if values[query, number] >= limit:
                    at[chosen], exact[chosen] = number, values[query, number]
                    chosen += 1
            if again:
                for number in range(chosen):
                    exact[number] = similarity(queries, query, rows, row_numbers[query, at[number]])
            for number in range(chosen):
                value, row = exact[number], row_numbers[query, at[number]] + offset
                values[query, at[number]] = -_NO_LIMIT
                if is_nearer(value, row, highest, nearest):
                    highest, nearest = value, row
                if value > heap[query, 0]:
                    replace_lowest(heap, query, value)
            limit = max(limits[query], heap[query, 0] - reach[query])
        best[query], place[query], limits[query] = highest, nearest, limit
        listed[query], seen[query] = 0, 0
