"""What is known of one image before it is read, and its stable id."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

ID_LENGTH = 20  # hexadecimal digits: 80 bits, no collision below a billion images


@dataclass(frozen=True, order=True)
class ImageRecord:
    """One image to process.

    Attributes:
        image_id: does not change when files are added, listed in another order, or moved as a tree.
        uri: where it is, folder and name kept.
        category: object or texture it shows.
        split: ``"train"`` or ``"test"``.
        label: ``"good"``, the kind of defect, or ``None`` where unknown.
        mask_uri: ground truth, or ``None``.
    """

    image_id: str
    uri: str
    category: str
    split: str = "test"
    label: str | None = None
    mask_uri: str | None = None


def image_id(category: str, relative: str) -> str:
    """Stable id from the category and the path inside it (with forward slashes)."""
    return hashlib.sha256(f"{category}/{relative}".encode("utf-8", "surrogateescape")).hexdigest()[:ID_LENGTH]
