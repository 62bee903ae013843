"""Float16 products on a GPU that end in what is kept of them, so that the similarities are never written.

Legend: ``Q`` queries, ``M`` reference rows, ``D`` features, ``T = ceil(M / 16)`` tiles, ``C`` places for rows.

Runs under Triton's interpreter too (``TRITON_INTERPRET=1``, tensors on the CPU), which is how it is tested where there
is no GPU.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 16
PACKED = 2.0**-14  # more than what the place in the block takes from a similarity of ``collect``


class Blocks(NamedTuple):
    """How a product is cut; tuned on an H100 (``docs/benchmarks``).

    Attributes:
        queries: of one program.
        rows: of one program, at most 256 where ``PACKED`` is to hold.
        features: multiplied at a time.
        warps: of one program.
        stages: of loads under way.
    """

    queries: int = 128
    rows: int = 256
    features: int = 64
    warps: int = 8
    stages: int = 3


_MAXIMA = Blocks()
_COLLECT = Blocks(rows=128, warps=4)


@triton.jit
def _block(  # pragma: no cover - compiled
    queries,
    rows,
    query_count,
    query_blocks,
    first_row,
    row_count,
    width: tl.constexpr,
    block_queries: tl.constexpr,
    block_rows: tl.constexpr,
    block_features: tl.constexpr,
):
    # One axis, as others end at 65,535; queries first, so that programs of one time share the rows they read.
    own_queries = tl.program_id(0) % query_blocks * block_queries + tl.arange(0, block_queries)
    own_rows = first_row + tl.program_id(0) // query_blocks * block_rows + tl.arange(0, block_rows)
    similarity = tl.zeros((block_queries, block_rows), dtype=tl.float32)
    # Beyond the last row the last row stands in: callers do not count it, and no load needs a mask.
    left_start = queries + tl.minimum(own_queries, query_count - 1).to(tl.int64)[:, None] * width
    right_start = rows + tl.minimum(own_rows, row_count - 1).to(tl.int64)[:, None] * width
    for start in range(0, width, block_features):
        features = start + tl.arange(0, block_features)
        if width % block_features == 0:
            left = tl.load(left_start + features[None, :])
            right = tl.load(right_start + features[None, :])
        else:
            inside = features[None, :] < width
            left = tl.load(left_start + features[None, :], mask=inside, other=0.0)
            right = tl.load(right_start + features[None, :], mask=inside, other=0.0)
        similarity = tl.dot(left, tl.trans(right), similarity)
    return own_queries, own_rows, similarity


@triton.jit
def _tile_maxima(  # pragma: no cover - compiled
    queries,
    rows,
    maxima,
    query_count,
    row_count,
    tile_count,
    query_blocks,
    width: tl.constexpr,
    block_queries: tl.constexpr,
    block_rows: tl.constexpr,
    block_features: tl.constexpr,
    tile: tl.constexpr,
    never: tl.constexpr,
):
    own_queries, own_rows, similarity = _block(
        queries, rows, query_count, query_blocks, 0, row_count, width, block_queries, block_rows, block_features
    )
    similarity = tl.where((own_rows < row_count)[None, :], similarity, never)
    highest = tl.max(tl.reshape(similarity, (block_queries, block_rows // tile, tile)), axis=2)
    own_tiles = tl.program_id(0) // query_blocks * (block_rows // tile) + tl.arange(0, block_rows // tile)
    tl.store(
        maxima + own_queries.to(tl.int64)[:, None] * tile_count + own_tiles[None, :],
        highest,
        mask=(own_queries[:, None] < query_count) & (own_tiles[None, :] < tile_count),
    )


@triton.jit
def _collect(  # pragma: no cover - compiled
    queries,
    rows,
    limit,
    filled,
    similarities,
    places,
    query_count,
    first_row,
    row_count,
    hidden_first,
    hidden_last,
    capacity,
    query_blocks,
    width: tl.constexpr,
    block_queries: tl.constexpr,
    block_rows: tl.constexpr,
    block_features: tl.constexpr,
):
    own_queries, own_rows, similarity = _block(
        queries, rows, query_count, query_blocks, first_row, row_count, width, block_queries, block_rows, block_features
    )
    # A similarity and its place in the block as one number that orders as the similarity does: one maximum finds both.
    inside = block_rows - 1
    start = first_row + tl.program_id(0) // query_blocks * block_rows
    keys = ((similarity + 2.0).to(tl.int32, bitcast=True) & ~inside) | tl.arange(0, block_rows)[None, :]
    counted = (own_rows < row_count) & ((own_rows < hidden_first) | (own_rows >= hidden_last))
    keys = tl.where(counted[None, :], keys, 0)
    asked = own_queries < query_count
    least = tl.maximum(tl.load(limit + own_queries, mask=asked, other=0.0) + 2.0, 0.0).to(tl.int32, bitcast=True)
    least = tl.maximum(least & ~inside, 1)
    best = tl.max(keys, axis=1)
    # Few rows of a block reach the limit, one query's mostly one: as many rounds as the busiest query has rows.
    passing = asked & (best >= least)
    while tl.max(passing.to(tl.int32), axis=0) > 0:
        place = tl.atomic_add(filled + own_queries, 1, mask=passing, sem="relaxed")
        fits = passing & (place < capacity)
        target = own_queries.to(tl.int64) * capacity + place
        tl.store(similarities + target, (best & ~inside).to(tl.float32, bitcast=True) - 2.0, mask=fits)
        tl.store(places + target, start + (best & inside), mask=fits)
        keys = tl.where(keys == best[:, None], 0, keys)
        best = tl.max(keys, axis=1)
        passing = asked & (best >= least)


def tile_maxima(queries: Tensor, rows: Tensor, never: float, blocks: Blocks = _MAXIMA) -> Tensor:
    """Highest similarity of each query in each tile of 16 neighbouring rows.

    Args:
        queries: (Q, D) float16, contiguous.
        rows: (M, D) float16 on the same device, contiguous.
        never: below any similarity.
        blocks: how to cut.

    Returns:
        (Q, T) float32.
    """
    tile_count = triton.cdiv(len(rows), TILE)
    maxima = torch.empty((len(queries), tile_count), dtype=torch.float32, device=queries.device)
    query_blocks = triton.cdiv(len(queries), blocks.queries)
    _tile_maxima[(query_blocks * triton.cdiv(len(rows), blocks.rows),)](
        queries,
        rows,
        maxima,
        len(queries),
        len(rows),
        tile_count,
        query_blocks,
        width=queries.shape[1],
        block_queries=blocks.queries,
        block_rows=blocks.rows,
        block_features=blocks.features,
        tile=TILE,
        never=never,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return maxima


def collect(
    queries: Tensor,
    rows: Tensor,
    part: tuple[int, int],
    hidden: tuple[int, int],
    limit: Tensor,
    found: tuple[Tensor, Tensor, Tensor],
    blocks: Blocks = _COLLECT,
) -> None:
    """Append the rows whose similarity reaches the query's limit.

    Args:
        queries: (Q, D) float16, contiguous.
        rows: (M, D) float16 on the same device, contiguous.
        part: first row to look at, and the end of the last.
        hidden: first row that does not count, and the end of the last.
        limit: (Q,) float32.
        found: (Q,) int32 places taken, (Q, C) float32 similarities, up to ``PACKED`` too low, (Q, C) int32 rows; in no
            order. Where more rows reach the limit than there are places, the first counts them all and the others
            hold some.
        blocks: how to cut.
    """
    filled, similarities, places = found
    query_blocks = triton.cdiv(len(queries), blocks.queries)
    _collect[(query_blocks * triton.cdiv(part[1] - part[0], blocks.rows),)](
        queries,
        rows,
        limit,
        filled,
        similarities,
        places,
        len(queries),
        part[0],
        part[1],
        *hidden,
        similarities.shape[1],
        query_blocks,
        width=queries.shape[1],
        block_queries=blocks.queries,
        block_rows=blocks.rows,
        block_features=blocks.features,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
