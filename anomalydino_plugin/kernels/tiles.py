"""Compiled parts of the search: maxima of tiles, and exact comparison of what is within reach of them.

Every function works on one chunk of queries and holds no lock, so that chunks run on threads.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import numpy as np
from numba import njit

from anomalydino_plugin.kernels.heaps import NEVER, is_nearer, replace_lowest, similarity
from anomalydino_plugin.kernels.microkernel import LANES, QUERIES, raise_maxima

_SUM_IN_ANY_ORDER = {"reassoc", "contract", "nsz"}


@njit(nogil=True, cache=True)
def tile_maxima(queries, rows, count, image, left_out, maxima):  # pragma: no cover - compiled
    """Highest similarity of each query in each tile, in the panels' precision.

    Args:
        queries: (tiles of 8, steps, 8).
        rows: (groups, 8, steps, 2, 16).
        count: (groups,) rows of each group.
        image: (groups,) its image.
        left_out: image that is not looked at; -1 for none.
        maxima: (Q', groups * 16) float32 to fill, Q' = 8 times the tiles of queries.
    """
    maxima[:] = NEVER
    stride = maxima.shape[1]
    for group in range(rows.shape[0]):
        if image[group] == left_out:
            continue
        start = group * LANES
        for pair in range(rows.shape[1]):
            for tile in range(queries.shape[0]):
                place = tile * QUERIES * stride + start
                raise_maxima(queries, tile, rows, group * rows.shape[1] + pair, maxima, place, stride)
        used = (count[group] + LANES - 1) // LANES
        maxima[:, start + used : start + LANES] = NEVER  # repetitions of the last row


@njit(nogil=True, cache=True)
def _rows_of(tile, first, count):  # pragma: no cover - compiled
    """First and last row (exclusive) of a tile."""
    group, lane = tile // LANES, tile % LANES
    start = first[group] + lane * LANES
    return start, min(start + LANES, first[group] + count[group])


@njit(nogil=True, cache=True)
def find_nearest(queries, rows, first, count, maxima, reach, found):  # pragma: no cover - compiled
    """The k most similar rows of each query, compared in float32.

    Args:
        queries: (Q', D) float32.
        rows: (M, D) float32.
        first: (groups,) first row of each group.
        count: (groups,) rows of it.
        maxima: (Q', T) from ``tile_maxima``.
        reach: (Q',) by how much a maximum may be off.
        found: (Q', k) int64 to fill.
    """
    best = np.empty(found.shape[1], np.float32)
    for query in range(len(queries)):
        place = found[query]
        best[:], place[:] = NEVER, len(rows)
        highest = np.argmax(maxima[query])
        _look_nearest(queries, query, rows, _rows_of(highest, first, count), best, place)
        for tile in range(maxima.shape[1]):
            if tile != highest and maxima[query, tile] >= best[-1] - reach[query]:
                _look_nearest(queries, query, rows, _rows_of(tile, first, count), best, place)


@njit(nogil=True, cache=True)
def measure(queries, rows, found, distances):  # pragma: no cover - compiled
    """Distances to the rows found, summed in float64.

    Args:
        queries: (Q', D) float32.
        rows: (M, D) float32.
        found: (Q', k) int64.
        distances: (Q', k) float32 to fill.
    """
    for query in range(len(queries)):
        for rank in range(found.shape[1]):
            exact = 1.0 - _exact_similarity(queries, query, rows, found[query, rank])
            distances[query, rank] = min(max(exact, 0.0), 2.0)


@njit(nogil=True, cache=True, fastmath=_SUM_IN_ANY_ORDER)
def _exact_similarity(queries, query, rows, row):  # pragma: no cover - compiled
    """Dot product in float64."""
    total = 0.0
    for place in range(queries.shape[1]):
        total += np.float64(queries[query, place]) * np.float64(rows[row, place])
    return total


@njit(nogil=True, cache=True)
def _look_nearest(queries, query, rows, span, best, place):  # pragma: no cover - compiled
    for row in range(span[0], span[1]):
        value = similarity(queries, query, rows, row)
        at = len(best)
        while at > 0 and (value > best[at - 1] or (value == best[at - 1] and row < place[at - 1])):
            at -= 1
        for later in range(len(best) - 1, at, -1):
            best[later], place[later] = best[later - 1], place[later - 1]
        if at < len(best):
            best[at], place[at] = value, row


@njit(nogil=True, cache=True)
def find_lowest_images(
    queries, rows, first, count, image, maxima, reach, heap, best, place, offset
):  # pragma: no cover - compiled
    """Take the images' maxima of a block into the n highest of each query.

    Args:
        queries: (Q', D) float32.
        rows: (M, D) float32.
        first: (groups,) first row of each group.
        count: (groups,) rows of it.
        image: (groups,) its image.
        maxima: (Q', T) from ``tile_maxima``.
        reach: (Q',) by how much a maximum may be off.
        heap: (Q', n) float32, the lowest of them first; updated.
        best: (Q',) highest similarity so far; updated.
        place: (Q',) its row; updated.
        offset: number of the block's first row.
    """
    groups = len(image)
    for query in range(len(queries)):
        begin, nearest, nearest_row = 0, best[query], place[query]
        while begin < groups:
            end, top = begin * LANES, begin * LANES  # tiles: one beyond the image's last, and its highest
            while end < groups * LANES and image[end // LANES] == image[begin]:
                if maxima[query, end] > maxima[query, top]:
                    top = end
                end += 1
            highest = maxima[query, top]
            if highest > NEVER and highest >= heap[query, 0] - reach[query]:
                value = NEVER
                for tile in range(begin * LANES - 1, end):
                    first_look = tile < begin * LANES  # at the highest: few of the others may hold more than it does
                    if not first_look and (tile == top or maxima[query, tile] < value - reach[query]):
                        continue
                    start, stop = _rows_of(top if first_look else tile, first, count)
                    for row in range(start, stop):
                        exact = similarity(queries, query, rows, row)
                        value = max(value, exact)
                        if is_nearer(exact, row + offset, nearest, nearest_row):
                            nearest, nearest_row = exact, row + offset
                if value > heap[query, 0]:
                    replace_lowest(heap, query, value)
            begin = end // LANES
        best[query], place[query] = nearest, nearest_row
