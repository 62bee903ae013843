"""8-bit pixels <-> the tensors that backbone and host framework see.

Legend: ``H W`` pixels, ``h w`` patch grid, ``B`` images.

Scale to [0, 1], then ImageNet's statistics (arXiv 2405.14529, section 4; the official code's
``DINOv2Wrapper.prepare_image``). What comes before, on 8-bit pixels, is in ``preprocessing``.
"""

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
    mean = torch.tensor(IMAGENET_MEAN, dtype=torch.float32, device=pixels.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD, dtype=torch.float32, device=pixels.device).view(1, 3, 1, 1)
    return (images - mean) / std


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
