"""Explanations: the reference image and position that a patch was matched to, as data and as a picture.

Legend: ``H W`` pixels of an image, ``h w`` patch grid. A box is ``(y, x, height, width)`` in whole pixels.

A patch distance is the distance to one patch of one rotated reference image (paper, section 3.2). Every row of the
bank knows which, so that a score can be shown as "this looks least like anything normal; the most similar normal
patch is that one".
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from anomalydino_plugin.decoding import read_image
from anomalydino_plugin.detection import Detection
from anomalydino_plugin.errors import ConfigError, ImageError
from anomalydino_plugin.few_shot import drawing
from anomalydino_plugin.few_shot.drawing import GAP, PANEL, TILE, Box
from anomalydino_plugin.few_shot.torch_model import FewShotModel
from anomalydino_plugin.memory_bank import MemoryBank, PatchSource
from anomalydino_plugin.patch_model import ImageSource, as_image, check_positive
from anomalydino_plugin.preprocessing import Geometry, RgbImage, rotate_image

Reader = Callable[[str], RgbImage]

_WIDTH = 2 * PANEL + 3 * GAP + 88  # pixels; the rest is the colour bar's
_CAPTION = 4 * GAP + 3 * TILE  # left edge of a match's caption


class PatchMatch(NamedTuple):
    """A patch of a test image and what it was matched to.

    Attributes:
        row: of the test patch on its grid.
        column: likewise.
        distance: its patch distance, in [0, 2]; the mean over k neighbours where the model's k is above 1.
        source: the nearest reference patch: image, rotation, row and column on the rotated image's grid.
        box: the test patch in pixels of the test image.
        source_box: the reference patch in pixels of the ROTATED reference image (``rotate_image(image, rotation)``).
    """

    row: int
    column: int
    distance: float
    source: PatchSource
    box: Box
    source_box: Box


def matched_patches(
    model: FewShotModel, detection: Detection, *, top: int = 5, patches: Sequence[tuple[int, int]] | None = None
) -> list[PatchMatch]:
    """What patches of a scored image were matched to.

    Args:
        model: the one that made the detection, with the same bank.
        detection: from ``model.score``.
        top: how many patches, largest distance first, equal distances in reading order (row, then column); masked
            patches do not count, and there are fewer where the image has fewer.
        patches: (row, column) of the patches wanted instead, returned in this order.

    Raises:
        ConfigError: ``top`` below 1, a patch outside the grid or in the background, or a detection of other settings.
        BankError: the bank is empty, or smaller than the one that was searched.
    """
    check_positive("top", top)
    geometry, patch_size = detection.geometry, model.backbone.patch_size
    if geometry != model.plan_size(*geometry.image_size):
        raise ConfigError(f"detection of {geometry}: expected one made by this model. Score the image again.")
    bank = model.bank
    sizes = dict(zip(bank.image_ids, bank.sizes, strict=True))
    matches = []
    for row, column in _largest(detection, top) if patches is None else _checked(detection, patches):
        source = bank.source(int(detection.matched_rows[row, column]))
        box = _box(geometry, patch_size, row, column)
        source_box = _box(model.plan_size(*sizes[source.image_id]), patch_size, source.row, source.column)
        matches.append(PatchMatch(row, column, float(detection.distances[row, column]), source, box, source_box))
    return matches


def _largest(detection: Detection, top: int) -> list[tuple[int, int]]:
    kept = np.flatnonzero(detection.foreground)
    order = kept[np.argsort(-detection.distances.reshape(-1)[kept], kind="stable")][:top]
    return [divmod(int(index), detection.geometry.grid[1]) for index in order]


def _checked(detection: Detection, patches: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    rows, columns = detection.geometry.grid
    for row, column in patches:
        if not (0 <= row < rows and 0 <= column < columns):
            raise ConfigError(f"patch ({row}, {column}): expected a row below {rows} and a column below {columns}.")
        if not detection.foreground[row, column]:
            raise ConfigError(
                f"patch ({row}, {column}) is background: the foreground mask left it out, so it matched nothing. "
                "Choose a patch where detection.foreground is true, or set masking to 'off'."
            )
    return [(int(row), int(column)) for row, column in patches]


def _box(geometry: Geometry, patch_size: int, row: int, column: int) -> Box:
    """Where a patch lies on the image before resizing; neighbours meet without gap or overlap."""
    (y, height), (x, width) = (
        _span(index * patch_size, patch_size, pixels / resized, pixels)
        for index, pixels, resized in zip((row, column), geometry.image_size, geometry.resized, strict=True)
    )
    return y, x, height, width


def _span(start: int, length: int, scale: float, pixels: int) -> tuple[int, int]:
    first = min(round(start * scale), pixels - 1)  # a patch of an enlarged image can be less than a pixel
    return first, max(1, round((start + length) * scale) - first)


def explain_picture(
    model: FewShotModel,
    image: ImageSource,
    *,
    top: int = 5,
    patches: Sequence[tuple[int, int]] | None = None,
    read: Reader = read_image,
) -> tuple[RgbImage, list[PatchMatch]]:
    """Draw a test image, its anomaly map, and its patches beside the reference patches they matched.

    Args:
        model: fitted.
        image: a path, or (H, W, 3) uint8.
        top: see ``matched_patches``.
        patches: see ``matched_patches``.
        read: reference image from its id. The default takes ids for paths, which they are where the bank was fitted
            from paths. Where it raises ``LookupError``, ``OSError`` or ``ValueError`` (an ``ImageError`` is one), or
            the image has another size than the bank was built from, a grey tile says so.

    Returns:
        The picture, (H', 1160, 3) uint8 RGB, and the matches in the order of its rows.

    Raises:
        ConfigError, BankError: as ``matched_patches``.
        ImageError: the test image cannot be used.
    """
    pixels = as_image(image)
    detection = model.score(pixels)
    matches = matched_patches(model, detection, top=top, patches=patches)
    name = "test image" if isinstance(image, np.ndarray) else _short_name(os.fspath(image))
    title = f"{name}: image score {detection.score:.4f}"
    overview = _overview(model, pixels, detection, [match.box for match in matches], title)
    read_once = functools.lru_cache(maxsize=1)(read)  # neighbouring patches often match the same reference
    rows = [_match_row(number, match, pixels, model.bank, read_once) for number, match in enumerate(matches, 1)]
    return np.vstack([overview, _headings(len(matches)), *rows]), matches


def save_explanation(picture: RgbImage, path: str | os.PathLike[str]) -> None:
    """Write a picture as PNG, whole or not at all; the parent folder is made.

    Args:
        picture: (H, W, 3) uint8 RGB.
        path: replaced where it exists.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        Image.fromarray(picture).save(temporary, format="PNG")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _overview(model: FewShotModel, pixels: RgbImage, found: Detection, boxes: Sequence[Box], title: str) -> RgbImage:
    """Test image with numbered patches, and the same image under its anomaly map."""
    values = model.anomaly_map(found)
    high = float(values.max())
    hot = drawing.heat(drawing.fit(pixels, PANEL), values, high)
    height, width = hot.shape[:2]
    legend = f"anomaly map, scale 0 to {high:.3g}"
    if model.use_mask:
        drawing.outline_mask(hot, found.foreground, found.geometry.coverage)
        legend += "; blue line: foreground mask"
    page = drawing.Page(_WIDTH, max(height, 48) + 6 * GAP)  # the colour bar of a strip is higher than the strip
    page.write((GAP, GAP), title, size=22)
    page.write((GAP, 3 * GAP), f"test image; patches explained below: {len(boxes)}")
    page.write((2 * GAP + PANEL, 3 * GAP), legend)
    page.paste((GAP, 5 * GAP - 4), drawing.number_boxes(pixels, boxes))
    page.paste((2 * GAP + PANEL, 5 * GAP - 4), hot)
    page.colour_bar((2 * GAP + PANEL + width + 12, 5 * GAP - 4), max(height, 48), high)
    return page.pixels()


def _headings(count: int) -> RgbImage:
    page = drawing.Page(_WIDTH, 3 * GAP // 2)
    if not count:
        page.write((GAP, 4), "no patch to explain: none was asked for, or all of the image is background")
        return page.pixels()
    for column, text in enumerate(("test patch", "matched reference patch", "where on the reference")):
        page.write((GAP + column * (GAP + TILE), 8), text, width=TILE)
    return page.pixels()


def _match_row(number: int, match: PatchMatch, pixels: RgbImage, bank: MemoryBank, read: Reader) -> RgbImage:
    page, top = drawing.Page(_WIDTH, TILE + GAP), GAP // 2
    page.paste((GAP, top), drawing.patch_tile(pixels, match.box))
    try:
        view = _reference_view(match.source, bank, read)
    except (LookupError, OSError, ValueError) as error:
        page.paste((2 * GAP + TILE, top), drawing.notice_tile(f"reference cannot be shown: {error}"))
    else:
        page.paste((2 * GAP + TILE, top), drawing.patch_tile(view, match.source_box))
        page.paste((3 * GAP + 2 * TILE, top), drawing.place_tile(view, match.source_box))
    page.write((_CAPTION, top + 4), f"{number}.  distance {match.distance:.4f}", size=20)
    for line, text in enumerate(_caption(match)):
        page.write((_CAPTION, top + 40 + 24 * line), text)
    return page.pixels()


def _reference_view(source: PatchSource, bank: MemoryBank, read: Reader) -> RgbImage:
    """The rotated reference image that a patch was cut from."""
    image = as_image(read(source.image_id))
    size = bank.sizes[bank.image_ids.index(source.image_id)]
    if image.shape[:2] != tuple(size):
        raise ImageError(f"it has {image.shape[1]} x {image.shape[0]} pixels, in the bank {size[1]} x {size[0]}.")
    return rotate_image(image, source.rotation) if source.rotation else image


def _caption(match: PatchMatch) -> tuple[str, str, str, str]:
    source = match.source
    turned = f"rotated by {source.rotation:g}\N{DEGREE SIGN}" if source.rotation else "not rotated"
    return (
        f"test patch: row {match.row}, column {match.column}",
        f"matched row {source.row}, column {source.column}",
        f"of reference {_short_name(source.image_id)}",
        turned,
    )


def _short_name(path: str) -> str:
    """File and folder: MVTec has a 000.png in every folder."""
    return drawing.plain(Path(*Path(path).parts[-2:]).as_posix())
