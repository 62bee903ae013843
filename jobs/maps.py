"""``anomalydino maps OUT``: anomaly maps of a finished run at the images' own size, a file for each image.

    TO/C/NAME-ID.png            coloured, one scale for each category; with ``overlay`` over the image
    TO/C/NAME-ID.npy  or .tiff  the values, float32
    TO/maps.csv                 image_id, category, uri and file of each; written last

``C`` is the percent-encoded category and ``ID`` a checksum of the image's id: no name leaves the folder, and no two are
the same. Legend: ``H W`` pixels.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from anomalydino_plugin import AnomalyDINOError, ImageError
from jobs.config import MapsConfig
from jobs.decode import read
from jobs.filesystem import Folder
from jobs.gallery import heat_scale
from jobs.patch_reader import ImagePatches, read_patches
from jobs.pictures import heat_colors, overlay
from jobs.progress import ImageProgress
from jobs.run_geometry import RunGeometry
from jobs.run_records import Row, Run, read_run, short_name
from jobs.store import folder_name

FOLDER, INDEX = "maps", "maps.csv"
_INDEX_COLUMNS = ("image_id", "category", "uri", "file")
_NAME = 80  # characters of a file's own name that are kept
_ID = 12  # hexadecimal digits
_ENDINGS = {"png": "png", "overlay": "png", "npy": "npy", "tiff": "tiff"}


def main(options: Any, console: Console) -> int:
    """``anomalydino maps OUT``."""
    run(MapsConfig(options.out, options.format, options.to, options.category), console)
    return 0


def run(config: MapsConfig, console: Console) -> Folder:
    """Write the maps; those that are there already are written again.

    Returns:
        Where they are.

    Raises:
        AnomalyDINOError: no finished run, or no such category.
    """
    found = read_run(config.out, config.categories)
    target = Folder(config.to if config.to is not None else found.store.folder.uri(FOLDER))
    geometry = RunGeometry.of(found.store)
    written, problems = [], []
    with ImageProgress(console, "maps", found.images) as progress:
        for row, patches in _images(found):
            try:
                values = geometry.anomaly_map((row["height"], row["width"]), patches.distances)
                scale = heat_scale(found.scores[row["category"]])
                name = map_name(row, _ENDINGS[config.format])
                target.write(name, _encoded(values, row, config.format, scale))
                written.append({**{key: row[key] for key in _INDEX_COLUMNS[:3]}, "file": name})
            except AnomalyDINOError as error:  # an overlay needs the image, which may be gone
                problems.append(str(error))
            progress.advance(1)
    target.write(INDEX, _index(written))
    for problem in problems[:5]:
        console.print(f"no map: {problem}", markup=False, soft_wrap=True)
    left = f", {len(problems)} images left out" if problems else ""
    console.print(f"{len(written)} maps{left} -> {target.location}", markup=False, soft_wrap=True)
    return target


def _images(found: Run) -> Iterator[tuple[Row, ImagePatches]]:
    rows = {row["image_id"]: row for own in found.scores.values() for row in own}
    grids = {name: (row["grid_rows"], row["grid_cols"]) for name, row in rows.items() if row["grid_rows"] is not None}
    for patches in read_patches(found.store, grids):
        yield rows[patches.image_id], patches


def map_name(row: Row, ending: str) -> str:
    """Name of an image's map: safe whatever the image, its id or its category are called."""
    name = short_name(row["uri"]).replace("/", "_").rpartition(".")
    stem = folder_name(name[0] or name[2])[-_NAME:].lstrip(".")
    digest = hashlib.sha256(row["image_id"].encode("utf-8", "surrogatepass")).hexdigest()[:_ID]
    return f"{folder_name(row['category'])}/{stem}-{digest}.{ending}"


def _encoded(values: NDArray[np.float32], row: Row, kind: str, scale: tuple[float, float]) -> bytes:
    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, values, allow_pickle=False)
    elif kind == "tiff":
        Image.fromarray(values).save(buffer, format="TIFF", compression="tiff_adobe_deflate")
    elif kind == "overlay":
        Image.fromarray(overlay(_image(row), values, *scale)).save(buffer, format="PNG")
    else:
        Image.fromarray(heat_colors(values, 0.0, scale[1])).save(buffer, format="PNG")
    return buffer.getvalue()


def _image(row: Row) -> NDArray[np.uint8]:
    image = read(row["uri"])
    if image.shape[:2] != (row["height"], row["width"]):
        raise ImageError(
            f"image {row['uri']!r} has {image.shape[1]} x {image.shape[0]} pixels now, it had {row['width']} x "
            f"{row['height']} when it was scored: expected the same file. Score it again."
        )
    return image


def _index(rows: list[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, _INDEX_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: row["file"]))
    return text.getvalue().encode("utf-8", "surrogatepass")
