"""Resampling along one axis as a matrix, for sizes that may be symbols.

Legend: ``n`` source and ``m`` target length; functions return (m, n) float32 matrices. Positions are compared in
integers where they can be, so that long axes lose nothing to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anomalydino_plugin.graph.pairs import Pair, add, divide, multiply, times

_FIXED_POINT = 2.0**22  # Pillow's PRECISION_BITS
_COARSE = 2.0**11


def resize_axis(source: int, resized: int, kept: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pillow's antialiased bicubic filter; the identity where nothing is resized.

    Pillow's coefficients are whole multiples of 2^-22. They come as the sum of two matrices, multiples of 2^-11 and
    what is left: sums of products of either with 8-bit pixels are exact in float32 (to a scale of 16), where one matrix
    of 22 bits would round.

    Args:
        source: n.
        resized: length that the whole source is resized to.
        kept: m, the first rows of the resized axis that are wanted (a crop).
        device: of the result.
    """
    rows = torch.arange(kept, device=device)[:, None] * 2 + 1
    columns = torch.arange(source, device=device)[None, :] * 2 + 1
    # distance of pixel centres over the filter's scale max(n / resized, 1), numerator in whole numbers
    numerator = (columns * resized - rows * source).abs()
    weights = _pillow_cubic(numerator, 2 * _larger(source, resized))
    share = divide(weights, _row_sums(weights))
    coarse = (share.high * _COARSE + 0.5).floor() / _COARSE
    fine = (share.high - coarse) + share.low
    return coarse, (fine * _FIXED_POINT + 0.5).floor() / _FIXED_POINT


def _pillow_cubic(numerator: Tensor, denominator: int) -> Pair:
    """Keys' kernel with a = -0.5 at distances that are whole numbers over one denominator, at least twofold float32."""
    zero = torch.zeros_like(numerator).float()
    distance = divide(Pair(numerator.float(), zero), Pair(zero + denominator, zero))
    square = multiply(distance, distance)
    twice = times(distance, 2.0)
    near = add(multiply(add(add(twice, times(distance, -0.5)), -2.5), square), 1.0)  # 1.5 d^3 - 2.5 d^2 + 1
    far = add(multiply(add(times(distance, -0.5), 2.5), square), add(times(twice, -2.0), 2.0))
    nothing = Pair(zero, zero)
    return near.where(numerator < denominator, far.where(numerator < 2 * denominator, nothing))


def _row_sums(weights: Pair) -> Pair:
    """(m, 1): the coarse parts sum up without rounding, the rest is small."""
    coarse = (weights.high * _COARSE + 0.5).floor() / _COARSE
    rest = (weights.high - coarse) + weights.low
    total, rest_total = coarse.sum(dim=1, keepdim=True), rest.sum(dim=1, keepdim=True)
    return add(Pair(total, torch.zeros_like(total)), Pair(rest_total, torch.zeros_like(rest_total)))


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
        weight = _torch_cubic((position - below - tap).abs())[:, None]
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


def _torch_cubic(distance: Tensor) -> Tensor:
    """Keys' cubic convolution kernel at distances >= 0, with the a of torch's bicubic without antialias."""
    a = -0.75
    near = ((a + 2.0) * distance - (a + 3.0)) * distance * distance + 1.0
    far = a * (((distance - 5.0) * distance + 8.0) * distance - 4.0)
    return torch.where(distance < 1.0, near, torch.where(distance < 2.0, far, torch.zeros_like(distance)))
