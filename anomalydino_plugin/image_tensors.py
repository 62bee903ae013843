"""8-bit pixels <-> the tensors that backbone and host framework see.

Legend: ``H W`` pixels, ``h w`` patch grid, ``B`` images.

Scale to [0, 1], then ImageNet's statistics (arXiv 2405.14529, section 4; the official code's
``DINOv2Wrapper.prepare_image``). What comes before, on 8-bit pixels, is in ``preprocessing``.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from anomalydino_plugin.errors import ImageError
from anomalydino_plugin.preprocessing import RgbImage, prepare_pixels

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(pixels: Tensor) -> Tensor:
    """Scale 8-bit pixels to [0, 1] and apply ImageNet's mean and standard deviation.

    Args:
        pixels: (B, H, W, 3) uint8.

    Returns:
        (B, 3, H, W) float32 on the same device.
    """
    images = pixels.permute(0, 3, 1, 2).to(torch.float32) / 255.0
    mean, std = _statistics(pixels.device)
    return (images - mean) / std


def on_device(images: Sequence[RgbImage], device: torch.device) -> Tensor:
    """Prepared images of one size as one batch.

    Args:
        images: (H, W, 3) uint8 each, B of them.
        device: where to put it. On a GPU this returns before the copy is done, so that the next images are gathered
            while these are encoded.

    Returns:
        (B, H, W, 3) uint8.
    """
    if device.type != "cuda":
        return torch.from_numpy(np.stack(images)).to(device)
    gathered = torch.empty((len(images), *images[0].shape), dtype=torch.uint8, device="cpu", pin_memory=True)
    np.stack(images, out=gathered.numpy())
    return gathered.to(device, non_blocking=True)


@functools.cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet's mean and standard deviation, (1, 3, 1, 1); copied to a device once, as each copy waits for it."""
    with torch.inference_mode(False):  # made once for all callers, those that record gradients as well
        mean, std = (torch.tensor(values, dtype=torch.float32) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return mean.view(1, 3, 1, 1).to(device), std.view(1, 3, 1, 1).to(device)


def prepare_image(image: RgbImage, resolution: int, patch_size: int) -> Tensor:
    """Resize, crop and normalise one image.

    Args:
        image: (H, W, 3) uint8.
        resolution: smaller edge, pixels.
        patch_size: pixels.

    Returns:
        (1, 3, h * patch_size, w * patch_size) float32.
    """
    return normalise(torch.from_numpy(prepare_pixels(image, resolution, patch_size))[None])


def to_uint8(images: Tensor) -> RgbImage:
    """Recover the 8-bit images that a float loader divided by 255 (anomalib's does).

    Args:
        images: (B, 3, H, W) float in [0, 1].

    Returns:
        (B, H, W, 3) uint8.

    Raises:
        ImageError: values outside [0, 1], as after normalisation, or NaN.
    """
    low, high = float(images.min()), float(images.max())
    if not (low >= -1e-3 and high <= 1.0 + 1e-3):
        raise ImageError(
            f"images have values in [{low:g}, {high:g}]; expected [0, 1]. Remove Normalize from the pre-processor: "
            "this model resizes and normalises by itself."
        )
    pixels = torch.round(images.float() * 255.0).clamp_(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
