"""Image files -> RGB, 8 bit.

One decoder for every entry point that opens files itself (the Python API and the Ray jobs), so that
the same file gives the same pixels everywhere. anomalib's reader is different in two ways, both listed in
``docs/deviations.md``: it ignores EXIF orientation and truncates 16-bit images.

Rules, in this order:

1. first frame of an animation or multi-page file;
2. EXIF orientation applied;
3. 16-bit (``I;16*``) and 32-bit integer grey levels, which must lie in 0 to 65535, are scaled by 1/257 and rounded;
   float images must lie in [0, 1] or [0, 255];
4. palettes are expanded; transparent pixels are laid over black;
5. CMYK, YCbCr, LAB and HSV are converted by Pillow; grey is repeated three times.

Only regular files are read, and only the formats of ``FORMATS`` are tried: others bring programs of their own
(PostScript is run by Ghostscript), whatever the file is called.
"""

import contextlib
import errno
import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from anomalydino_plugin.errors import ImageError, ResourceError

RgbImage = NDArray[np.uint8]
BoolMask = NDArray[np.bool_]

MAX_PIXELS = 400_000_000  # a decompression bomb above this: 20,000 x 20,000 still passes
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM")
_FILE_BYTES_PER_PIXEL = 8  # of the widest pixels, uncompressed: a larger file is none that may be decoded
_MEMORY_ADDRESS = re.compile(r" <_io\.BytesIO object at 0x[0-9a-f]+>")  # would make two runs differ
_DEEPEST = 65535
_TO_EIGHT_BITS = ((np.arange(_DEEPEST + 1) + 128) // 257).astype(np.uint8)  # 65535 / 255 = 257, rounded to nearest
_WITH_ALPHA = frozenset({"LA", "PA", "RGBA"})
_RAN_OUT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})  # no fault of the file
_opening = threading.Lock()


