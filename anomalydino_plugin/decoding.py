"""Image files -> RGB, 8 bit.

One decoder for every entry point that opens files itself (the Python API and the Ray jobs), so that
the same file gives the same pixels everywhere. anomalib's reader is different in two ways, both listed in
``docs/deviations.md``: it ignores EXIF orientation and truncates 16-bit images.

Rules, in this order:

1. first frame of an animation or multi-page file;
2. EXIF orientation applied;
3. 16-bit (``I;16*``) and 32-bit integer grey levels are scaled by 1/257 and rounded; float images must lie
   in [0, 1] or [0, 255];
4. palettes are expanded; transparent pixels are laid over black;
5. CMYK, YCbCr, LAB and HSV are converted by Pillow; grey is repeated three times.
"""

import io
import os
import re
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from anomalydino_plugin.errors import ImageError

RgbImage = NDArray[np.uint8]

MAX_PIXELS = 400_000_000  # a decompression bomb above this: 20,000 x 20,000 still passes
_MEMORY_ADDRESS = re.compile(r" <_io\.BytesIO object at 0x[0-9a-f]+>")  # would make two runs differ
_SIXTEEN_TO_EIGHT = 257.0  # 65535 / 255


def read_image(
    source: str | os.PathLike[str] | bytes, *, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> RgbImage:
    """Decode one image.

    Args:
        source: a path, or the bytes of an image file.
        name: what error messages call it; the path if not given.
        max_pixels: refuse to decode more than this many pixels.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        ImageError: the file is missing, is no image, is damaged, or has too many pixels.
    """
    name = name or ("<bytes>" if isinstance(source, bytes) else os.fspath(source))
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise ImageError(
            f"cannot read image {name!r}: {error.strerror or error}. Check path and permissions."
        ) from error
    if not data:
        raise ImageError(f"cannot decode image {name!r}: the file is empty (0 bytes). Replace or remove it.")
    return _decode(data, name, max_pixels)


def _decode(data: bytes, name: str, max_pixels: int) -> RgbImage:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own bomb and metadata warnings: our limit is checked below
            with Image.open(io.BytesIO(data)) as image:
                _check_size(image.size, name, max_pixels)
                image.seek(0)
                return to_rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"cannot decode image {name!r}: {error}; the limit is {max_pixels} pixels.") from error
    except Exception as error:  # Pillow's plug-ins raise almost anything on damaged input
        raise ImageError(
            f"cannot decode image {name!r} ({len(data)} bytes, starts with {data[:8]!r}): "
            f"{type(error).__name__}: {_MEMORY_ADDRESS.sub('', str(error))}. Expected a readable PNG, JPEG, TIFF, BMP "
            "or WebP file."
        ) from error


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageError(
            f"image {name!r} has {width} x {height} = {width * height} pixels, more than the limit of {max_pixels}. "
            "Raise the limit (max_pixels) if the file is trusted."
        )


def to_rgb(image: Image.Image) -> RgbImage:
    """Convert any Pillow image to (H, W, 3) uint8 RGB by the rules in the module docstring."""
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_to_rgb(np.asarray(image), image.mode)
    if image.mode in {"P", "PA", "LA", "La", "RGBa"} or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return np.array(image.convert("RGB"), dtype=np.uint8)


def _grey_to_rgb(values: NDArray[np.generic], mode: str) -> RgbImage:
    grey = values.astype(np.float64)
    if not np.isfinite(grey).all():
        raise ImageError(f"image of mode {mode!r} holds NaN or infinite pixels; expected finite grey levels.")
    if mode == "F":
        low, high = float(grey.min()), float(grey.max())
        if low < 0 or high > 255:
            raise ImageError(
                f"float image has values in [{low:g}, {high:g}]; expected [0, 1] or [0, 255]. Rescale it first."
            )
        grey = grey * 255.0 if high <= 1.0 else grey
    elif mode != "I" or grey.max() > 255:
        grey = grey / _SIXTEEN_TO_EIGHT
    grey8 = np.clip(np.floor(grey + 0.5), 0, 255).astype(np.uint8)
    return np.repeat(grey8[..., None], 3, axis=2)
