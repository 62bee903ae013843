"""The innermost loop: similarities of 8 queries and 32 reference rows held in registers, and what becomes of them.

They are folded into maxima (the nearest row), or those that reach a limit are marked (the n lowest distances): a limit
of each query, and where asked also one of each row, which is the transposed product for nothing.

The loop is emitted as LLVM code because no array library has a matrix product that ends in a comparison, and because
numba has no spelling for two of the instructions. Three forms, by the type of the panels' words: fused multiply-add
(float32: AVX-512), ``vdpbf16ps`` (uint32: two bfloat16 products added in float32, AVX512-BF16) and ``vpdpbusd`` (int32:
four products of 8 bits, one factor unsigned, added in 32, AVX512-VNNI).

Sums of the last are whole numbers, and ``sum * (query's step * row's step) + (query's part + row's part)`` is the
similarity. Panels hold these after their features: of a query where its sums begin (minus 128 times its features, as
rows are stored 128 too high), its step and its part; of a row its step and its part.
"""

# mypy: disable-error-code="misc, untyped-decorator"
# ruff: noqa: ARG001 - numba reads the names of an intrinsic's arguments, its code gets them by their places

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

QUERIES, VECTORS, LANES = 8, 2, 16  # 16 accumulators, 2 reference vectors and the broadcasts fit 32 registers
QUERY_NUMBERS, ROW_NUMBERS = 3, 2  # that stand after the features of int8
_DOT_BF16, _DOT_INT8 = "llvm.x86.avx512bf16.dpbf16ps.512", "llvm.x86.avx512.vpdpbusd.512"
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


def _function(builder: Any, name: str, arguments: list[Any], found: Any = _FLOATS) -> Any:
    known = builder.module.globals.get(name)
    return known or ir.Function(builder.module, ir.FunctionType(found, arguments), name)


def _broadcast(builder: Any, value: Any) -> Any:
    """The same 32 bits in every lane."""
    undefined = ir.Constant(_INTS, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_INTS, [0] * LANES))


def _multiply_add(builder: Any, kind: Any, accumulator: Any, query: Any, rows: Any) -> Any:
    if kind == types.int32:
        function = _function(builder, _DOT_INT8, [_INTS] * 3, _INTS)
        return builder.call(function, [accumulator, rows, query])  # the first factor is the unsigned one
    if kind == types.uint32:
        function = _function(builder, _DOT_BF16, [_FLOATS, _PAIRS, _PAIRS])
        return builder.call(function, [accumulator, builder.bitcast(query, _PAIRS), builder.bitcast(rows, _PAIRS)])
    function = _function(builder, _FMA, [_FLOATS] * 3)
    return builder.call(function, [builder.bitcast(query, _FLOATS), builder.bitcast(rows, _FLOATS), accumulator])


def _similarities(builder: Any, kind: Any, queries: Any, rows: Any, steps: Any) -> list[list[Any]]:
    """One loop over the features; the sums of each query and vector, with the builder after it."""
    query_words = builder.bitcast(queries, _INT.as_pointer())
    row_words = builder.bitcast(rows, _INTS.as_pointer())

    def query_word(step: Any, number: int) -> Any:
        word = builder.load(builder.gep(query_words, [_at(builder, step, QUERIES, number)]), align=4)
        return _broadcast(builder, word)

    def row_vector(step: Any, number: int) -> Any:
        return builder.load(builder.gep(row_words, [_at(builder, step, VECTORS, number)]), align=64)

    if kind == types.int32:
        begin = [query_word(steps, number) for number in range(QUERIES)]
    else:
        begin = [ir.Constant(_FLOATS, [0.0] * LANES)] * QUERIES
    before, loop, after = builder.block, builder.append_basic_block("features"), builder.append_basic_block("summed")
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(_LONG)
    step.add_incoming(ir.Constant(_LONG, 0), before)
    sums = [[builder.phi(value.type) for _ in range(VECTORS)] for value in begin]
    vectors = [row_vector(step, number) for number in range(VECTORS)]
    found = []
    for number, own in enumerate(sums):
        query = query_word(step, number)
        pairs = zip(own, vectors, strict=True)
        found.append([_multiply_add(builder, kind, total, query, held) for total, held in pairs])
    following = builder.add(step, ir.Constant(_LONG, 1))
    step.add_incoming(following, loop)
    for own, first, new in zip(sums, begin, found, strict=True):
        for accumulator, value in zip(own, new, strict=True):
            accumulator.add_incoming(first, before)
            accumulator.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", following, steps), loop, after)
    builder.position_at_end(after)
    if kind != types.int32:
        return found

    def after_steps(number: int) -> Any:
        return builder.add(steps, ir.Constant(_LONG, number))

    row_numbers = [
        [builder.bitcast(row_vector(after_steps(place), v), _FLOATS) for v in range(VECTORS)] for place in (0, 1)
    ]
    similarities = []
    for number, own in enumerate(found):
        numbers = [builder.bitcast(query_word(after_steps(place), number), _FLOATS) for place in (1, 2)]
        similarities.append([_scaled(builder, *part, *numbers) for part in zip(own, *row_numbers, strict=True)])
    return similarities


