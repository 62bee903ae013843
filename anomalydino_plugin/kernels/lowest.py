"""Compiled parts of batched zero-shot's search: the n highest similarities of each query, kept as the products pass.

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

from anomalydino_plugin.kernels.heaps import NEVER, note_nearest, replace_lowest, similarity
from anomalydino_plugin.kernels.microkernel import LANES, QUERIES, VECTORS, lowest_bit, mark_above, mark_above_both
from anomalydino_plugin.kernels.panels import row_inside

_NO_LIMIT = np.float32(np.inf)  # reached by no similarity
_ROOM = 1024  # products of a query that are listed, beside those of one group
_BINS = 512  # from -1 to 1
_OFTEN = 8  # times that the bars are raised after 32 rows, then after a group
_PER_BIN = np.float32(_BINS / 2)
_EDGE = np.float32(2.0**-20)  # by which an edge lies low, as a value is rounded before its bin is known


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
        again: whether what may reach the limit is computed again from ``queries`` and ``rows``.
        reach: (Q',) by how much a product may be off; 0 where products are kept as they are.
        heap: (Q', n) float32, the lowest of them first; updated.
        best: (Q',) highest similarity so far; updated.
        place: (Q',) its row; updated.
        offset: number of the block's first row.
    """
    limits, bins, counted = _bars(words, heap, reach)
    numbers, values, listed, seen = _lists(words)
    products, masks = np.empty((QUERIES, VECTORS * LANES), np.float32), np.empty(QUERIES, np.uint32)
    looked = 0
    for group in range(panels.shape[0]):
        if image[group] == left_out:
            continue
        for pair in range(panels.shape[1]):
            for tile in range(words.shape[0]):
                if mark_above(words, tile, panels, group * panels.shape[1] + pair, limits, products, masks):
                    for own in range(QUERIES):
                        mask, query = masks[own], tile * QUERIES + own
                        while mask:
                            bit = lowest_bit(mask)
                            mask &= mask - np.uint32(1)
                            numbers[query, listed[query]] = first[group] + row_inside(pair, bit)
                            values[query, listed[query]] = products[own, bit]
                            listed[query] += 1
            if looked < _OFTEN or pair == panels.shape[1] - 1:
                looked += 1
                end = first[group] + count[group]
                _count(numbers, values, listed, seen, end, reach, heap.shape[1], limits, bins, counted)
        _keep(_ROOM, numbers, values, listed, seen, limits, queries, rows, again, reach, heap, best, place, offset)
    _keep(0, numbers, values, listed, seen, limits, queries, rows, again, reach, heap, best, place, offset)


@njit(nogil=True, cache=True)
def _bars(words, heap, reach):  # pragma: no cover - compiled
    """Limits of the queries, bins, and of each query its lowest bin and how many are in it or above; from the heaps."""
    size = words.shape[0] * QUERIES
    limits = np.full(size, _NO_LIMIT, np.float32)  # of what fills up the last tile
    bins, counted = np.zeros((size, _BINS), np.int32), np.zeros((size, 2), np.int64)
    for query in range(len(heap)):
        limits[query] = heap[query, 0] - reach[query]
        counted[query, 0] = _bin(heap[query, 0])
        for value in heap[query]:
            if value > NEVER:
                bins[query, _bin(value)] += 1
                counted[query, 1] += 1
    return limits, bins, counted


@njit(nogil=True, cache=True, inline="always")
def _bin(value):  # pragma: no cover - compiled
    return min(max(int((value + np.float32(1.0)) * _PER_BIN), 0), _BINS - 1)


@njit(nogil=True, cache=True)
def _lists(words):  # pragma: no cover - compiled
    """Of each query: rows and products, how many there are, and how many of them are counted."""
    size, room = words.shape[0] * QUERIES, _ROOM + LANES * LANES
    listed, seen = np.zeros(size, np.int64), np.zeros(size, np.int64)
    return np.empty((size, room), np.int32), np.empty((size, room), np.float32), listed, seen


