"""Rows laid out for the innermost loop, in 32-bit words: single float32 features, two of bfloat16 or four of int8.

Query panels: [tile of 8 queries][step][query]. Row panels: [group of 256 rows][pair of vectors][step][vector][lane],
where lane ``l`` of vector ``v`` is row ``16 l + v`` of the group: the maxima over vectors are those of 16 neighbours.
The words' type tells the innermost loop what they hold. After the features of int8 stand the numbers that make
similarities of its sums, see ``microkernel``.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from anomalydino_plugin.kernels.microkernel import LANES, QUERIES, QUERY_NUMBERS, ROW_NUMBERS, VECTORS
from anomalydino_plugin.kernels.quantization import (
    FEATURES,
    LOST,
    NORM,
    STEP,
    SUM,
    ZERO,
    Quantizer,
    quantize_lanes,
    quantizer_for,
    reach_of,
    turn_lanes,
)
from anomalydino_plugin.kernels.rows import SUM_ERROR, Precision
from anomalydino_plugin.kernels.threads import run_chunks

GROUP = LANES * LANES  # rows of a group; a tile is 16 neighbours
_PAIRS = LANES // VECTORS
_PART = 4  # groups that a thread rounds at a time
_ALIGNMENT = 64

_WORDS: dict[str, Any] = {"float32": np.float32, "bfloat16": np.uint32, "int8": np.int32}  # read by the innermost loop
_FEATURES = {"float32": 1, "bfloat16": 2, "int8": FEATURES}  # of a word

Floats = NDArray[np.float32]
Words = NDArray[Any]  # of 32 bits
Counts = NDArray[np.int64]


class RowPanels(NamedTuple):
    """Reference rows.

    Attributes:
        words: (groups, 8, steps, 2, 16) of the precision's type.
        first: (groups,) first row of each group.
        filled: (groups,) rows in it, 1 to 256; the rest of the panel repeats the last one.
        image: (groups,) which image the group is from; no group spans two.
        precision: of the products.
        width: D.
        residual: largest norm of what rounding took from a row.
        norm: largest of what was rounded: 1, or what is left without the centre.
        quantizer: of int8.
    """

    words: Words
    first: Counts
    filled: Counts
    image: Counts
    precision: Precision
    width: int
    residual: float
    norm: float
    quantizer: Quantizer | None


class QueryPanels(NamedTuple):
    """Queries laid out to meet certain rows.

    Attributes:
        words: (ceil(Q / 8), steps, 8) of the rows' type; the last tile is filled up with zeros.
        reach: (Q,) by how much a product with one of the rows may be off their similarity in float32.
    """

    words: Words
    reach: Floats


def pack_rows(rows: Floats, lengths: Sequence[int], precision: Precision) -> RowPanels:
    """Lay out reference rows.

    Args:
        rows: (M, D) float32, D even.
        lengths: rows of each image, summing to M.
        precision: what to round to.
    """
    groups = [
        (start + inside, min(GROUP, length - inside), image)
        for image, (start, length) in enumerate(zip(np.cumsum([0, *lengths[:-1]]), lengths, strict=True))
        for inside in range(0, length, GROUP)
    ]
    first, filled, image = np.array(groups, np.int64).reshape(-1, 3).T.copy()
    width = rows.shape[1]
    extra = ROW_NUMBERS if precision == "int8" else 0
    words = _aligned((len(groups), _PAIRS, _steps(width, precision) + extra, VECTORS, LANES), precision)
    quantizer, norm, residual = None, 1.0, 0.0
    if precision == "int8":
        quantizer = quantizer_for(rows)
        residual, norm = _quantize_on_threads(rows, first, filled, quantizer, words)
    elif precision == "bfloat16":
        residual = _round_rows(rows, first, filled, words)
    else:
        _copy_rows(rows, first, filled, words)
    return RowPanels(words, first, filled, image, precision, width, float(residual), float(norm), quantizer)


def pack_queries(queries: Floats, panels: RowPanels) -> QueryPanels:
    """Lay out queries, in the precision of the rows that they will meet.

    Args:
        queries: (Q, D) float32.
        panels: those rows.
    """
    precision, quantizer = panels.precision, panels.quantizer
    extra = QUERY_NUMBERS if quantizer else 0
    words = _aligned((-(-len(queries) // QUERIES), _steps(panels.width, precision) + extra, QUERIES), precision)
    lost = np.zeros(len(queries), np.float32)
    if quantizer:
        norms = np.zeros(len(queries), np.float32)
        _quantize_queries(queries, *quantizer, words, words.view(np.float32), lost, norms)
        return QueryPanels(words, reach_of(lost, norms, panels.residual, panels.norm, panels.width))
    if precision == "bfloat16":
        _round_queries(queries, words, lost)
    else:
        _copy_queries(queries, words)
    residual = np.float32(panels.residual)
    return QueryPanels(words, lost + residual + lost * residual + np.float32(panels.width * SUM_ERROR))


def _quantize_on_threads(
    rows: Floats, first: Counts, filled: Counts, quantizer: Quantizer, words: Words
) -> tuple[float, float]:
    found = []

    def work(part: slice) -> None:
        own = words[part]
        found.append(_quantize_rows(rows, first[part], filled[part], *quantizer, own, own.view(np.float32)))

    run_chunks(work, [slice(start, start + _PART) for start in range(0, len(first), _PART)])
    residuals, norms = zip((0.0, 0.0), *found, strict=True)
    return max(residuals), max(norms)


def _steps(width: int, precision: Precision) -> int:
    return -(-width // _FEATURES[precision])


def _aligned(shape: tuple[int, ...], precision: Precision) -> Words:
    size = int(np.prod(shape)) * 4
    memory = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    words: Words = memory[start : start + size].view(_WORDS[precision]).reshape(shape)
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
def _round_one(bits, values, words):  # pragma: no cover - compiled
    """One row into a strided view of words, two features each; returns the norm of what rounding took away."""
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


@njit(nogil=True, cache=True, inline="always")
def _place_in(first, filled, place):  # pragma: no cover - compiled
    """Of the group's 256 places: the row that it holds, its pair, vector and lane."""
    lane, vector = place // LANES, place % LANES
    return first + min(place, filled - 1), vector // VECTORS, vector % VECTORS, lane


