"""RGB 8 bit -> the pixels that the backbone sees, still 8 bit; without torch, which takes seconds to load.

Legend: ``H W`` pixels of the decoded image, ``h w`` patch grid.

The steps are those of the official code (arXiv 2405.14529, section 4 and its ``DINOv2Wrapper.prepare_image``):
resize the smaller edge with Pillow's antialiased bicubic filter on 8-bit values, crop bottom and right to a multiple of
the patch size; ``image_tensors`` goes on. The filter matters: torchvision's tensor resize moves image scores by up to
1.7 %.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomalydino_plugin.errors import ConfigError, ImageError

RgbImage = NDArray[np.uint8]

AGNOSTIC_ANGLES = (0, 45, 90, 135, 180, 225, 270, 315)  # paper, section 3.2: "agnostic" augmentation
INFORMED_ANGLES = (0,)  # objects known to be aligned
MAX_PATCHES = 65_536  # an image needing more is a strip: attention over it would take hours


class Geometry(NamedTuple):
    """Where the patch grid lies on the image.

    Attributes:
        image_size: (H, W) of the decoded image, pixels.
        resized: (H', W') after resizing the smaller edge.
        grid: (h, w) patches.
        coverage: share of the image's height and width that the grid covers, (0, 1].
    """

    image_size: tuple[int, int]
    resized: tuple[int, int]
    grid: tuple[int, int]
    coverage: tuple[float, float]


def rotate_image(image: RgbImage, angle: float) -> RgbImage:
    """Rotate about (W/2, H/2), counter-clockwise, on the same canvas.

    Bilinear, border reflected without repeating the edge pixel; exactly the official code's rotation.

    Args:
        image: (H, W, 3) uint8.
        angle: degrees.

    Returns:
        (H, W, 3) uint8.
    """
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1.0)
    rotated = cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return np.asarray(rotated, dtype=np.uint8)


def rotation_angles(rotations: str | Sequence[float]) -> tuple[float, ...]:
    """Angles for ``"agnostic"``, ``"informed"`` or an explicit list; 0 comes first and only once.

    Raises:
        ConfigError: an unknown name or an empty list.
    """
    if isinstance(rotations, str):
        named = {"agnostic": AGNOSTIC_ANGLES, "informed": INFORMED_ANGLES}
        if rotations not in named:
            raise ConfigError(f"rotations={rotations!r}: expected 'agnostic', 'informed' or a list of angles.")
        return named[rotations]
    angles = tuple(dict.fromkeys(float(angle) for angle in rotations))
    if not angles:
        raise ConfigError("rotations=[]: expected at least one angle; use 'informed' for no rotation.")
    return angles


def plan_geometry(height: int, width: int, resolution: int, patch_size: int) -> Geometry:
    """Sizes of the resized image and of its patch grid.

    Args:
        height: H, pixels.
        width: W, pixels.
        resolution: smaller edge after resizing, pixels; at least one patch.
        patch_size: edge of a patch, pixels.

    Raises:
        ConfigError: the resolution is smaller than a patch.
        ImageError: the image is smaller than one patch, or a strip of more than ``MAX_PATCHES`` patches.
    """
    if resolution < patch_size:
        raise ConfigError(f"resolution={resolution}: expected at least one patch, {patch_size} pixels.")
    if min(height, width) < patch_size:
        raise ImageError(
            f"image of {width} x {height} pixels is smaller than one patch; expected at least "
            f"{patch_size} x {patch_size}. Remove it or use a larger picture."
        )
    resized = _resized_size(height, width, resolution)
    grid = (resized[0] // patch_size, resized[1] // patch_size)
    if grid[0] * grid[1] > MAX_PATCHES:
        raise ImageError(
            f"image of {width} x {height} pixels needs {grid[0]} x {grid[1]} patches at resolution {resolution}; "
            f"expected at most {MAX_PATCHES}. Cut the strip into pieces or lower the resolution."
        )
    coverage = (grid[0] * patch_size / resized[0], grid[1] * patch_size / resized[1])
    return Geometry((height, width), resized, grid, coverage)


def _resized_size(height: int, width: int, resolution: int) -> tuple[int, int]:
    """(H', W') with the smaller edge at ``resolution``; torchvision's rounding, as the official code."""
    short, long = min(height, width), max(height, width)
    longer_edge = long if short == resolution else int(resolution * long / short)
    return (resolution, longer_edge) if height <= width else (longer_edge, resolution)


def resize_smaller_edge(image: RgbImage, resolution: int) -> RgbImage:
    """Resize with Pillow's bicubic filter so that the smaller edge has ``resolution`` pixels.

    Args:
        image: (H, W, 3) uint8.
        resolution: pixels.

    Returns:
        (H', W', 3) uint8; the input itself where the smaller edge already fits.
    """
    height, width = image.shape[:2]
    target = _resized_size(height, width, resolution)
    if target == (height, width):
        return image
    resized = Image.fromarray(image).resize((target[1], target[0]), Image.Resampling.BICUBIC)
    return np.array(resized)  # a copy: Pillow's own buffer is read-only


def crop_to_grid(image: RgbImage, patch_size: int) -> RgbImage:
    """Cut bottom and right so that both edges are multiples of the patch size."""
    height, width = image.shape[:2]
    return image[: height - height % patch_size, : width - width % patch_size]


def prepare_pixels(image: RgbImage, resolution: int, patch_size: int) -> RgbImage:
    """Resize and crop, still 8 bit: what is worth sending to another process.

    Args:
        image: (H, W, 3) uint8.
        resolution: smaller edge, pixels.
        patch_size: pixels.

    Returns:
        (h * patch_size, w * patch_size, 3) uint8, contiguous.

    Raises:
        ConfigError, ImageError: as ``plan_geometry``.
    """
    plan_geometry(image.shape[0], image.shape[1], resolution, patch_size)
    return np.ascontiguousarray(crop_to_grid(resize_smaller_edge(image, resolution), patch_size))
