"""Pictures for people: heat maps over images, and the sheet of the masking test.

Legend: ``H W`` pixels, ``h w`` patch grid. All functions are pure except ``write_png``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Rgb = NDArray[np.uint8]
Map = NDArray[np.float32]
Mask = NDArray[np.bool_]

_TRUTH_COLOUR, _MASK_COLOUR = (0, 255, 80), (80, 180, 255)
_INK, _PAPER, _GAP = (30, 30, 30), 255, 12
_HEAT_OPACITY = 0.75  # of the hottest pixels
_TINY = 1e-30
PANEL_EDGE = 420  # pixels: height of the images on a panel


def heat_colors(values: Map, low: float, high: float) -> Rgb:
    """Colour values with a perceptually uniform map (inferno).

    Args:
        values: (H, W) float.
        low: value of the darkest colour.
        high: value of the brightest.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    scaled = np.clip((values - low) / max(high - low, _TINY), 0, 1)
    coloured = cv2.applyColorMap(np.round(scaled * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    return np.asarray(cv2.cvtColor(coloured, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def overlay(
    image: Rgb, anomaly_map: Map, low: float, high: float, *, mask: Mask | None = None, truth: Mask | None = None
) -> Rgb:
    """Heat over the image, opaque where hot; contours of foreground mask and ground truth.

    Args:
        image: (H, W, 3) uint8.
        anomaly_map: (H, W) float32.
        low: value of no heat.
        high: value of full heat.
        mask: (H, W) foreground.
        truth: (H, W) ground truth.
    """
    heat = heat_colors(anomaly_map, low, high)
    weight = _opacity(anomaly_map, low, high)[..., None]
    mixed: Rgb = np.round(image * (1 - weight) + heat * weight).astype(np.uint8)
    for region, colour in ((mask, _MASK_COLOUR), (truth, _TRUTH_COLOUR)):
        if region is not None:
            _draw_contour(mixed, region, colour)
    return mixed


def heat_layer(anomaly_map: Map, low: float, high: float) -> NDArray[np.uint8]:
    """The heat of ``overlay`` by itself, to be laid over an image by whoever shows it.

    Args:
        anomaly_map: (H, W) float32.
        low: value of no heat.
        high: value of full heat.

    Returns:
        (H, W, 4) uint8 RGBA.
    """
    alpha = np.round(255 * _opacity(anomaly_map, low, high)).astype(np.uint8)
    return np.dstack([heat_colors(anomaly_map, low, high), alpha])


def _opacity(anomaly_map: Map, low: float, high: float) -> Map:
    return np.asarray(_HEAT_OPACITY * np.clip((anomaly_map - low) / max(high - low, _TINY), 0, 1), dtype=np.float32)


def _draw_contour(image: Rgb, region: Mask, colour: tuple[int, int, int]) -> None:
    contours, _ = cv2.findContours(region.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(image, contours, -1, colour, max(1, round(max(image.shape[:2]) / 300)))


def panel(pictures: Sequence[Rgb], captions: Sequence[str], title: str) -> Rgb:
    """Pictures side by side with captions below and a title above.

    Args:
        pictures: (H, W, 3) uint8 each.
        captions: one for each.
        title: one line.

    Returns:
        (H', W', 3) uint8.
    """
    scaled = [_to_height(picture, PANEL_EDGE) for picture in pictures]
    width = sum(picture.shape[1] for picture in scaled) + _GAP * (len(scaled) + 1)
    canvas = np.full((PANEL_EDGE + 76, width, 3), _PAPER, np.uint8)
    page = Image.fromarray(canvas)
    draw = ImageDraw.Draw(page)
    _text(draw, (_GAP, 8), title, 19, width - 2 * _GAP)
    left = _GAP
    for picture, caption in zip(scaled, captions, strict=True):
        page.paste(Image.fromarray(picture), (left, 40))
        _text(draw, (left, PANEL_EDGE + 48), caption, 15, picture.shape[1])
        left += picture.shape[1] + _GAP
    return np.array(page)


def masking_test_sheet(image: Rgb, component: Map, mask: Mask, evidence: Sequence[str], title: str) -> Rgb:
    """What a person needs to confirm the masking test.

    Args:
        image: (H, W, 3) uint8 reference image.
        component: (h, w) first principal component.
        mask: (h, w) foreground.
        evidence: lines of text.
        title: one line.

    Returns:
        (H', W', 3) uint8: the image, its component, the image with the background dimmed, and the text.
    """
    size = (image.shape[1], image.shape[0])
    reach = float(np.abs(component).max()) or 1.0
    coloured = heat_colors(component, -reach, reach)
    component_picture = np.asarray(cv2.resize(coloured, size, interpolation=cv2.INTER_NEAREST), dtype=np.uint8)
    foreground = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
    dimmed = np.where(foreground[..., None], image, image // 4).astype(np.uint8)
    _draw_contour(dimmed, foreground, _MASK_COLOUR)
    sheet = panel(
        [image, component_picture, dimmed],
        ["reference image", "first principal component", "kept as foreground"],
        title,
    )
    lines = np.full((24 * len(evidence) + _GAP, sheet.shape[1], 3), _PAPER, np.uint8)
    page = Image.fromarray(lines)
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(evidence):
        _text(draw, (_GAP, 24 * number), line, 16, sheet.shape[1] - 2 * _GAP)
    return np.vstack([sheet, np.array(page)])


def _to_height(picture: Rgb, height: int) -> Rgb:
    width = max(1, round(picture.shape[1] * height / picture.shape[0]))
    shrink = picture.shape[0] > height
    interpolation = cv2.INTER_AREA if shrink else cv2.INTER_NEAREST
    return np.asarray(cv2.resize(picture, (width, height), interpolation=interpolation), dtype=np.uint8)


def _text(draw: ImageDraw.ImageDraw, position: tuple[int, int], text: str, size: int, width: int) -> None:
    font = ImageFont.load_default(size)
    text = " ".join(text.split())
    while text and draw.textlength(text, font=font) > width:
        text = text.removesuffix("...")[:-1] + "..." if len(text) > 4 else ""
    draw.text(position, text, fill=_INK, font=font)


def write_png(path: Path, image: Rgb) -> None:
    """Write a PNG whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        Image.fromarray(image).save(temporary, format="PNG")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