@njit(nogil=True, cache=True)
def _copy_rows(rows, first, filled, words):  # pragma: no cover - compiled
    for group in range(len(first)):
        for place in range(LANES * LANES):
            row, pair, vector, lane = _place_in(first[group], filled[group], place)
            for step in range(rows.shape[1]):
                words[group, pair, step, vector, lane] = rows[row, step]


@njit(nogil=True, cache=True)
def _round_rows(rows, first, filled, words):  # pragma: no cover - compiled
    bits = rows.view(np.uint32)
    residual = np.float32(0.0)
    for group in range(len(first)):
        for place in range(LANES * LANES):
            row, pair, vector, lane = _place_in(first[group], filled[group], place)
            lost = _round_one(bits[row], rows[row], words[group, pair, :, vector, lane])
            residual = max(residual, lost)
    return residual


@njit(nogil=True, cache=True)
def _quantize_rows(rows, first, filled, centre, signs, block, words, words_as_floats):  # pragma: no cover - compiled
    """Returns the largest norm of what rounding took away, and of what was rounded."""
    steps = words.shape[2] - ROW_NUMBERS
    residual, norm = np.float32(0.0), np.float32(0.0)
    values, packed = np.zeros((FEATURES * steps, LANES), np.float32), np.empty((steps, LANES), np.int32)
    found, chosen = np.empty((4, LANES), np.float32), np.empty(LANES, np.int64)
    for group in range(len(first)):
        for number in range(LANES):
            pair, vector = number // VECTORS, number % VECTORS
            for lane in range(LANES):
                chosen[lane] = first[group] + min(LANES * lane + number, filled[group] - 1)
            turn_lanes(rows, chosen, centre, signs, block, values)
            quantize_lanes(values, ZERO, packed, found)
            for step in range(steps):
                for lane in range(LANES):
                    words[group, pair, step, vector, lane] = packed[step, lane]
            for lane in range(LANES):
                words_as_floats[group, pair, steps, vector, lane] = found[STEP, lane]
                words_as_floats[group, pair, steps + 1, vector, lane] = _product(rows, chosen[lane], centre)
                residual, norm = max(residual, found[LOST, lane]), max(norm, found[NORM, lane])
    return residual, norm


@njit(nogil=True, cache=True)
def _copy_queries(queries, words):  # pragma: no cover - compiled
    for query in range(len(queries)):
        for step in range(queries.shape[1]):
            words[query // QUERIES, step, query % QUERIES] = queries[query, step]


@njit(nogil=True, cache=True)
def _round_queries(queries, words, lost):  # pragma: no cover - compiled
    bits = queries.view(np.uint32)
    for query in range(len(queries)):
        lost[query] = _round_one(bits[query], queries[query], words[query // QUERIES, :, query % QUERIES])


@njit(nogil=True, cache=True)
def _quantize_queries(
    queries, centre, signs, block, words, words_as_floats, lost, norms
):  # pragma: no cover - compiled
    steps = words.shape[1] - QUERY_NUMBERS
    values, packed = np.zeros((FEATURES * steps, LANES), np.float32), np.empty((steps, LANES), np.int32)
    found, chosen = np.empty((4, LANES), np.float32), np.empty(LANES, np.int64)
    of_centre = _product(centre.reshape(1, -1), 0, centre)
    for start in range(0, len(queries), LANES):
        for lane in range(LANES):
            chosen[lane] = min(start + lane, len(queries) - 1)
        turn_lanes(queries, chosen, centre, signs, block, values)
        quantize_lanes(values, 0, packed, found)
        for lane in range(min(LANES, len(queries) - start)):
            query = start + lane
            tile, own = query // QUERIES, query % QUERIES
            for step in range(steps):
                words[tile, step, own] = packed[step, lane]
            words[tile, steps, own] = -ZERO * np.int32(found[SUM, lane])
            words_as_floats[tile, steps + 1, own] = found[STEP, lane]
            words_as_floats[tile, steps + 2, own] = _product(queries, query, centre) - of_centre
            lost[query], norms[query] = found[LOST, lane], found[NORM, lane]


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _product(rows, row, other):  # pragma: no cover - compiled
    total = 0.0
    for place in range(len(other)):
        total += np.float64(rows[row, place]) * np.float64(other[place])
    return total
