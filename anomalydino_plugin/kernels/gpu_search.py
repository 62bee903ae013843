"""The search on a GPU: in float16 by Triton, the rows within reach compared again in float32.

Legend: ``Q`` queries, ``M`` reference rows, ``D`` features, ``T`` tiles, ``C`` candidates of a query.

``reach`` bounds how far a float16 similarity can be from the float32 one; every row that could belong to the result by
that bound is compared, so what is found is what float32 finds.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from anomalydino_plugin.kernels.rows import NEVER, SUM_ERROR, Lowest
from anomalydino_plugin.kernels.triton_products import PACKED, TILE, collect, tile_maxima
from anomalydino_plugin.kernels.triton_refine import nearest_of_tiles, similarities
from anomalydino_plugin.triton_launch import on_device_of, why_it_fails

_HELD = 256 * 1024 * 1024  # maxima of tiles, or elements of rows copied, that are held at a time: 1 GB
_ROOM = 1024  # places for candidates beyond twice those asked for
_ROUNDED = 1 << 18  # rows whose rounding is looked at at a time: no further copy of all
_SAMPLED = 16  # one of so many rows tells where the limit will be
_SURE = 5.0  # standard deviations that the limit is guessed too low, so that hardly ever too few rows reach it


class HalfRows(NamedTuple):
    """Reference rows in two precisions. A ``Layout``.

    Attributes:
        rows: (M, D) float32.
        half: (M, D) float16.
        residual: () float32, largest norm of what rounding took from a row.
        starts: first row of each image, and the end of the last.
        sample: (S,) int64 on the CPU, some of the rows, ascending.
        sampled: (S, D) float16, these.
    """

    rows: Tensor
    half: Tensor
    residual: Tensor
    starts: tuple[int, ...]
    sample: Tensor
    sampled: Tensor

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor | None, Tensor]:
        """See ``Layout``; the lower row first among equals."""
        step = max(1, _HELD // (len(self.rows) // TILE + 1))
        with on_device_of(queries):
            parts = [self._nearest(part.contiguous(), k) for part in torch.split(queries, step)]
        rows = torch.cat([found for _, found in parts])
        distances = [found for found, _ in parts if found is not None]
        return torch.cat(distances) if distances else None, rows

    def _nearest(self, queries: Tensor, k: int) -> tuple[Tensor | None, Tensor]:
        half, reach = _halved(queries, self)
        maxima = tile_maxima(half, self.half, NEVER)
        if k == 1:
            return nearest_of_tiles(queries, self.rows, maxima, reach, NEVER)
        return None, _nearest_rows(queries, self.rows, maxima, reach, k)

    @torch.inference_mode()  # what it updates may have been made in it
    def take_in(self, queries: Tensor, lowest: Lowest, offset: int, left_out: int, *, by_image: bool) -> bool:
        """See ``Layout``; by patches alone, and neither of few rows nor where too many are equally near for float16."""
        capacity = 2 * lowest.highest.shape[1] + _ROOM
        if by_image or len(self.rows) <= capacity or not len(queries):
            return False
        with on_device_of(queries):
            return self._take_in(queries.contiguous(), lowest, offset, left_out, capacity)

    def _take_in(self, queries: Tensor, lowest: Lowest, offset: int, left_out: int, capacity: int) -> bool:
        hidden = (0, 0) if left_out < 0 else (self.starts[left_out], self.starts[left_out + 1])
        candidates = _candidates(queries, self, lowest.highest, hidden, capacity)
        if candidates is None:
            return False
        found, limit, most = candidates
        values = similarities(queries, self.rows, found, limit, most, NEVER)
        top = values.max(dim=1).values
        own = torch.where(values == top[:, None], found.rows[:, :most], len(self.rows)).amin(dim=1).long() + offset
        better = top > lowest.best
        lowest.best.copy_(torch.where(better, top, lowest.best))
        lowest.rows.copy_(torch.where(better, own, lowest.rows))
        count = lowest.highest.shape[1]
        joined = torch.cat([lowest.highest, values], dim=1)
        lowest.highest.copy_(joined.topk(count, dim=1, sorted=False).values)
        return True

    def take_in_each_other(self, *_: object) -> bool:
        """No: one way alone."""
        return False


def half_rows(rows: Tensor, lengths: tuple[int, ...]) -> HalfRows:
    """Round reference rows of unit length; see ``HalfRows``."""
    rows = rows.contiguous()
    half = rows.half()
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    # Drawn, as every 16th patch would be of the same columns of many a grid.
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0), device="cpu")
    sample = drawn[: len(rows) // _SAMPLED].sort().values
    parts = zip(torch.split(rows, _ROUNDED), torch.split(half, _ROUNDED), strict=True)
    residual = torch.stack([(part - rounded.float()).norm(dim=1).max() for part, rounded in parts]).max()
    return HalfRows(rows, half, residual, tuple(starts), sample, half[sample.to(half.device)])


@functools.cache
def why_not(device: torch.device) -> str:
    """Why the search cannot run on a device; empty if it can. Compiles it: some seconds, once."""
    rows = torch.nn.functional.normalize(torch.arange(2.0 * _ROOM * 64, device=device).view(-1, 64).cos(), dim=1)
    layout, highest = half_rows(rows, (len(rows),)), torch.full((1, 1), NEVER, device=device)

    def trial() -> None:
        with on_device_of(rows):
            layout.nearest(rows[:1], 1)
            _candidates(rows[:1], layout, highest, (0, 0), _ROOM)

    return why_it_fails(trial, device)


def _halved(queries: Tensor, references: HalfRows) -> tuple[Tensor, Tensor]:
    """(Q, D) float16 queries, and (Q,) by how much their similarities may be off."""
    half = queries.half()
    lost = (queries - half.float()).norm(dim=1)
    off = lost + references.residual + lost * references.residual + queries.shape[1] * SUM_ERROR
    return half, off + PACKED


def _nearest_rows(queries: Tensor, rows: Tensor, maxima: Tensor, reach: Tensor, k: int) -> Tensor:
    """(Q, k) rows with the highest similarities, from all tiles within reach of the k-th highest maximum."""
    limit = maxima.topk(min(k, maxima.shape[1]), dim=1).values[:, -1:] - 2 * reach[:, None]
    within = maxima >= limit
    most = int(within.sum(dim=1).max())
    inside = torch.arange(TILE, device=queries.device)
    step = max(1, _HELD // (most * TILE * queries.shape[1]))
    if most * TILE * queries.shape[1] > _HELD:  # nearly all rows are equally near to some query
        return torch.stack([(rows @ one).sort(descending=True, stable=True).indices[:k] for one in queries])
    found = []
    for part in torch.split(torch.arange(len(queries), device=queries.device), step):
        tiles = maxima[part].masked_fill(~within[part], NEVER).topk(most, dim=1).indices.sort(dim=1).values
        members = (tiles[:, :, None] * TILE + inside).flatten(1)
        counted = within[part].gather(1, tiles).repeat_interleave(TILE, dim=1) & (members < len(rows))
        values = torch.einsum("qd,qrd->qr", queries[part], rows[members.clamp(max=len(rows) - 1)])
        order = values.masked_fill(~counted, NEVER).sort(dim=1, descending=True, stable=True).indices[:, :k]
        found.append(members.gather(1, order))
    return torch.cat(found)


class _Found(NamedTuple):
    """Rows that reached their query's limit: (Q,) int32 how many, (Q, C) float32 similarities, (Q, C) int32 rows."""

    filled: Tensor
    similarities: Tensor
    rows: Tensor


