"""Ground-truth masks of images.

Legend: ``H W`` pixels.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from anomalydino_plugin import ImageError
from jobs.filesystem import read_bytes

_WITH_ALPHA = frozenset({"LA", "PA", "RGBA"})


def read_mask(uri: str, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Read a mask: every value but 0 is anomalous, whatever the depth; an alpha channel says nothing.

    Args:
        uri: path or URI.
        size: (H, W) of the image it belongs to.

    Returns:
        (H, W) bool.

    Raises:
        ImageError: it cannot be read, or has another size.
    """
    try:
        with Image.open(io.BytesIO(read_bytes(uri))) as file:
            values = np.asarray(file)
            if file.mode in _WITH_ALPHA:
                values = values[..., :-1]
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ImageError(f"cannot read mask {uri!r}: {error}. Expected an image file.") from error
    mask: NDArray[np.bool_] = np.asarray(values > 0)
    if mask.ndim == 3:
        mask = np.asarray(mask.any(axis=2))
    if mask.shape != size:
        raise ImageError(
            f"mask {uri!r} has {mask.shape[1]} x {mask.shape[0]} pixels: expected the image's {size[1]} x {size[0]}. "
            "Give the mask at the image's size."
        )
    return mask