def _scaled(builder: Any, total: Any, row_step: Any, row_part: Any, query_step: Any, query_part: Any) -> Any:
    """A sum of products of 8 bits as a similarity."""
    fused = _function(builder, _FMA, [_FLOATS] * 3)
    parts = builder.fadd(row_part, query_part)
    return builder.call(fused, [builder.sitofp(total, _FLOATS), builder.fmul(row_step, query_step), parts])


def _raise(builder: Any, maxima: Any, offset: Any, values: list[Any]) -> None:
    """16 maxima in memory."""
    maximum = _function(builder, _MAXIMUM, [_FLOATS] * 2)
    place = builder.bitcast(builder.gep(maxima, [offset]), _FLOATS.as_pointer())
    highest = builder.load(place, align=4)
    for value in values:
        highest = builder.call(maximum, [highest, value])
    builder.store(highest, place, align=4)


def _mark(builder: Any, values: list[list[Any]], limits: list[list[Any]], masks: Any) -> Any:
    """One mask of 32 bits a query in memory: which similarities reach their limit; returns all of them joined."""
    joined = ir.Constant(_INT, 0)
    for number, (own, limit) in enumerate(zip(values, limits, strict=True)):
        mask = ir.Constant(_INT, 0)
        for vector, (value, least) in enumerate(zip(own, limit, strict=True)):
            bits = builder.bitcast(builder.fcmp_ordered(">=", value, least), ir.IntType(LANES))
            shift = ir.Constant(_INT, LANES * vector)
            mask = builder.or_(mask, builder.shl(builder.zext(bits, _INT), shift))
        builder.store(mask, builder.gep(masks, [ir.Constant(_LONG, number)]))
        joined = builder.or_(joined, mask)
    return joined


def _keep(builder: Any, values: list[list[Any]], products: Any) -> None:
    """(8, 32) similarities in memory."""
    place = builder.bitcast(products, _FLOATS.as_pointer())
    for number, value in enumerate(value for own in values for value in own):
        builder.store(value, builder.gep(place, [ir.Constant(_LONG, number)]), align=4)


def _at(builder: Any, step: Any, width: int, number: int) -> Any:
    return builder.add(builder.mul(step, ir.Constant(_LONG, width)), ir.Constant(_LONG, number))


@intrinsic
def raise_maxima(_: Any, queries: Any, tile: Any, rows: Any, panel: Any, maxima: Any, start: Any, stride: Any) -> Any:
    """Raise the maxima of 8 queries over 16 lanes to their similarities with 32 rows.

    Whole arrays and places in them: a view for each call would be counted as a reference.

    Args:
        queries: (tiles, steps, 8) query panels, see above; contiguous.
        tile: which of them.
        rows: (groups, 8, steps, 2, 16) row panels of the same type, contiguous, on a 64-byte boundary.
        panel: which of them, counted over groups.
        maxima: float32.
        start: place of the first query's 16 maxima in it.
        stride: elements from one query's maxima to the next one's.
    """

    def generate(context: Any, builder: Any, kinds: Any, arguments: Any) -> Any:
        found = _product(context, builder, kinds, arguments)
        target = builder.gep(_data(context, builder, kinds, arguments, 4), [arguments[5]])
        for number, values in enumerate(found):
            _raise(builder, target, builder.mul(arguments[6], ir.Constant(_LONG, number)), values)
        return context.get_dummy_value()

    return types.void(queries, types.intp, rows, types.intp, maxima, types.intp, types.intp), generate