def read_image(
    source: str | os.PathLike[str] | bytes, *, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> RgbImage:
    """Decode one image.

    Args:
        source: a path, or the bytes of an image file.
        name: what error messages call it; the path if not given.
        max_pixels: refuse to decode more than this many pixels, and to read files of more than 8 bytes for each.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        ImageError: the file is missing, is no image, is damaged, or has too many pixels.
        ResourceError: no more files can be opened.
        MemoryError: the pixels do not fit into memory.
    """
    label = f"image {name or _name_of(source)!r}"
    return _decode(_content(source, label, max_pixels), label, max_pixels)


def read_mask(source: str | os.PathLike[str] | bytes, size: tuple[int, int], *, name: str | None = None) -> BoolMask:
    """Decode a ground-truth mask: every value but 0 is anomalous, whatever the depth; an alpha channel says nothing.

    Args:
        source: a path, or the bytes of an image file.
        size: (H, W) of the image it belongs to; another size is refused before it is decoded.
        name: what error messages call it; the path if not given.

    Returns:
        (H, W) bool.

    Raises:
        ImageError: the file is missing, is no image, is damaged, or has another size.
        ResourceError: no more files can be opened.
        MemoryError: the values do not fit into memory.
    """
    limit = max(MAX_PIXELS, size[0] * size[1])  # whoever raised the limit for the image has raised it for its mask
    label = f"mask {name or _name_of(source)!r}"
    return _decode_mask(_content(source, label, limit), label, size, limit)


def _name_of(source: str | os.PathLike[str] | bytes) -> str:
    return "<bytes>" if isinstance(source, bytes) else os.fspath(source)


def _content(source: str | os.PathLike[str] | bytes, label: str, max_pixels: int) -> bytes:
    data = source if isinstance(source, bytes) else _file_content(Path(source), label, max_pixels)
    if not data:
        raise ImageError(f"cannot decode {label}: the file is empty (0 bytes). Replace or remove it.")
    return data


def _file_content(path: Path, label: str, max_pixels: int) -> bytes:
    """A pipe would be waited for, and a device read, without end: only regular files are opened."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
            raise ImageError(
                f"cannot read {label}: it is {kind}, expected a regular file. Check path, remove or rename it."
            )
        if found.st_size > _FILE_BYTES_PER_PIXEL * max_pixels:
            raise ImageError(
                f"cannot read {label}: the file has {found.st_size} bytes, more than an image of {max_pixels} "
                "pixels can need. Raise the limit (max_pixels) if the file is trusted."
            )
        return path.read_bytes()
    except ImageError:  # a ValueError, too
        raise
    except (OSError, ValueError) as error:  # ValueError: a name that holds a zero byte
        if getattr(error, "errno", None) in _RAN_OUT:
            raise ResourceError(
                f"cannot read {label}: {getattr(error, 'strerror', error)}. Raise the limits of this process."
            ) from error
        raise ImageError(
            f"cannot read {label}: {getattr(error, 'strerror', None) or error}. Check path and permissions."
        ) from error


def _decode(data: bytes, label: str, max_pixels: int) -> RgbImage:
    with _readable(data, label), _opened(data, max_pixels) as image:
        _check_size(image.size, max_pixels)
        image.seek(0)
        return to_rgb(ImageOps.exif_transpose(image))


def _decode_mask(data: bytes, label: str, size: tuple[int, int], max_pixels: int) -> BoolMask:
    with _readable(data, label), _opened(data, max_pixels) as image:
        if image.size[::-1] != size:
            raise ImageError(
                f"it has {image.width} x {image.height} pixels, expected the image's {size[1]} x {size[0]}. "
                "Give the mask at the image's size."
            )
        image.seek(0)
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise ImageError("it has values that are NaN or infinite. Write it with 0 where the image is normal.")
        marked: BoolMask = np.asarray(values[..., :-1] if image.mode in _WITH_ALPHA else values) != 0
        return marked if marked.ndim == 2 else np.asarray(marked.any(axis=2))


@contextlib.contextmanager
def _readable(data: bytes, label: str) -> Iterator[None]:
    """Whatever a decoder raises, as an error that names the file."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"cannot decode {label}: {error}") from error
    except MemoryError:
        raise  # no fault of the file: with more memory it can be read
    except Exception as error:  # Pillow's plug-ins raise almost anything on damaged input
        raise ImageError(
            f"cannot decode {label} ({len(data)} bytes, starts with {data[:8]!r}): "
            f"{type(error).__name__}: {_MEMORY_ADDRESS.sub('', str(error))}. Expected a readable PNG, JPEG, TIFF, BMP "
            "or WebP file. Replace or remove it."
        ) from error


@contextlib.contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """Read the header. Pillow's own limit is one number for the process: ours takes its place for this moment."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's bomb and metadata warnings
        with _opening:
            before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
            try:
                opened = Image.open(io.BytesIO(data), formats=FORMATS)
            except Image.DecompressionBombError as error:
                raise ImageError(_too_many("more", max_pixels)) from error
            finally:
                Image.MAX_IMAGE_PIXELS = before
        with opened:
            yield opened


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageError(_too_many(f"{width} x {height} = {width * height} pixels, more", max_pixels))


def _too_many(found: str, max_pixels: int) -> str:
    return f"it has {found} than the limit of {max_pixels} pixels. Raise the limit (max_pixels) if the file is trusted."


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
    grey = _float_to_grey(values) if mode == "F" else _integer_to_grey(values, mode)
    return np.repeat(grey[..., None], 3, axis=2)


def _float_to_grey(values: NDArray[np.generic]) -> RgbImage:
    grey = values.astype(np.float64)
    if not np.isfinite(grey).all():
        raise ImageError("it holds NaN or infinite pixels; expected finite grey levels. Repair or remove it.")
    low, high = float(grey.min()), float(grey.max())
    if low < 0 or high > 255:
        raise ImageError(
            f"its float pixels have values in [{low:g}, {high:g}]; expected [0, 1] or [0, 255]. Rescale it first."
        )
    return np.floor((grey * 255.0 if high <= 1.0 else grey) + 0.5).astype(np.uint8)


def _integer_to_grey(values: NDArray[np.generic], mode: str) -> RgbImage:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > _DEEPEST:
        raise ImageError(
            f"its integer pixels have values in [{low}, {high}]; expected 0 to {_DEEPEST}. Rescale it first."
        )
    return values.astype(np.uint8) if mode == "I" and high <= 255 else _TO_EIGHT_BITS[values]
