"""Ground-truth masks of images.

Legend: ``H W`` pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from anomalydino_plugin import read_mask as decode_mask
from jobs.filesystem import image_source


def read_mask(uri: str, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Read a mask: every value but 0 is anomalous.

    Args:
        uri: path or URI.
        size: (H, W) of the image it belongs to.

    Returns:
        (H, W) bool.

    Raises:
        ImageError: it cannot be read, or has another size.
    """
    return decode_mask(image_source(uri, "mask"), size, name=uri)
