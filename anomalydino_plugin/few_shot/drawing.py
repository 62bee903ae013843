"""What ``explain`` draws with: heat, boxes, crops and text. Pure functions, and a page to put them on.

Legend: ``H W`` pixels of an image, ``h w`` patch grid. A box is ``(y, x, height, width)`` in whole pixels.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from anomalydino_plugin.preprocessing import RgbImage

Box = tuple[int, int, int, int]

GAP, PANEL = 16, 512  # pixels: between the parts of a page; larger edge of a large image
_CONTEXT, _PATCH = 3, 28  # patches shown on each side of a matched one; pixels of a patch on a tile
TILE = (2 * _CONTEXT + 1) * _PATCH  # pixels: edge of a crop
_INK, _PAPER, _GREY = (30, 30, 30), (255, 255, 255), (200, 200, 200)
_PATCH_COLOUR, _MASK_COLOUR, _HALO = (0, 255, 255), (80, 180, 255), (0, 0, 0)
_HEAT_OPACITY = 0.85  # of the hottest pixels; cold ones show the image
_LABEL = 9  # pixels: half the edge of a box's number
_TINY = 1e-30


def plain(name: str) -> str:
    """A name in ASCII: Pillow's default font has few other letters. Escapes, unlike "?", keep names apart."""
    return name.encode("unicode_escape").decode("ascii")