def _candidates(
    queries: Tensor, references: HalfRows, highest: Tensor, hidden: tuple[int, int], capacity: int
) -> tuple[_Found, Tensor, int] | None:
    """All rows that may be among the n nearest, found in one pass.

    Returns:
        Rows, of which those count that reach the (Q,) limit too, and how many one query has at most; ``None`` where
        they would be too many to hold.
    """
    half, reach = _halved(queries, references)
    count, total = highest.shape[1], len(references.rows)
    found = _Found(
        torch.zeros(len(queries), dtype=torch.int32, device=queries.device),
        torch.empty((len(queries), capacity), dtype=torch.float32, device=queries.device),
        torch.empty((len(queries), capacity), dtype=torch.int32, device=queries.device),
    )
    known = highest.amin(dim=1) - reach
    guess = _guess(half, references, count, hidden)
    if guess is not None:
        limit = torch.maximum(known, guess)
        collect(half, references.half, (0, total), hidden, limit, found)
        # The n-th highest itself may be off, and so may be those that belong before it.
        needed = _nth(found, capacity, count) - 2 * reach
        sure, most = torch.stack([((needed >= limit) | (guess <= known)).all().int(), found.filled.max()]).tolist()
        if sure and most <= capacity:
            return found, torch.maximum(limit, needed), max(1, most)
        found.filled.zero_()
    return _in_steps(half, references, known, reach, hidden, found, count)


