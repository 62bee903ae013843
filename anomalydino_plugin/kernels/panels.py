"""Rows laid out for the innermost loop: pairs of bfloat16 features as uint32, or single float32 ones.

Query panels: [tile of 8 queries][step][query]. Row panels: [group of 256 rows][pair of vectors][step][vector][lane],
where lane ``l`` of vector ``v`` is row ``16 l + v`` of the group: the maxima over vectors are those of 16 neighbours.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from anomalydino_plugin.kernels.microkernel import LANES, QUERIES, VECTORS

GROUP = LANES * LANES  # rows of a group; a tile is 16 neighbours
_PAIRS = LANES // VECTORS
_ALIGNMENT = 64

Floats = NDArray[np.float32]
Words = NDArray[Any]  # uint32 or float32
Counts = NDArray[np.int64]


class RowPanels(NamedTuple):
    """Reference rows.

    Attributes:
        words: (groups, 8, steps, 2, 16) uint32 or float32.
        first: (groups,) first row of each group.
        filled: (groups,) rows in it, 1 to 256; the rest of the panel repeats the last one.
        image: (groups,) which image the group is from; no group spans two.
        residual: largest norm of what rounding took from a row.
    """

    words: Words
    first: Counts
    filled: Counts
    image: Counts
    residual: float


def pack_rows(rows: Floats, lengths: Sequence[int], bfloat16: bool) -> RowPanels:
    """Lay out reference rows.

    Args:
        rows: (M, D) float32, D even.
        lengths: rows of each image, summing to M.
        bfloat16: round to it; else float32.
    """
    groups = [
        (start + inside, min(GROUP, length - inside), image)
        for image, (start, length) in enumerate(zip(np.cumsum([0, *lengths[:-1]]), lengths, strict=True))
        for inside in range(0, length, GROUP)
    ]
    first, filled, image = np.array(groups, np.int64).reshape(-1, 3).T.copy()
    words = _aligned((len(groups), _PAIRS, _steps(rows, bfloat16), VECTORS, LANES))
    residual = _fill_rows(rows, first, filled, bfloat16, words)
    return RowPanels(words if bfloat16 else words.view(np.float32), first, filled, image, float(residual))


def pack_queries(queries: Floats, bfloat16: bool) -> tuple[Words, Floats]:
    """Lay out queries; the last tile is filled up with zeros.

    Args:
        queries: (Q, D) float32, D even.
        bfloat16: round to it; else float32.

    Returns:
        (ceil(Q / 8), steps, 8) uint32 or float32, and (Q,) norms of what rounding took away.
    """
    words = _aligned((-(-len(queries) // QUERIES), _steps(queries, bfloat16), QUERIES))
    residuals = np.zeros(len(queries), np.float32)
    _fill_queries(queries, bfloat16, words, residuals)
    return words if bfloat16 else words.view(np.float32), residuals


def _steps(rows: Floats, bfloat16: bool) -> int:
    width: int = rows.shape[1]
    return width // 2 if bfloat16 else width


def _aligned(shape: tuple[int, ...]) -> Words:
    size = int(np.prod(shape)) * 4
    memory = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    words: Words = memory[start : start + size].view(np.uint32).reshape(shape)
    return words


@njit(nogil=True, cache=True)
def row_inside(pair, bit):  # pragma: no cover - compiled
    """Row of a group that lies in a lane of a pair of vectors; the lanes are counted through both, 0 to 31."""
    return bit % LANES * LANES + pair * VECTORS + bit // LANES


@njit(nogil=True, cache=True)
def _rounded(bits):  # pragma: no cover - compiled
    """Nearest bfloat16 of a float32, ties to even; both as bits."""
    return np.uint32((np.uint64(bits) + np.uint64(0x7FFF) + np.uint64((bits >> 16) & 1)) >> 16)


@njit(nogil=True, cache=True)
def _pack_one(bits, values, bfloat16, words):  # pragma: no cover - compiled
    """One row into a strided view of 32-bit words; returns the norm of what rounding took away."""
    if not bfloat16:
        for step in range(len(bits)):
            words[step] = bits[step]
        return np.float32(0.0)
    lost = 0.0
    back = np.empty(1, np.uint32)
    for step in range(len(bits) // 2):
        low, high = _rounded(bits[2 * step]), _rounded(bits[2 * step + 1])
        words[step] = low | (high << np.uint32(16))
        back[0] = low << np.uint32(16)
        lost += (np.float64(back.view(np.float32)[0]) - values[2 * step]) ** 2
        back[0] = high << np.uint32(16)
        lost += (np.float64(back.view(np.float32)[0]) - values[2 * step + 1]) ** 2
    return np.float32(np.sqrt(lost))


@njit(nogil=True, cache=True)
def _fill_rows(rows, first, filled, bfloat16, words):  # pragma: no cover - compiled
    bits = rows.view(np.uint32)
    residual = np.float32(0.0)
    for group in range(len(first)):
        for place in range(LANES * LANES):
            row = first[group] + min(place, filled[group] - 1)
            lane, vector = place // LANES, place % LANES
            target = words[group, vector // VECTORS, :, vector % VECTORS, lane]
            residual = max(residual, _pack_one(bits[row], rows[row], bfloat16, target))
    return residual


@njit(nogil=True, cache=True)
def _fill_queries(queries, bfloat16, words, residuals):  # pragma: no cover - compiled
    bits = queries.view(np.uint32)
    for query in range(len(queries)):
        target = words[query // QUERIES, :, query % QUERIES]
        residuals[query] = _pack_one(bits[query], queries[query], bfloat16, target)
