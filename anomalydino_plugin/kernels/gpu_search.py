"""The search on a GPU: tiles' maxima in float16 by Triton, the rows within reach compared in float32 by torch.

Legend: ``Q`` queries, ``M`` reference rows, ``D`` features, ``T`` tiles, ``C`` candidate tiles of a query.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from anomalydino_plugin.kernels.rows import Lowest
from anomalydino_plugin.kernels.triton_maxima import TILE, tile_maxima

_NEVER = -2.0  # below any cosine similarity
_SUM_ERROR = 2.0**-23  # of float32 sums, for each feature
_GATHERED = 64 * 1024 * 1024  # elements of reference rows copied together for comparison: 256 MB


class HalfRows(NamedTuple):
    """Reference rows in two precisions. A ``Layout``.

    Attributes:
        rows: (M, D) float32.
        half: (M, D) float16.
        residual: largest norm of what rounding took from a row.
        starts: first row of each image, and the end of the last.
    """

    rows: Tensor
    half: Tensor
    residual: float
    starts: tuple[int, ...]

    def nearest(self, queries: Tensor, k: int) -> tuple[None, Tensor]:
        """See ``Layout``; the lower row first among equals."""
        maxima, reach = _maxima(queries, self, (0, 0))
        limit = maxima.topk(min(k, maxima.shape[1]), dim=1).values[:, -1:] - 2 * reach[:, None]
        found = torch.empty((len(queries), k), dtype=torch.int64, device=queries.device)
        for part, places, values in _compared(queries, self, maxima, limit, (0, 0)):
            order = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
            found[part] = places.gather(1, order)
        return None, found

    def take_in(self, queries: Tensor, lowest: Lowest, offset: int, left_out: int, *, by_image: bool) -> bool:
        """See ``Layout``; by patches alone."""
        if by_image:
            return False
        highest, best, place = lowest
        hidden = (0, 0) if left_out < 0 else (self.starts[left_out], self.starts[left_out + 1])
        maxima, reach = _maxima(queries, self, hidden)
        count = highest.shape[1]
        nth = maxima.topk(min(count, maxima.shape[1]), dim=1).values[:, -1:] - reach[:, None]
        if count > maxima.shape[1]:
            nth = torch.full_like(nth, _NEVER)
        limit = torch.maximum(nth, highest[:, :1]) - reach[:, None]
        for part, places, values in _compared(queries, self, maxima, limit, hidden):
            joined = torch.cat([highest[part], values], dim=1)
            highest[part] = joined.topk(count, dim=1).values.flip(1)
            top, position = values.max(dim=1)
            better = top > best[part]
            own = places.gather(1, position[:, None])[:, 0] + offset
            best[part], place[part] = torch.where(better, top, best[part]), torch.where(better, own, place[part])
        return True

    def take_in_each_other(self, *_: object) -> bool:
        """No: one way alone."""
        return False


def half_rows(rows: Tensor, lengths: tuple[int, ...]) -> HalfRows:
    """Round reference rows of unit length; see ``HalfRows``."""
    half = rows.half().contiguous()
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return HalfRows(rows, half, float((rows - half.float()).norm(dim=1).max()), tuple(starts))


def _maxima(queries: Tensor, references: HalfRows, hidden: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(Q, T) maxima of tiles, and (Q,) by how much they may be off."""
    half = queries.half().contiguous()
    lost = (queries - half.float()).norm(dim=1)
    reach = lost + references.residual + lost * references.residual + queries.shape[1] * _SUM_ERROR
    return tile_maxima(half, references.half, hidden, _NEVER), reach


def _compared(
    queries: Tensor, references: HalfRows, maxima: Tensor, limit: Tensor, hidden: tuple[int, int]
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of all tiles that reach the limit, by chunks of queries: (Q', C * 16) rows, ascending, and similarities."""
    within = (maxima >= limit) & (maxima > _NEVER)
    most = max(1, int(within.sum(dim=1).max()))
    inside = torch.arange(TILE, device=queries.device)
    step = max(1, _GATHERED // (most * TILE * queries.shape[1]))
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        tiles = maxima[part].masked_fill(~within[part], _NEVER).topk(most, dim=1).indices.sort(dim=1).values
        rows = (tiles[:, :, None] * TILE + inside).flatten(1)
        counted = within[part].gather(1, tiles).repeat_interleave(TILE, dim=1) & (rows < len(references.rows))
        counted &= (rows < hidden[0]) | (rows >= hidden[1])
        gathered = references.rows[rows.clamp(max=len(references.rows) - 1)]
        values = torch.einsum("qd,qrd->qr", queries[part], gathered)
        yield part, rows, values.masked_fill(~counted, _NEVER)
