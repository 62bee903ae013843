"""What a float16 search on a GPU found, compared again: in float32, and the nearest row in float64.

Legend: ``Q`` queries, ``M`` reference rows, ``D`` features, ``T`` tiles, ``C`` rows found for a query.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from anomalydino_plugin.kernels.triton_products import TILE

_TILES_AT_ONCE = 8192
_ROWS_AT_ONCE = 16  # of one query
_FEATURES_AT_ONCE = 128


@triton.jit
def _nearest(  # pragma: no cover - compiled
    queries,
    rows,
    maxima,
    reach,
    distances,
    found,
    row_count,
    tile_count,
    width: tl.constexpr,
    padded_width: tl.constexpr,
    tile: tl.constexpr,
    step: tl.constexpr,
    never: tl.constexpr,
):
    own = tl.program_id(0).to(tl.int64)
    features = tl.arange(0, padded_width)
    query = tl.load(queries + own * width + features, mask=features < width, other=0.0)
    highest = tl.full((step,), never, tl.float32)
    for start in range(0, tile_count, step):
        tiles = start + tl.arange(0, step)
        highest = tl.maximum(highest, tl.load(maxima + own * tile_count + tiles, mask=tiles < tile_count, other=never))
    limit = tl.max(highest, axis=0) - 2.0 * tl.load(reach + own)
    best = tl.full((), never, tl.float32)
    best_row = tl.full((), 0, tl.int32)
    for start in range(0, tile_count, step):
        tiles = start + tl.arange(0, step)
        values = tl.load(maxima + own * tile_count + tiles, mask=tiles < tile_count, other=never)
        waiting = tl.where(values >= limit, tiles, tile_count)
        first = tl.min(waiting, axis=0)
        while first < tile_count:
            inside = first * tile + tl.arange(0, tile)
            counted = inside < row_count
            content = tl.load(
                rows + inside.to(tl.int64)[:, None] * width + features[None, :],
                mask=counted[:, None] & (features[None, :] < width),
                other=0.0,
            )
            similarity = tl.where(counted, tl.sum(content * query[None, :], axis=1), never)
            top = tl.max(similarity, axis=0)
            top_row = tl.min(tl.where(similarity == top, inside, row_count), axis=0)
            best_row = tl.where(top > best, top_row, best_row)
            best = tl.maximum(top, best)
            waiting = tl.where(waiting == first, tile_count, waiting)
            first = tl.min(waiting, axis=0)
    content = tl.load(rows + best_row.to(tl.int64) * width + features, mask=features < width, other=0.0)
    similarity = tl.sum(content.to(tl.float64) * query.to(tl.float64), axis=0)
    tl.store(distances + own, (1.0 - similarity).to(tl.float32))
    tl.store(found + own, best_row.to(tl.int64))


@triton.jit
def _similarities(  # pragma: no cover - compiled
    queries,
    rows,
    filled,
    halves,
    places,
    limit,
    values,
    capacity,
    looked_at,
    width: tl.constexpr,
    part: tl.constexpr,
    step: tl.constexpr,
    never: tl.constexpr,
):
    own = tl.program_id(0).to(tl.int64)
    slots = tl.program_id(1) * step + tl.arange(0, step)
    inside = slots < looked_at
    taken = inside & (slots < tl.load(filled + own))
    taken &= tl.load(halves + own * capacity + slots, mask=taken, other=never) >= tl.load(limit + own)
    place = tl.load(places + own * capacity + slots, mask=taken, other=0)
    starts = rows + place.to(tl.int64)[:, None] * width
    sums = tl.zeros((step, part), dtype=tl.float32)
    for start in range(0, width, part):
        features = start + tl.arange(0, part)
        known = features < width
        query = tl.load(queries + own * width + features, mask=known, other=0.0)
        content = tl.load(starts + features[None, :], mask=taken[:, None] & known[None, :], other=0.0)
        sums += content * query[None, :]
    similarity = tl.sum(sums, axis=1)
    tl.store(values + own * looked_at + slots, tl.where(taken, similarity, never), mask=inside)


def nearest_of_tiles(
    queries: Tensor, rows: Tensor, maxima: Tensor, reach: Tensor, never: float
) -> tuple[Tensor, Tensor]:
    """The nearest row of each query, looked for in the tiles whose maximum is within reach of the highest.

    Args:
        queries: (Q, D) float32, contiguous.
        rows: (M, D) float32 on the same device, contiguous.
        maxima: (Q, T) float32, from ``tile_maxima``.
        reach: (Q,) float32, by how much they may be off.
        never: below any similarity.

    Returns:
        (Q, 1) float32 cosine distances, summed in float64, and (Q, 1) int64 rows, the lower one among equals.
    """
    distances = torch.empty((len(queries), 1), dtype=torch.float32, device=queries.device)
    found = torch.empty((len(queries), 1), dtype=torch.int64, device=queries.device)
    _nearest[(len(queries),)](
        queries,
        rows,
        maxima,
        reach,
        distances,
        found,
        len(rows),
        maxima.shape[1],
        width=queries.shape[1],
        padded_width=triton.next_power_of_2(queries.shape[1]),
        tile=TILE,
        step=min(_TILES_AT_ONCE, triton.next_power_of_2(maxima.shape[1])),
        never=never,
        num_warps=8,
    )
    return distances.clamp_(0.0, 2.0), found


def similarities(
    queries: Tensor,
    rows: Tensor,
    found: tuple[Tensor, Tensor, Tensor],
    limit: Tensor,
    most: int,
    never: float,
) -> Tensor:
    """Similarities in float32 of the rows found.

    Args:
        queries: (Q, D) float32, contiguous.
        rows: (M, D) float32 on the same device, contiguous.
        found: from ``triton_products.collect``.
        limit: (Q,) float32; those below are left alone.
        most: places to look at.
        never: for the others.

    Returns:
        (Q, most) float32.
    """
    filled, halves, places = found
    values = torch.empty((len(queries), most), dtype=torch.float32, device=queries.device)
    _similarities[len(queries), triton.cdiv(most, _ROWS_AT_ONCE)](
        queries,
        rows,
        filled,
        halves,
        places,
        limit,
        values,
        places.shape[1],
        most,
        width=queries.shape[1],
        part=_FEATURES_AT_ONCE,
        step=_ROWS_AT_ONCE,
        never=never,
    )
    return values
