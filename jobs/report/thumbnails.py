"""Small pictures as text that a page can hold: WebP in base64, and outlines as SVG paths.

Legend: ``H W`` pixels of an image, ``h w`` patch grid. All functions are pure.
"""

from __future__ import annotations

import base64
import io

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jobs.pictures import Mask, Rgb
from jobs.run_geometry import Box

CONTEXT = 2  # patches shown on each side of a patch
_TILE = 120  # pixels: edge of a crop around a patch
_QUALITY = 72
_OUTSIDE = 128  # grey level beyond the image's edge
_CELL = 16  # sub-pixels of a patch: outlines run along patch edges


def fitted(size: tuple[int, int], edge: int) -> tuple[int, int]:
    """(H, W) scaled down so that the larger one is ``edge`` at most."""
    scale = min(1.0, edge / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def shrink(image: Rgb, size: tuple[int, int]) -> Rgb:
    """(H, W, 3) uint8 -> ``size``, antialiased."""
    return np.asarray(cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA), dtype=np.uint8)


def webp(picture: NDArray[np.uint8]) -> str:
    """Compress a picture.

    Args:
        picture: (H, W, 3) or, with opacity, (H, W, 4) uint8.

    Returns:
        Base64 of a WebP file.
    """
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="WEBP", quality=_QUALITY, alpha_quality=60, method=4)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def patch_tile(image: Rgb, box: Box) -> Rgb:
    """A patch and ``CONTEXT`` patches around it.

    Args:
        image: (H, W, 3) uint8.
        box: of the patch on the image.

    Returns:
        (120, 120, 3) uint8; grey where the image ends.
    """
    y, x, height, width = box
    edge = 2 * CONTEXT + 1
    top, left = y - CONTEXT * height, x - CONTEXT * width
    crop = np.full((edge * height, edge * width, 3), _OUTSIDE, np.uint8)
    shown = image[max(0, top) : max(0, top + edge * height), max(0, left) : max(0, left + edge * width)]
    row, col = max(0, -top), max(0, -left)
    crop[row : row + shown.shape[0], col : col + shown.shape[1]] = shown
    shrinks = crop.shape[0] > _TILE
    return np.asarray(
        cv2.resize(crop, (_TILE, _TILE), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC), dtype=np.uint8
    )


def outline(region: Mask, size: tuple[int, int]) -> str:
    """Outline of a region as an SVG path.

    Args:
        region: (H, W) bool.
        size: (H', W') of the picture that it is drawn over.

    Returns:
        Path data in pixels of that picture; empty for an empty region.
    """
    scale = np.array([size[1] / region.shape[1], size[0] / region.shape[0]])
    contours, _ = cv2.findContours(region.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    tolerance = 0.25 / float(scale.min())
    return "".join(_path((cv2.approxPolyDP(line, tolerance, True)[:, 0] + 0.5) * scale) for line in contours)


def grid_outline(foreground: Mask, size: tuple[int, int], coverage: tuple[float, float]) -> str:
    """Outline of patches as an SVG path.

    Args:
        foreground: (h, w).
        size: (H', W') of the picture that it is drawn over.
        coverage: share of its height and width that the grid covers.
    """
    cells = np.kron(foreground, np.ones((_CELL, _CELL), bool))
    return outline(cells, (round(size[0] * coverage[0]), round(size[1] * coverage[1])))


def _path(points: NDArray[np.float64]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "Z"