@njit(nogil=True, cache=True)
def _count(numbers, values, listed, seen, end, reach, kept, limits, bins, counted):  # pragma: no cover - compiled
    """Raise the limits by what the rows of a group before row ``end`` have brought, ``kept`` being n."""
    for query in range(len(reach)):
        place, lowest, above = seen[query], counted[query, 0], counted[query, 1]
        for number in range(seen[query], listed[query]):
            value, row = values[query, number], numbers[query, number]
            if row >= end:  # repetitions of the last row
                continue
            numbers[query, place], values[query, place] = row, value
            place += 1
            found = _bin(value - reach[query])
            if found >= lowest:
                bins[query, found] += 1
                above += 1
        while above - bins[query, lowest] >= kept:
            above -= bins[query, lowest]
            lowest += 1
        if above >= kept:
            edge = np.float32(lowest) / _PER_BIN - np.float32(1.0) - _EDGE
            limits[query] = max(limits[query], edge - reach[query])
        listed[query], seen[query], counted[query, 0], counted[query, 1] = place, place, lowest, above


@njit(nogil=True, cache=True)
def _keep(
    room, numbers, values, listed, seen, limits, queries, rows, again, reach, heap, best, place, offset
):  # pragma: no cover - compiled
    """Keep what is listed and among the n highest, of queries with more than ``room`` of it, and empty their lists.

    Of what must be computed again first that above the bar: it brings what is kept so high that few others may count.
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
                    exact[number] = similarity(queries, query, rows, numbers[query, at[number]])
            for number in range(chosen):
                value, row = exact[number], numbers[query, at[number]] + offset
                values[query, at[number]] = -_NO_LIMIT
                if value > highest or (value == highest and row < nearest):
                    highest, nearest = value, row
                if value > heap[query, 0]:
                    replace_lowest(heap, query, value)
            limit = max(limits[query], heap[query, 0] - reach[query])
        best[query], place[query], limits[query] = highest, nearest, limit
        listed[query], seen[query] = 0, 0


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
    hit_values,
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
        hit_values: (room,) float32 to fill: their products.

    Returns:
        How many there are; more than there is room for, if the list is not complete.
    """
    limits, bins, counted = _bars(words, heap, reach)
    numbers, values, listed, seen = _lists(words)
    products, found = np.empty((QUERIES, VECTORS * LANES), np.float32), 0
    masks, row_masks = np.empty(QUERIES, np.uint32), np.empty(QUERIES, np.uint32)
    for group in range(panels.shape[0]):
        for pair in range(panels.shape[1]):
            panel = group * panels.shape[1] + pair
            for tile in range(words.shape[0]):
                if not mark_above_both(words, tile, panels, panel, limits, products, masks, row_limits, row_masks):
                    continue
                for own in range(QUERIES):
                    mask, query = masks[own], tile * QUERIES + own
                    while mask:
                        bit = lowest_bit(mask)
                        mask &= mask - np.uint32(1)
                        numbers[query, listed[query]] = first[group] + row_inside(pair, bit)
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
            if panel < _OFTEN or pair == panels.shape[1] - 1:
                end = first[group] + count[group]
                _count(numbers, values, listed, seen, end, reach, heap.shape[1], limits, bins, counted)
        _keep(_ROOM, numbers, values, listed, seen, limits, queries, rows, again, reach, heap, best, place, offset)
    _keep(0, numbers, values, listed, seen, limits, queries, rows, again, reach, heap, best, place, offset)
    return found


@njit(nogil=True, cache=True)
def raise_bars(hits, values, start, stop, reach, bars):  # pragma: no cover - compiled
    """Raise the n highest bars of some of the rows of a list of ``find_lowest_both``.

    Args:
        hits: (H, 2) int32.
        values: (H,) float32.
        start: first of these rows.
        stop: one beyond the last.
        reach: by how much a product may be off.
        bars: (stop - start, n) float32, heaps of what so many similarities are at least; updated.
    """
    for number in range(len(values)):
        query, bar = hits[number, 0] - start, values[number] - reach
        if 0 <= query < stop - start and bar > bars[query, 0]:
            replace_lowest(bars, query, bar)


@njit(nogil=True, cache=True)
def take_hits(
    hits, values, start, stop, queries, rows, again, reach, bars, heap, best, place, offset
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
        reach: as for ``raise_bars``, which comes first where products are computed again.
        bars: as there.
        heap: (stop - start, n) float32; updated.
        best: (stop - start,) highest similarity so far; updated.
        place: (stop - start,) its row; updated.
        offset: number of the other block's first row.
    """
    for number in range(len(values)):
        query, row = hits[number, 0], hits[number, 1]
        if start <= query < stop and values[number] >= bars[query - start, 0] - reach:
            value = similarity(queries, query, rows, row) if again else values[number]
            note_nearest(value, row + offset, best, place, query - start)
            if value > heap[query - start, 0]:
                replace_lowest(heap, query - start, value)
