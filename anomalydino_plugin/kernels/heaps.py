"""Compiled parts that the searches share: one similarity, and what is kept of the similarities so far."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import numpy as np
from numba import njit

from anomalydino_plugin.kernels.rows import NEVER as _NEVER

NEVER = np.float32(_NEVER)  # numba keeps the type that a global has
_SUM_IN_ANY_ORDER = {"reassoc", "contract", "nsz"}


@njit(nogil=True, cache=True, fastmath=_SUM_IN_ANY_ORDER)
def similarity(queries, query, rows, row):  # pragma: no cover - compiled
    """Dot product in float32; the same two rows give the same bits wherever they stand.

    By index: a view of a row would be counted as a reference, which takes longer than the product.
    """
    total = np.float32(0.0)
    for place in range(queries.shape[1]):
        total += queries[query, place] * rows[row, place]
    return total


@njit(nogil=True, cache=True)
def is_nearer(value, row, highest, nearest):  # pragma: no cover - compiled
    """Whether a similarity and its row come before the highest and its own: the lower one of two that are equal."""
    return value > highest or (value == highest and row < nearest)


@njit(nogil=True, cache=True, inline="always")
def replace_lowest(heap, query, value):  # pragma: no cover - compiled
    """Put a value in the place of the query's lowest."""
    size, at = heap.shape[1], 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and heap[query, child + 1] < heap[query, child]:
            child += 1
        if heap[query, child] >= value:
            break
        heap[query, at] = heap[query, child]
        at = child
    heap[query, at] = value
