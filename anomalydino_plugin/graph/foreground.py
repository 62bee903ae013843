"""Foreground masks of a batch without an eigenvalue solver or OpenCV.

Legend: ``B`` images, ``h w`` patch grid, ``P = h * w``, ``D`` features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SQUARINGS = 12  # 4096 power iterations: eigenvalues 1 % apart are separated to 1e-18


def first_component(features: Tensor) -> Tensor:
    """First principal component of each image's patches, (B, P).

    The covariance is squared until only its leading direction is left. The column with the largest diagonal entry is
    that direction, with its largest loading positive: the sign rule of ``masking.first_principal_component``.

    Args:
        features: (B, P, D) float32.
    """
    centred = features - features.mean(dim=1, keepdim=True)
    covariance = centred.transpose(1, 2) @ centred
    power = _unit_trace(covariance)
    for _ in range(_SQUARINGS):
        power = _unit_trace(power @ power)
    diagonal = power.diagonal(dim1=1, dim2=2)
    strongest = F.one_hot(diagonal.argmax(dim=1), features.shape[2]).float()
    loading = power @ strongest[:, :, None]
    loading = covariance @ F.normalize(loading, dim=1)  # one plain iteration sheds what the squarings rounded
    return (centred @ F.normalize(loading, dim=1))[..., 0]


def foreground(component: Tensor, grid: tuple[int, int], threshold: float, min_share: float, morphology: str) -> Tensor:
    """As ``masking.foreground_mask`` for a batch.

    Args:
        component: (B, P).
        grid: (h, w).
        threshold: foreground is above it.
        min_share: at most this much foreground in the central window means the other sign.
        morphology: ``"official"`` or ``"grid"``.

    Returns:
        (B, P) float32, 1 for foreground; all 1 where there is none, as ``masking.foreground_or_all`` has it.
    """
    mask = (component > threshold).float()
    window = _central_window(grid, component.device)
    inside = (mask * window).sum(dim=1, keepdim=True) / window.sum()
    mask = torch.where(inside <= min_share, (-component > threshold).float(), mask)
    shaped = mask[:, None] if morphology == "official" else mask.reshape(-1, 1, grid[0], grid[1])
    kept = _close_after_dilation(shaped).flatten(1)
    return torch.maximum(kept, 1.0 - kept.amax(dim=1, keepdim=True))


def _unit_trace(matrix: Tensor) -> Tensor:
    trace = matrix.diagonal(dim1=1, dim2=2).sum(dim=1)
    return matrix / trace.clamp(min=torch.finfo(matrix.dtype).tiny)[:, None, None]


def _central_window(grid: tuple[int, int], device: torch.device) -> Tensor:
    """(P,) float32: 1 in rows ``int(.2h):int(.8h)`` and columns likewise; all ones where that is empty."""
    rows, columns = (torch.arange(edge, device=device) for edge in grid)
    inside = [(index >= edge // 5) & (index < 4 * edge // 5) for index, edge in zip((rows, columns), grid, strict=True)]
    window = (inside[0][:, None] & inside[1][None, :]).float().reshape(-1)
    return torch.where(window.sum() > 0, window, torch.ones_like(window))


def _close_after_dilation(mask: Tensor) -> Tensor:
    """Dilate, then close (dilate and erode), all with a window of three; (B, 1, P) or (B, 1, h, w)."""
    pool = F.max_pool1d if mask.ndim == 3 else F.max_pool2d
    dilated = pool(pool(mask, 3, 1, 1), 3, 1, 1)
    return 1.0 - pool(1.0 - dilated, 3, 1, 1)
