"""Ground-truth masks of images.

Legend: ``H W`` pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from anomalydino_plugin import ImageError
from anomalydino_plugin import read_mask as decode_mask
from jobs.filesystem import is_remote, local_path, read_bytes


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
    if not is_remote(uri):
        return decode_mask(local_path(uri) or uri, size, name=uri)
    try:
        content = read_bytes(uri)
    except OSError as error:
        raise ImageError(f"cannot read mask {uri!r}: {error}. Check address and credentials.") from error
    return decode_mask(content, size, name=uri)
