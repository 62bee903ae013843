"""Maxima of tiles on a GPU: a matrix product that ends in maxima, so that the similarities are never written.

Legend: ``Q`` queries, ``M`` reference rows, ``D`` features, ``T = ceil(M / 16)`` tiles.

Runs under Triton's interpreter too (``TRITON_INTERPRET=1``, tensors on the CPU), which is how it is tested where there
is no GPU. Block sizes have not been tuned on one.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 16
_BLOCK_QUERIES, _BLOCK_ROWS, _BLOCK_FEATURES = 128, 128, 64


@triton.jit
def _tile_maxima(  # pragma: no cover - compiled
    queries,
    rows,
    maxima,
    query_count,
    row_count,
    tile_count,
    left_out_first,
    left_out_last,
    width: tl.constexpr,
    block_queries: tl.constexpr,
    block_rows: tl.constexpr,
    block_features: tl.constexpr,
    tile: tl.constexpr,
    never: tl.constexpr,
):
    own_queries = tl.program_id(0) * block_queries + tl.arange(0, block_queries)
    own_rows = tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    similarity = tl.zeros((block_queries, block_rows), dtype=tl.float32)
    for start in range(0, width, block_features):
        features = start + tl.arange(0, block_features)
        inside = features[None, :] < width
        left = tl.load(
            queries + own_queries[:, None] * width + features[None, :],
            mask=(own_queries[:, None] < query_count) & inside,
            other=0.0,
        )
        right = tl.load(
            rows + own_rows[:, None] * width + features[None, :],
            mask=(own_rows[:, None] < row_count) & inside,
            other=0.0,
        )
        similarity = tl.dot(left, tl.trans(right), similarity)
    counted = (own_rows < row_count) & ((own_rows < left_out_first) | (own_rows >= left_out_last))
    similarity = tl.where(counted[None, :], similarity, never)
    highest = tl.max(tl.reshape(similarity, (block_queries, block_rows // tile, tile)), axis=2)
    own_tiles = tl.program_id(1) * (block_rows // tile) + tl.arange(0, block_rows // tile)
    tl.store(
        maxima + own_queries[:, None] * tile_count + own_tiles[None, :],
        highest,
        mask=(own_queries[:, None] < query_count) & (own_tiles[None, :] < tile_count),
    )


def tile_maxima(queries: Tensor, rows: Tensor, left_out: tuple[int, int], never: float) -> Tensor:
    """Highest similarity of each query in each tile.

    Args:
        queries: (Q, D) float16 or bfloat16, contiguous.
        rows: (M, D) of the same type on the same device, contiguous.
        left_out: first and last (exclusive) row that do not count; the same number twice for none.
        never: what a tile without rows that count gets.

    Returns:
        (Q, T) float32.
    """
    tile_count = triton.cdiv(len(rows), TILE)
    maxima = torch.empty((len(queries), tile_count), dtype=torch.float32, device=queries.device)
    grid = (triton.cdiv(len(queries), _BLOCK_QUERIES), triton.cdiv(len(rows), _BLOCK_ROWS))
    _tile_maxima[grid](
        queries,
        rows,
        maxima,
        len(queries),
        len(rows),
        tile_count,
        *left_out,
        width=queries.shape[1],
        block_queries=_BLOCK_QUERIES,
        block_rows=_BLOCK_ROWS,
        block_features=_BLOCK_FEATURES,
        tile=TILE,
        never=never,
    )
    return maxima
