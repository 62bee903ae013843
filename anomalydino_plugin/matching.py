"""Nearest reference patches, streamed over the bank.

Legend: ``Q`` query patches, ``M`` bank rows, ``D`` features, ``k`` neighbours.

All rows are L2-normalised, so the cosine distance is ``1 - q . r`` (arXiv 2405.14529, equation 1). No [Q, M]
matrix is ever made. What is here runs on any device; ``kernels`` holds a faster search for processors that allow it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anomalydino_plugin.errors import BankError, ConfigError
from anomalydino_plugin.full_precision import full_precision
from anomalydino_plugin.kernels.rows import SearchRows

BLOCK_ELEMENTS = 8 * 1024 * 1024  # 32 MB of float32 similarities
_QUERY_BLOCK = 1024


class Match(NamedTuple):
    """What each query patch matched.

    Attributes:
        distances: (Q, k) float32 in [0, 2], ascending along k.
        rows: (Q, k) int64 rows of the bank; among equal distances the lower row comes first.
    """

    distances: Tensor
    rows: Tensor


def nearest(queries: Tensor, bank: Tensor | SearchRows, *, k: int = 1, block_elements: int = BLOCK_ELEMENTS) -> Match:
    """The k nearest bank rows of every query by cosine distance.

    The distances reported are recomputed for the rows found, so they do not depend on kernel or blocks.

    Args:
        queries: (Q, D) float32, L2-normalised.
        bank: (M, D) float32, L2-normalised, on the same device: searched in blocked matrix products. Or what
            ``search_rows`` made of it: searched by its kernel.
        k: neighbours, 1 <= k <= M.
        block_elements: similarities held at a time; bounds memory, never changes the result.

    Returns:
        ``Match`` on the device of the queries.

    Raises:
        BankError: an empty bank, or one of other width.
        ConfigError: k or block_elements out of range.
    """
    reference = bank.rows if isinstance(bank, SearchRows) else bank
    _check(queries, reference, k, block_elements)
    if not len(queries):
        return Match(queries.new_zeros((0, k)), torch.zeros((0, k), dtype=torch.int64, device=queries.device))
    with full_precision(queries.device.type):
        if isinstance(bank, SearchRows) and bank.layout is not None:
            distances, rows = bank.layout.nearest(queries, k)
            return _ordered(_distances_of(queries, reference, rows) if distances is None else distances, rows)
        blocks = [_nearest_block(part, reference, k, block_elements) for part in torch.split(queries, _QUERY_BLOCK)]
        rows = torch.cat(blocks)
        return _ordered(_distances_of(queries, reference, rows), rows)


def _check(queries: Tensor, bank: Tensor, k: int, block_elements: int) -> None:
    if bank.ndim != 2 or bank.shape[0] == 0:
        raise BankError(f"memory bank of shape {tuple(bank.shape)}: expected at least one row. Add reference images.")
    if queries.ndim != 2 or queries.shape[1] != bank.shape[1]:
        raise BankError(
            f"queries of shape {tuple(queries.shape)} against a bank of shape {tuple(bank.shape)}: the number of "
            "features must agree. Use the backbone that built the bank."
        )
    if not 1 <= k <= bank.shape[0]:
        raise ConfigError(f"k={k}: expected 1 to {bank.shape[0]}, the number of bank rows.")
    if block_elements < 1:
        raise ConfigError(f"block_elements={block_elements}: expected a positive number.")


def _nearest_block(queries: Tensor, bank: Tensor, k: int, block_elements: int) -> Tensor:
    """Rows of the k most similar bank rows for one block of queries, (q, k)."""
    best_similarity: Tensor | None = None
    best_rows: Tensor | None = None
    step = max(1, block_elements // max(1, queries.shape[0]))
    for start in range(0, bank.shape[0], step):
        similarity = queries @ bank[start : start + step].T
        values, rows = _top(similarity, min(k, similarity.shape[1]))
        rows = rows + start
        if best_similarity is not None and best_rows is not None:
            # Earlier rows stand first, so that a stable selection keeps the lower row among equals.
            values, rows = torch.cat([best_similarity, values], 1), torch.cat([best_rows, rows], 1)
            values, picked = values.sort(dim=1, descending=True, stable=True)
            values, rows = values[:, :k], rows.gather(1, picked[:, :k])
        best_similarity, best_rows = values, rows
    if best_rows is None:  # unreachable: the bank has a row
        raise BankError("memory bank without rows")
    return best_rows


def _top(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if k == 1:
        values, rows = similarity.max(dim=1, keepdim=True)
        return values, rows
    values, rows = similarity.topk(k, dim=1)
    return values, rows


def _distances_of(queries: Tensor, bank: Tensor, rows: Tensor) -> Tensor:
    """Cosine distance to given rows, (Q, k), summed in float64: exact whatever the search did."""
    parts = []
    for q, r in zip(torch.split(queries, _QUERY_BLOCK), torch.split(rows, _QUERY_BLOCK), strict=True):
        similarity = torch.einsum("qd,qkd->qk", q.double(), bank[r].double())
        parts.append((1.0 - similarity).clamp(0.0, 2.0).float())
    return torch.cat(parts)


def _ordered(distances: Tensor, rows: Tensor) -> Match:
    """Ascending by distance, then by row."""
    if rows.shape[1] == 1:
        return Match(distances, rows)
    by_row = rows.argsort(dim=1)
    distances, rows = distances.gather(1, by_row), rows.gather(1, by_row)
    distances, by_distance = distances.sort(dim=1, stable=True)
    return Match(distances, rows.gather(1, by_distance))
