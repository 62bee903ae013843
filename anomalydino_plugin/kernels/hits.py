"""Compiled second half of a search both ways: what was listed for the rows of a block is taken into what they keep."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from numba import njit

from anomalydino_plugin.kernels.heaps import is_nearer, replace_lowest, similarity


@njit(nogil=True, cache=True)
def raise_bars(hits, values, start, stop, reach, bars):  # pragma: no cover - compiled
    """Raise the n highest bars of some of the rows of a list of ``find_lowest``.

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
    """Take a list of ``find_lowest`` into the n highest similarities of some of its rows: the queries here.

    Args:
        hits: (H, 2) int32.
        values: (H,) float32.
        start: first of these rows.
        stop: one beyond the last.
        queries: (M, D) float32, all rows of their block.
        rows: (Q, D) float32, those of the other block.
        again: as for ``find_lowest``.
        reach: as for ``raise_bars``, which comes first where products are computed again.
        bars: as there.
        heap: (stop - start, n) float32; updated.
        best: (stop - start,) highest similarity so far; updated.
        place: (stop - start,) its row; updated.
        offset: number of the other block's first row.
    """
    for number in range(len(values)):
        query, row = hits[number, 0], hits[number, 1]
        own = query - start
        if start <= query < stop and values[number] >= bars[own, 0] - reach:
            value = similarity(queries, query, rows, row) if again else values[number]
            if is_nearer(value, row + offset, best[own], place[own]):
                best[own], place[own] = value, row + offset
            if value > heap[own, 0]:
                replace_lowest(heap, own, value)
