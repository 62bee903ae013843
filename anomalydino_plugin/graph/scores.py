"""Patch distances, image scores and anomaly maps of a batch.

Legend: ``B`` images, ``P`` patches, ``D`` features, ``M`` bank rows, ``k`` neighbours, ``H W`` pixels, ``h w`` grid.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from anomalydino_plugin.graph.axes import map_axis
from anomalydino_plugin.graph.images import Sizes

BANK_BLOCK = 16_384  # rows searched at a time: 64 MB of similarities for an image of 1024 patches


def nearest_distance(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    """Mean cosine distance to the k nearest bank rows, (B, P).

    The search runs on similarities in blocks; what is reported is ``|q - r|^2 / 2`` of the rows found, which loses
    nothing where distances are small.

    Args:
        queries: (B, P, D) float32, L2-normalised.
        bank: (M, D) float32, L2-normalised.
        k: neighbours.
    """
    similarities, rows = [], []
    for start in range(0, bank.shape[0], BANK_BLOCK):
        block = bank[start : start + BANK_BLOCK]
        values, index = _top(queries @ block.T, min(k, block.shape[0]))
        similarities.append(values)
        rows.append(index + start)
    found = rows[0]
    if len(rows) > 1:
        _, best = torch.cat(similarities, dim=2).topk(k, dim=2)
        found = torch.cat(rows, dim=2).gather(2, best)
    difference = queries[:, :, None, :] - bank[found]
    return (difference.square().sum(dim=3) / 2).clamp(0.0, 2.0).mean(dim=2)


def _top(similarities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if k == 1:  # one pass instead of a partial sort
        values, index = similarities.max(dim=2, keepdim=True)
        return values, index
    values, index = similarities.topk(k, dim=2)
    return values, index


def image_score(distances: Tensor, name: str, fraction: float) -> Tensor:
    """As ``scoring.image_score`` for (B, P) distances where P may be a symbol: ranks instead of slices."""
    if name == "max":
        return distances.amax(dim=1)
    patches = distances.shape[1]
    rank = torch.arange(patches, device=distances.device)
    if name == "quantile":
        # From below, as torch.quantile: a position rounds to another float32 from either end.
        weights = (1.0 - (rank.float() - fraction * (patches - 1)).abs()).clamp(min=0.0)
        return (distances.sort(dim=1).values * weights).sum(dim=1)
    ordered = distances.sort(dim=1, descending=True).values
    exact = Fraction(str(fraction))
    kept = ((rank + 1) * exact.denominator <= patches * exact.numerator) | (rank == 0)
    return (ordered * kept.float()).sum(dim=1) / kept.float().sum()


def anomaly_map(distances: Tensor, sizes: Sizes, sigma: float, patch_size: int, *, crop: bool) -> Tensor:
    """As ``scoring.anomaly_map``.

    Args:
        distances: (B, P).
        sizes: from ``plan_sizes``.
        sigma: pixels.
        patch_size: pixels.
        crop: whether the map lies on the cropped area, or is stretched over the image.

    Returns:
        (B, 1, H, W) float32.
    """
    rows, columns = (
        map_axis(patches, pixels, sigma, (patches * patch_size, resized) if crop else (1, 1), distances.device)
        for patches, pixels, resized in zip(sizes.grid, sizes.image, sizes.resized, strict=True)
    )
    grid = distances.reshape(-1, 1, sizes.grid[0], sizes.grid[1])
    return rows @ grid @ columns.T