class Page:
    """A white page, ``width`` x ``height`` pixels, for pictures and text; positions are (x, y)."""

    def __init__(self, width: int, height: int) -> None:
        self._image = Image.new("RGB", (width, height), _PAPER)
        self._draw = ImageDraw.Draw(self._image)

    def pixels(self) -> RgbImage:
        """(height, width, 3) uint8."""
        return np.array(self._image)

    def paste(self, position: tuple[int, int], picture: RgbImage) -> None:
        """Put a picture's upper left corner there; a thin frame keeps white pictures apart from the page."""
        (x, y), (height, width) = position, picture.shape[:2]
        self._draw.rectangle((x - 1, y - 1, x + width, y + height), outline=_GREY)
        self._image.paste(Image.fromarray(picture), position)

    def write(self, position: tuple[int, int], text: str, *, size: int = 15, width: int | None = None) -> None:
        """One line of text, its middle left out where it is wider than ``width`` or would leave the page."""
        room = self._image.width - position[0] - GAP if width is None else width
        self._draw.text(position, shortened(text, size, room), fill=_INK, font=ImageFont.load_default(size))

    def colour_bar(self, position: tuple[int, int], height: int, high: float) -> None:
        """The colours of ``heat`` from 0 (below) to ``high`` (above) with their values."""
        x, y = position
        self.paste(position, _colours(np.linspace(1, 0, height, dtype=np.float32)[:, None].repeat(18, axis=1)))
        for value, middle in ((high, y + 8), (high / 2, y + height // 2), (0.0, y + height - 9)):
            self._draw.text((x + 24, middle), f"{value:.3g}", fill=_INK, font=ImageFont.load_default(15), anchor="lm")


def shortened(text: str, size: int, width: int) -> str:
    """The text, or its start and end where it is wider than ``width`` pixels: names differ at their ends."""
    font = ImageFont.load_default(size)
    shown, kept = text, min(len(text), 300)
    while kept > 1 and (len(shown) > 300 or font.getlength(shown) > width):
        kept -= 1
        shown = f"{text[: kept // 2]}...{text[len(text) - (kept + 1) // 2 :]}"
    return shown


def fit(image: RgbImage, edge: int) -> RgbImage:
    """Scale so that the larger edge has ``edge`` pixels."""
    scale = edge / max(image.shape[:2])
    height, width = (max(1, round(length * scale)) for length in image.shape[:2])
    return _resize(image, height, width)


def _resize(image: RgbImage, height: int, width: int) -> RgbImage:
    return np.asarray(cv2.resize(image, (width, height), interpolation=_filter(image, height, width)), dtype=np.uint8)


def _filter(image: NDArray[np.generic], height: int, width: int) -> int:
    """OpenCV's antialiased filter only shrinks."""
    return int(cv2.INTER_AREA if height * width < image.shape[0] * image.shape[1] else cv2.INTER_LINEAR)


def _colours(shares: NDArray[np.float32]) -> RgbImage:
    """(H, W) in [0, 1] -> (H, W, 3) uint8: inferno, perceptually uniform."""
    coloured = cv2.applyColorMap(np.round(shares * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    return np.asarray(cv2.cvtColor(coloured, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def heat(image: RgbImage, values: NDArray[np.float32], high: float) -> RgbImage:
    """Lay an anomaly map over an image, the more opaque the hotter.

    Args:
        image: (H, W, 3) uint8.
        values: float32, at least 0, of any size: scaled to the image's.
        high: value of the brightest colour; 0 has the darkest.

    Returns:
        (H, W, 3) uint8.
    """
    height, width = image.shape[:2]
    scaled = cv2.resize(values, (width, height), interpolation=_filter(values, height, width))
    shares = np.clip(scaled / max(high, _TINY), 0, 1).astype(np.float32)
    opacity = _HEAT_OPACITY * shares[..., None]
    return np.asarray(np.round(image * (1 - opacity) + _colours(shares) * opacity), dtype=np.uint8)


def outline_mask(image: RgbImage, foreground: NDArray[np.bool_], coverage: tuple[float, float]) -> None:
    """Draw the outline of a foreground mask into an image.

    Args:
        image: (H, W, 3) uint8, changed.
        foreground: (h, w).
        coverage: share of the image's height and width that the grid covers.
    """
    height, width = (max(1, round(edge * share)) for edge, share in zip(image.shape[:2], coverage, strict=True))
    region = cv2.resize(foreground.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(region, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(image, contours, -1, _MASK_COLOUR, 2)


def number_boxes(image: RgbImage, boxes: Sequence[Box]) -> RgbImage:
    """Scale an image to a panel and draw boxes, numbered from 1 beside them.

    Args:
        image: (H, W, 3) uint8.
        boxes: on the image.
    """
    panel = Image.fromarray(fit(image, PANEL))
    draw = ImageDraw.Draw(panel)
    scale = PANEL / max(image.shape[:2])
    corners = [(x * scale, y * scale, (x + w) * scale, (y + h) * scale) for y, x, h, w in boxes]
    labels: list[tuple[float, float]] = []
    for left, top, right, bottom in corners:
        labels.append(_free_place(((left + right) / 2, (top + bottom) / 2), corners, labels, panel.size))
        edge = (min(max(labels[-1][0], left), right), min(max(labels[-1][1], top), bottom))
        draw.line((*edge, *labels[-1]), fill=_PATCH_COLOUR, width=1)
    for corner in corners:
        _outline(panel, corner)
    for number, (x, y) in enumerate(labels, 1):
        draw.rectangle((x - _LABEL, y - _LABEL, x + _LABEL, y + _LABEL), fill=_HALO, outline=_PATCH_COLOUR)
        draw.text((x, y), str(number), fill=_PAPER, font=ImageFont.load_default(13), anchor="mm")
    return np.array(panel)


def _free_place(
    middle: tuple[float, float],
    boxes: Sequence[tuple[float, float, float, float]],
    labels: Sequence[tuple[float, float]],
    size: tuple[int, int],
) -> tuple[float, float]:
    """Centre of the nearest place for a label that hides no box and no other label; on the box where there is none."""
    taken = [*boxes, *((x - _LABEL, y - _LABEL, x + _LABEL, y + _LABEL) for x, y in labels)]
    for x, y in _around(middle):
        inside = _LABEL < x < size[0] - _LABEL and _LABEL < y < size[1] - _LABEL
        reach = _LABEL + 3
        if inside and not any(a - reach < x < c + reach and b - reach < y < d + reach for a, b, c, d in taken):
            return x, y
    return middle


def _around(middle: tuple[float, float]) -> Iterator[tuple[float, float]]:
    for radius in range(20, PANEL // 2, 6):
        for degrees in range(-45, 315, 15):
            angle = math.radians(degrees)
            yield middle[0] + radius * math.cos(angle), middle[1] + radius * math.sin(angle)


def _outline(image: Image.Image, corners: tuple[float, float, float, float]) -> None:
    """A bright line just outside a box with a dark one around it, visible on any image, whole at the image's edge."""
    left, top = max(2, round(corners[0])), max(2, round(corners[1]))
    right, bottom = min(image.width - 2, round(corners[2])), min(image.height - 2, round(corners[3]))
    right, bottom = max(left + 1, right), max(top + 1, bottom)  # boxes on images of a few pixels
    draw = ImageDraw.Draw(image)
    draw.rectangle((left - 2, top - 2, right + 1, bottom + 1), outline=_HALO)
    draw.rectangle((left - 1, top - 1, right, bottom), outline=_PATCH_COLOUR)


def patch_tile(image: RgbImage, box: Box) -> RgbImage:
    """Crop around a patch, which is outlined in the middle; grey where the image ends.

    Args:
        image: (H, W, 3) uint8.
        box: on the image.

    Returns:
        (196, 196, 3) uint8.
    """
    y, x, height, width = box
    top, left = y - _CONTEXT * height, x - _CONTEXT * width
    edge = 2 * _CONTEXT + 1
    crop = np.full((edge * height, edge * width, 3), _GREY, np.uint8)
    shown = image[max(0, top) : top + edge * height, max(0, left) : left + edge * width]
    first_row, first_column = max(0, -top), max(0, -left)
    crop[first_row : first_row + shown.shape[0], first_column : first_column + shown.shape[1]] = shown
    tile = Image.fromarray(_resize(crop, TILE, TILE))
    first, last = _CONTEXT * _PATCH, (_CONTEXT + 1) * _PATCH
    _outline(tile, (first, first, last, last))
    return np.array(tile)


def place_tile(image: RgbImage, box: Box) -> RgbImage:
    """The whole image, its larger edge as long as a tile, with a box.

    Args:
        image: (H, W, 3) uint8.
        box: on the image.
    """
    scale = TILE / max(image.shape[:2])
    y, x, height, width = (value * scale for value in box)
    small = Image.fromarray(fit(image, TILE))
    _outline(small, (x, y, x + width, y + height))
    return np.array(small)


def notice_tile(text: str) -> RgbImage:
    """(196, 196, 3) uint8: a grey tile with as much of the text as fits."""
    tile = Image.new("RGB", (TILE, TILE), _GREY)
    lines = textwrap.wrap(plain(text), 26, max_lines=9, placeholder=" ...")
    ImageDraw.Draw(tile).multiline_text((8, 8), "\n".join(lines), fill=_INK, font=ImageFont.load_default(13))
    return np.array(tile)
