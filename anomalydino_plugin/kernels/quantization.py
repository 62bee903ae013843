"""Rows rounded to eight bits so that the sum of what is lost stays small, and how much that is.

Legend: ``D`` features, ``m`` the mean of the reference rows, ``H`` an orthogonal matrix.

The similarity of a query q and a row r is ``(q - m) . (r - m) + (q - m) . m + m . r``. Only the first product is
rounded, and of vectors that are shorter than q and r, as patch features share a large mean. Both are turned by H
first, random signs and a Walsh-Hadamard transform of blocks, which changes no product but spreads single large
features over their block: a row's step is its largest feature over 127. The transform is known from quantised networks
(QuIP#, arXiv 2402.04396); the bound is Cauchy-Schwarz, as for the other precisions.
"""
# mypy: disable-error-code="misc, no-untyped-def, untyped-decorator"
# ruff: noqa: ARG001 - numba reads the names of an intrinsic's arguments, its code gets them by their places

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from anomalydino_plugin.kernels.microkernel import LANES
from anomalydino_plugin.kernels.rows import SUM_ERROR

Floats = NDArray[np.float32]
FEATURES = 4  # of a 32-bit word
STEPS = 127  # from zero to the largest feature
ZERO = 128  # rows are stored unsigned, as the instruction wants one of its factors
_FIXED_ERROR = 16 * SUM_ERROR  # of adding the three products; and of the transform, for vectors of length 1
STEP, SUM, LOST, NORM = range(4)  # what ``quantize_lanes`` finds
_SIGNS_SEED = 0
_NOTHING = np.float32(1e-30)  # its inverse would be too large for float32


class Quantizer(NamedTuple):
    """What a block of reference rows and the queries that meet it have in common.

    Attributes:
        centre: (D,) float32, m.
        signs: (D,) float32, 1 or -1, times what makes the transform orthogonal.
        block: features of a Walsh-Hadamard transform, the largest power of two that divides D.
    """

    centre: Floats
    signs: Floats
    block: int


def quantizer_for(rows: Floats) -> Quantizer:
    """Centre and transform for (M, D) float32 rows."""
    width = rows.shape[1]
    block = width & -width
    signs = np.random.default_rng(_SIGNS_SEED).choice(np.array([1, -1], np.float32), width)
    centre = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    return Quantizer(centre, signs / np.float32(np.sqrt(block)), block)


def reach_of(lost: Floats, norms: Floats, residual: float, norm: float, width: int) -> Floats:
    """(Q,) by how much a product may be off.

    Args:
        lost: (Q,) norms of what rounding took from the queries.
        norms: (Q,) theirs, from the centre.
        residual: largest norm of what rounding took from a row.
        norm: largest of a row, from the centre.
        width: D.
    """
    error = lost * np.float32(norm) + (norms + lost) * np.float32(residual)
    sums = np.float32(width * SUM_ERROR)  # the norms themselves are sums of float32
    fixed = np.float32(_FIXED_ERROR) * (1 + norms * np.float32(norm))
    found: Floats = error * (1 + 2 * sums) + sums + fixed
    return found


@intrinsic
def _butterfly(_: Any, values: Any, one: Any, other: Any) -> Any:
    """Sum and difference of two rows of (D, 16) float32 in their places; numba would do this lane by lane."""

    def generate(context: Any, builder: Any, kinds: Any, arguments: Any) -> Any:
        first = context.make_array(kinds.args[0])(context, builder, arguments[0]).data
        data = builder.bitcast(first, ir.VectorType(ir.FloatType(), LANES).as_pointer())
        places = [builder.gep(data, [number]) for number in arguments[1:]]
        left, right = (builder.load(place, align=4) for place in places)
        builder.store(builder.fadd(left, right), places[0], align=4)
        builder.store(builder.fsub(left, right), places[1], align=4)
        return context.get_dummy_value()

    return types.void(values, types.intp, types.intp), generate


@njit(nogil=True, cache=True, fastmath={"contract", "nsz"})
def turn_lanes(rows, chosen, centre, signs, block, values):  # pragma: no cover - compiled
    """H (row - m) of some rows side by side, so that every step of the transform is one of vectors.

    Args:
        rows: (M, D) float32.
        chosen: (16,) which of them.
        centre: (D,) float32.
        signs: (D,) float32, as in ``Quantizer``.
        block: features of a transform.
        values: (D or more, 16) float32; the first D are filled.
    """
    width = len(centre)
    for lane in range(LANES):
        row = rows[chosen[lane]]  # once: inside the loop it would be looked up again for every feature
        for place in range(width):
            values[place, lane] = (row[place] - centre[place]) * signs[place]
    half = 1
    while half < block:
        for start in range(0, width, 2 * half):
            for place in range(start, start + half):
                _butterfly(values, place, place + half)
        half *= 2


@njit(nogil=True, cache=True, fastmath={"contract", "nsz"})
def quantize_lanes(values, zero, words, found):  # pragma: no cover - compiled
    """Round vectors to steps of their own, four features a 32-bit word, lowest byte first.

    Args:
        values: (F, 16) float32, a vector in each lane; F a multiple of 4, zeros behind its D features.
        zero: what is added to each feature to store it.
        words: (F / 4, 16) int32 to fill.
        found: (4, 16) float32 to fill: the step, the sum of the whole numbers of steps, the norm of what rounding took
            away, and the norm.
    """
    width = len(values)
    inverse, largest = np.empty(LANES, np.float32), np.zeros(LANES, np.float32)
    for place in range(width):
        for lane in range(LANES):
            largest[lane] = max(largest[lane], abs(values[place, lane]))
    for lane in range(LANES):
        exists = largest[lane] > _NOTHING
        found[STEP, lane] = largest[lane] / np.float32(STEPS) if exists else np.float32(0.0)
        inverse[lane] = np.float32(STEPS) / largest[lane] if exists else np.float32(0.0)
    found[SUM:] = 0.0
    for number in range(len(words)):
        for lane in range(LANES):
            word, total = np.int32(0), found[SUM, lane]
            residual, norm = found[LOST, lane], found[NORM, lane]
            for byte in range(FEATURES):
                value = values[FEATURES * number + byte, lane]
                steps = np.rint(value * inverse[lane])
                lost = value - steps * found[STEP, lane]
                total += steps
                residual += lost * lost
                norm += value * value
                word |= np.int32(np.int32(steps) + np.int32(zero) & np.int32(0xFF)) << np.int32(8 * byte)
            words[number, lane] = word
            found[SUM, lane], found[LOST, lane], found[NORM, lane] = total, residual, norm
    for lane in range(LANES):
        found[LOST, lane], found[NORM, lane] = np.sqrt(found[LOST, lane]), np.sqrt(found[NORM, lane])