@intrinsic
def mark_above(_: Any, queries: Any, tile: Any, rows: Any, panel: Any, limits: Any, products: Any, masks: Any) -> Any:
    """Similarities of 8 queries with 32 rows, and which of them reach their query's limit.

    Args:
        queries: as for ``raise_maxima``.
        tile: as there.
        rows: as there.
        panel: as there.
        limits: (8 tiles,) float32.
        products: (8, 32) float32 to fill.
        masks: (8,) uint32 to fill: bit ``16 v + l`` is lane l of vector v.

    Returns:
        uint32, all masks joined.
    """

    def generate(context: Any, builder: Any, kinds: Any, arguments: Any) -> Any:
        found = _product(context, builder, kinds, arguments)
        _keep(builder, found, _data(context, builder, kinds, arguments, 5))
        limits = _query_limits(context, builder, kinds, arguments)
        return _mark(builder, found, limits, _data(context, builder, kinds, arguments, 6))

    return types.uint32(queries, types.intp, rows, types.intp, limits, products, masks), generate


@intrinsic
def mark_above_both(
    _: Any,
    queries: Any,
    tile: Any,
    rows: Any,
    panel: Any,
    limits: Any,
    products: Any,
    masks: Any,
    row_limits: Any,
    row_masks: Any,
) -> Any:
    """``mark_above``, and which similarities reach their row's limit.

    Args:
        queries: as there.
        tile: as there.
        rows: as there.
        panel: as there.
        limits: as there.
        products: as there.
        masks: as there.
        row_limits: (groups, 8, 2, 16) float32.
        row_masks: as ``masks``, by the rows' limits.

    Returns:
        uint32, all masks of both kinds joined.
    """

    def generate(context: Any, builder: Any, kinds: Any, arguments: Any) -> Any:
        found = _product(context, builder, kinds, arguments)
        _keep(builder, found, _data(context, builder, kinds, arguments, 5))
        limits = _query_limits(context, builder, kinds, arguments)
        place = builder.bitcast(_data(context, builder, kinds, arguments, 7), _FLOATS.as_pointer())
        own = [
            builder.load(builder.gep(place, [_at(builder, arguments[3], VECTORS, number)]), align=4)
            for number in range(VECTORS)
        ]
        for_queries = _mark(builder, found, limits, _data(context, builder, kinds, arguments, 6))
        for_rows = _mark(builder, found, [own] * QUERIES, _data(context, builder, kinds, arguments, 8))
        return builder.or_(for_queries, for_rows)

    arguments = (queries, types.intp, rows, types.intp, limits, products, masks, row_limits, row_masks)
    return types.uint32(*arguments), generate


@intrinsic
def lowest_bit(_: Any, mask: Any) -> Any:
    """Number of the lowest bit set in a uint32 that is not 0."""

    def generate(context: Any, builder: Any, kinds: Any, arguments: Any) -> Any:
        found = builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))
        return builder.zext(found, _LONG)

    return types.intp(types.uint32), generate


def _data(context: Any, builder: Any, kinds: Any, arguments: Any, number: int) -> Any:
    """Pointer to an array's first element."""
    return context.make_array(kinds.args[number])(context, builder, arguments[number]).data


def _product(context: Any, builder: Any, kinds: Any, arguments: Any) -> list[list[Any]]:
    """Of the tile and the panel that the first four arguments name."""
    panels = context.make_array(kinds.args[0])(context, builder, arguments[0])
    kind, width = kinds.args[0].dtype, builder.extract_value(panels.shape, 1)
    numbers = QUERY_NUMBERS if kind == types.int32 else 0
    steps = builder.sub(width, ir.Constant(_LONG, numbers))
    row_width = builder.add(steps, ir.Constant(_LONG, ROW_NUMBERS if numbers else 0))
    tile = builder.mul(builder.mul(arguments[1], width), ir.Constant(_LONG, QUERIES))
    panel = builder.mul(builder.mul(arguments[3], row_width), ir.Constant(_LONG, VECTORS * LANES))
    rows = _data(context, builder, kinds, arguments, 2)
    return _similarities(builder, kind, builder.gep(panels.data, [tile]), builder.gep(rows, [panel]), steps)


def _query_limits(context: Any, builder: Any, kinds: Any, arguments: Any) -> list[list[Any]]:
    """The tile's limits, each in all lanes of all vectors."""
    place = builder.bitcast(_data(context, builder, kinds, arguments, 4), _INT.as_pointer())
    found = []
    for number in range(QUERIES):
        word = builder.load(builder.gep(place, [_at(builder, arguments[1], QUERIES, number)]), align=4)
        found.append([builder.bitcast(_broadcast(builder, word), _FLOATS)] * VECTORS)
    return found
