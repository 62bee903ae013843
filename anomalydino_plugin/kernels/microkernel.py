"""The innermost loop: similarities of 8 queries and 32 reference rows held in registers, folded into maxima.

Over the rows for each query, and where asked also over the queries for each row: the transposed product for nothing.

The loop is emitted as LLVM code because no array library has a matrix product that ends in a maximum, and because
numba has no spelling for the bfloat16 instruction. Two forms: ``vdpbf16ps`` (AVX512-BF16: two bfloat16 products added
in float32) and fused multiply-add in float32 (AVX-512).
"""

# mypy: disable-error-code="misc, untyped-decorator"

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

QUERIES, VECTORS, LANES = 8, 2, 16  # 16 accumulators, 2 reference vectors and the broadcasts fit 32 registers
_DOT_BF16 = "llvm.x86.avx512bf16.dpbf16ps.512"
_FMA, _MAXIMUM = "llvm.fma.v16f32", "llvm.maxnum.v16f32"


class _BFloat(ir.Type):
    """llvmlite has no bfloat."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


_INT, _LONG = ir.IntType(32), ir.IntType(64)
_FLOATS, _INTS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(_INT, LANES)
_PAIRS = ir.VectorType(_BFloat(), 2 * LANES)


def _function(builder: Any, name: str, arguments: list[Any]) -> Any:
    known = builder.module.globals.get(name)
    return known or ir.Function(builder.module, ir.FunctionType(_FLOATS, arguments), name)


def _broadcast(builder: Any, value: Any) -> Any:
    """The same 32 bits in every lane."""
    undefined = ir.Constant(_INTS, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_INTS, [0] * LANES))


def _multiply_add(builder: Any, bfloat16: bool, accumulator: Any, query: Any, rows: Any) -> Any:
    if bfloat16:
        function = _function(builder, _DOT_BF16, [_FLOATS, _PAIRS, _PAIRS])
        return builder.call(function, [accumulator, builder.bitcast(query, _PAIRS), builder.bitcast(rows, _PAIRS)])
    function = _function(builder, _FMA, [_FLOATS] * 3)
    return builder.call(function, [builder.bitcast(query, _FLOATS), builder.bitcast(rows, _FLOATS), accumulator])


def _emit(
    builder: Any, bfloat16: bool, queries: Any, rows: Any, steps: Any, maxima: Any, stride: Any, columns: Any = None
) -> None:
    """One loop over the features, then the maxima in memory are raised to the similarities found."""
    query_words = builder.bitcast(queries, _INT.as_pointer())
    row_words = builder.bitcast(rows, _INTS.as_pointer())
    before, loop, after = builder.block, builder.append_basic_block("features"), builder.append_basic_block("maxima")
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(_LONG)
    step.add_incoming(ir.Constant(_LONG, 0), before)
    sums = [[builder.phi(_FLOATS) for _ in range(VECTORS)] for _ in range(QUERIES)]
    vectors = [
        builder.load(builder.gep(row_words, [_at(builder, step, VECTORS, number)]), align=64)
        for number in range(VECTORS)
    ]
    found = []
    for number, own in enumerate(sums):
        word = builder.load(builder.gep(query_words, [_at(builder, step, QUERIES, number)]), align=4)
        query = _broadcast(builder, word)
        pairs = zip(own, vectors, strict=True)
        found.append([_multiply_add(builder, bfloat16, total, query, held) for total, held in pairs])
    following = builder.add(step, ir.Constant(_LONG, 1))
    step.add_incoming(following, loop)
    for own, new in zip(sums, found, strict=True):
        for accumulator, value in zip(own, new, strict=True):
            accumulator.add_incoming(ir.Constant(_FLOATS, [0.0] * LANES), before)
            accumulator.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", following, steps), loop, after)
    builder.position_at_end(after)
    for number, values in enumerate(found):
        _raise(builder, maxima, builder.mul(stride, ir.Constant(_LONG, number)), values)
    if columns is not None:
        for number in range(VECTORS):
            _raise(builder, columns, ir.Constant(_LONG, LANES * number), [values[number] for values in found])


def _raise(builder: Any, maxima: Any, offset: Any, values: list[Any]) -> None:
    """16 maxima in memory."""
    maximum = _function(builder, _MAXIMUM, [_FLOATS] * 2)
    place = builder.bitcast(builder.gep(maxima, [offset]), _FLOATS.as_pointer())
    highest = builder.load(place, align=4)
    for value in values:
        highest = builder.call(maximum, [highest, value])
    builder.store(highest, place, align=4)


def _at(builder: Any, step: Any, width: int, number: int) -> Any:
    return builder.add(builder.mul(step, ir.Constant(_LONG, width)), ir.Constant(_LONG, number))


@intrinsic
def raise_maxima(_: Any, queries: Any, rows: Any, maxima: Any, stride: Any) -> Any:  # noqa: ARG001 - an intp
    """Raise the maxima of 8 queries over 16 lanes to their similarities with 32 rows.

    Args:
        queries: (steps, 8) query panel, uint32 (pairs of bfloat16) or float32; contiguous.
        rows: (steps, 2, 16) row panel of the same type, contiguous, on a 64-byte boundary.
        maxima: float32, the first query's 16 maxima onwards.
        stride: elements from one query's maxima to the next one's.
    """
    return types.void(queries, rows, maxima, types.intp), _generate


@intrinsic
def raise_both(_: Any, queries: Any, rows: Any, maxima: Any, stride: Any, columns: Any) -> Any:  # noqa: ARG001
    """Raise the maxima of 8 queries over 16 lanes, and those of 32 rows over the queries.

    Args:
        queries: as for ``raise_maxima``.
        rows: as there.
        maxima: as there.
        stride: as there.
        columns: (2, 16) float32, contiguous.
    """
    return types.void(queries, rows, maxima, types.intp, columns), _generate


def _generate(context: Any, builder: Any, kinds: Any, arguments: Any) -> Any:
    panel, row_panel, target = (
        context.make_array(kind)(context, builder, value)
        for kind, value in zip(kinds.args[:3], arguments[:3], strict=True)
    )
    columns = None
    if len(arguments) > 4:
        columns = context.make_array(kinds.args[4])(context, builder, arguments[4]).data
    steps = builder.extract_value(panel.shape, 0)
    bfloat16 = kinds.args[0].dtype == types.uint32
    _emit(builder, bfloat16, panel.data, row_panel.data, steps, target.data, arguments[3], columns)
    return context.get_dummy_value()