def _guess(half: Tensor, references: HalfRows, count: int, hidden: tuple[int, int]) -> Tensor | None:
    """(Q,) a limit that about n of all rows reach or somewhat more, from a sample; ``None`` if that is too small."""
    expected = count / _SAMPLED
    rank = math.ceil(expected + _SURE * math.sqrt(expected)) + 1
    maxima = tile_maxima(half, references.sampled, NEVER)  # two that reach it hardly share a tile
    first, last = torch.searchsorted(references.sample, torch.tensor(hidden, device="cpu")).tolist()
    if last > first:
        maxima[:, first // TILE : (last - 1) // TILE + 1] = NEVER
    return maxima.topk(rank, dim=1, sorted=False).values.amin(dim=1) if rank <= maxima.shape[1] else None


def _in_steps(
    half: Tensor,
    references: HalfRows,
    limit: Tensor,
    reach: Tensor,
    hidden: tuple[int, int],
    found: _Found,
    count: int,
) -> tuple[_Found, Tensor, int] | None:
    """The same without a guess.

    The n-th highest similarity so far, less what it may be off, is the limit that later rows have to reach. As many
    rows are looked at as were before: about n of them reach a limit that n of all before did.
    """
    total, capacity = len(references.rows), found.rows.shape[1]
    most, done, step = 0, 0, capacity
    while done < total:
        before, step = found.filled.clone(), min(step, total - done)
        collect(half, references.half, (done, done + step), hidden, limit, found)
        reached = int(found.filled.max())
        if reached > capacity:  # fewer, in the end so few that they fit whatever they are
            found.filled.copy_(before)
            step = max(step // 4, capacity - most)
            continue
        done, most = done + step, reached
        if most > count:
            limit = torch.maximum(limit, _nth(found, most, count) - 2 * reach)
            most = _compact(found, most, limit)
            if most > capacity - _ROOM // 2:
                return None
        step = max(done, capacity - most)
    return found, limit, max(1, most)


def _reached(found: _Found, most: int, limit: Tensor) -> Tensor:
    """(Q, most) bool: which of the first places hold a row that reaches a limit."""
    taken = torch.arange(most, device=limit.device) < found.filled[:, None]
    return taken & (found.similarities[:, :most] >= limit[:, None])


def _nth(found: _Found, most: int, count: int) -> Tensor:
    """(Q,) the ``count``-th highest of those that count."""
    taken = torch.arange(most, device=found.rows.device) < found.filled[:, None]
    values = found.similarities[:, :most].masked_fill(~taken, NEVER)
    return values.topk(count, dim=1, sorted=False).values.amin(dim=1)


def _compact(found: _Found, most: int, limit: Tensor) -> int:
    """Close up those that reach the limit, in place; how many one query has at most."""
    kept = _reached(found, most, limit)
    after = kept.cumsum(dim=1, dtype=torch.int32)
    found.filled.copy_(after[:, -1])
    left = int(found.filled.max())
    target = torch.where(kept, after - 1, left).long()  # the others share one place more, cut off
    for values in (found.similarities, found.rows):
        closed = torch.zeros((len(values), left + 1), dtype=values.dtype, device=values.device)
        values[:, :left] = closed.scatter_(1, target, values[:, :most])[:, :left]
    return left
