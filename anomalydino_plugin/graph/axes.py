"""Resampling along one axis as a matrix, for sizes that may be symbols.

Legend: ``n`` source and ``m`` target length; functions return (m, n) matrices, float32 where nothing else is said.
Positions are compared in integers where they can be, so that long axes lose nothing to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PILLOW_CUBIC = -0.5  # a of Pillow's BICUBIC, and of torch's antialiased bicubic
_FIXED_POINT = 2.0**22  # Pillow's PRECISION_BITS
_COARSE = 2.0**11  # in these units
TORCH_CUBIC = -0.75  # a of torch's bicubic without antialias


def resize_axis(source: int, resized: int, kept: int, device: torch.device) -> Tensor:
    """Pillow's antialiased bicubic filter, (m, n) float64; the identity where nothing is resized.

    Args:
        source: n.
        resized: length that the whole source is resized to.
        kept: m, the first rows of the resized axis that are wanted (a crop).
        device: of the result.
    """
    rows = torch.arange(kept, device=device)[:, None] * 2 + 1
    columns = torch.arange(source, device=device)[None, :] * 2 + 1
    # distance of pixel centres over the filter's scale max(n / resized, 1), numerator in whole numbers
    distance: Tensor = (columns * resized - rows * source).double() / (2 * _larger(source, resized))
    weights = _cubic(distance.abs(), PILLOW_CUBIC)
    return weights / weights.sum(dim=1, keepdim=True)


def fixed_point(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Pillow's coefficients, whole multiples of 2^-22, as the sum of two float32 matrices.

    The first holds multiples of 2^-11, the second what is left: products of either with 8-bit pixels sum up in float32
    without rounding, where one matrix of 22 bits would round.
    """
    units = torch.sign(weights) * (weights.abs() * _FIXED_POINT + 0.5).floor()
    coarse = (units / _COARSE + 0.5).floor() * _COARSE
    return (coarse / _FIXED_POINT).float(), ((units - coarse) / _FIXED_POINT).float()


def position_axis(side: int, patches: int, offset: float | Tensor, device: torch.device) -> Tensor:
    """Bicubic without antialias at scale ``(patches + offset) / side``, as ``resample_positions`` without registers.

    Args:
        side: n, edge of the trained grid.
        patches: m.
        offset: Meta's interpolation offset; 0 with ``patches = side`` gives the identity.
        device: of the result.
    """
    centre = torch.arange(patches, device=device).float() + 0.5
    position = centre * side / (patches + offset) - 0.5
    below = position.floor()
    matrix = torch.zeros(1, device=device)
    trained = torch.arange(side, device=device)[None, :]
    for tap in (-1, 0, 1, 2):
        column = (below + tap).clamp(0, side - 1).long()[:, None]
        weight = _cubic((position - below - tap).abs(), TORCH_CUBIC)[:, None]
        matrix = matrix + weight * (trained == column).float()
    return matrix


def map_axis(patches: int, pixels: int, sigma: float, covered: tuple[int, int], device: torch.device) -> Tensor:
    """Bilinear interpolation at pixel centres, then Gaussian smoothing with a reflected edge; as ``anomaly_map``.

    Args:
        patches: n.
        pixels: m.
        sigma: pixels; 0 turns smoothing off.
        covered: (a, b): n patches span a / b of the axis.
        device: of the result.
    """
    radius = int(4.0 * sigma + 0.5)  # SciPy's truncate=4
    extended = torch.arange(pixels + 2 * radius, device=device) - radius
    extended = torch.remainder(extended, torch.zeros_like(extended) + 2 * pixels)
    mirrored = torch.where(extended < pixels, extended, 2 * pixels - 1 - extended)
    position = (mirrored.float() + 0.5) * (patches * covered[1] / (pixels * covered[0])) - 0.5
    position = position.clamp(min=0).minimum(torch.zeros_like(position) + (patches - 1))
    away = (position[:, None] - torch.arange(patches, device=device)[None, :]).abs()
    linear = (1.0 - away).clamp(min=0.0)
    if radius == 0:
        return linear
    taps = torch.arange(-radius, radius + 1, device=device).double()
    kernel = torch.exp(-0.5 * (taps / sigma) ** 2)
    kernel = (kernel / kernel.sum()).float()
    smoothed = torch.nn.functional.conv1d(linear.T[:, None], kernel[None, None])  # (n, 1, m)
    return smoothed[:, 0].T


def _larger(first: int, second: int) -> int:
    larger: Any = torch.sym_max(first, second)  # an int, or a symbol for one
    return larger  # type: ignore[no-any-return]


def _cubic(distance: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution kernel at distances >= 0."""
    near = ((a + 2.0) * distance - (a + 3.0)) * distance * distance + 1.0
    far = a * (((distance - 5.0) * distance + 8.0) * distance - 4.0)
    return torch.where(distance < 1.0, near, torch.where(distance < 2.0, far, torch.zeros_like(distance)))
