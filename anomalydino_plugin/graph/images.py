"""Images as anomalib feeds them -> what the backbone sees.

Legend: ``B`` images, ``H W`` pixels, ``h w`` patch grid.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from anomalydino_plugin.graph.axes import resize_axis

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class Sizes(NamedTuple):
    """Sizes of one batch, possibly symbols: image, resized image, patch grid; (rows, columns) each."""

    image: tuple[int, int]
    resized: tuple[int, int]
    grid: tuple[int, int]


def plan_sizes(height: int, width: int, resolution: int, patch_size: int) -> Sizes:
    """As ``plan_geometry``, without branches: the smaller edge becomes ``resolution``."""
    short: Any = torch.sym_min(height, width)  # an int, or a symbol for one
    resized = (height * resolution // short, width * resolution // short)
    return Sizes((height, width), resized, (resized[0] // patch_size, resized[1] // patch_size))


def prepare(images: Tensor, sizes: Sizes, patch_size: int) -> Tensor:
    """Round to 8 bit, resize, crop and normalise.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        sizes: from ``plan_sizes``.
        patch_size: pixels.

    Returns:
        (B, 3, h * patch_size, w * patch_size) float32.
    """
    rows, columns = (
        resize_axis(source, resized, patches * patch_size, images.device)
        for source, resized, patches in zip(sizes.image, sizes.resized, sizes.grid, strict=True)
    )
    pixels = _grey_levels(images.float() * 255.0)
    pixels = _rounded_sum(pixels @ columns[0].T, pixels @ columns[1].T)  # Pillow rounds after each pass
    pixels = _rounded_sum(rows[0] @ pixels, rows[1] @ pixels)
    mean = torch.tensor(_MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(_STD, device=images.device).view(1, 3, 1, 1)
    return (pixels / 255.0 - mean) / std


def _grey_levels(values: Tensor) -> Tensor:
    return (values + 0.5).floor().clamp(0.0, 255.0)


def _rounded_sum(coarse: Tensor, fine: Tensor) -> Tensor:
    """Grey levels of a sum that float32 cannot hold: its whole part first, then the rest."""
    whole = (coarse + 0.5).floor()
    return (whole + (coarse + 0.5 - whole + fine).floor()).clamp(0.0, 255.0)
