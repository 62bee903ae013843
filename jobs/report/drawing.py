"""Pictures of one image: thumbnail, heat, outlines, its most anomalous patch and what that matched.

Legend: ``H W`` pixels of an image, ``h w`` patch grid.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from anomalydino_plugin import AnomalyDINOError, anomaly_map, rotate_image
from jobs.decode import read
from jobs.gallery import heat_scale
from jobs.inputs import GOOD
from jobs.patch_reader import ImagePatches, TopMatch
from jobs.pictures import Rgb, heat_layer
from jobs.report import thumbnails
from jobs.run_geometry import RunGeometry
from jobs.run_records import Row, Run, short_name

_SIGMA = 4.0  # pixels of the original image, as in ``anomaly_map``
_REFERENCES_KEPT = 4  # decoded reference images; few-shot runs have few, and batched ones rarely ask for one twice
Picture = dict[str, Any]


class Drawer:
    """Draws images of a run. Safe to call from several threads.

    Args:
        run: which.
        edge: of thumbnails, pixels.
    """

    def __init__(self, run: Run, edge: int) -> None:
        self._run, self._edge = run, edge
        self._geometry = RunGeometry.of(run.store)
        self._scale = {category: heat_scale(rows) for category, rows in run.scores.items()}
        self._reference = functools.lru_cache(_REFERENCES_KEPT)(_rotated)

    def draw(self, row: Row, patches: ImagePatches | None) -> Picture:
        """What the page needs to show one image; files that are gone leave notes, no error.

        Args:
            row: of ``Run.scores``.
            patches: its patch scores, where there are any.
        """
        image, notes = self._read(row)
        full_size = image.shape[:2] if image is not None else (row["height"], row["width"])
        size = thumbnails.fitted(full_size, self._edge)
        picture: Picture = {"size": size[::-1], "notes": notes}
        if image is not None:
            picture["image"] = thumbnails.webp(thumbnails.shrink(image, size))
        picture["truth"] = _truth(row, size, notes)
        if patches is not None:
            grid, share = patches.distances.shape, self._geometry.coverage(full_size, patches.distances.shape)
            picture["heat"] = self._heat(row, patches, size, size[0] / full_size[0], share)
            if row["masked"]:
                picture["mask"] = thumbnails.grid_outline(patches.foreground, size, share)
            if patches.top is not None:
                picture["top"] = self._top(patches.top, image, full_size, grid, size)
        return picture

    def _read(self, row: Row) -> tuple[Rgb | None, list[str]]:
        try:
            image = read(row["uri"])
        except AnomalyDINOError as error:
            return None, [f"The image cannot be shown: {error}"]
        if image.shape[:2] != (row["height"], row["width"]):
            return image, [
                f"The image has another size now than when it was scored ({row['width']} x {row['height']})."
            ]
        return image, []

    def _heat(
        self, row: Row, patches: ImagePatches, size: tuple[int, int], scale: float, share: tuple[float, float]
    ) -> str:
        import torch

        values = anomaly_map(torch.from_numpy(patches.distances), size, sigma=_SIGMA * scale, coverage=share).numpy()
        return thumbnails.webp(heat_layer(values, *self._scale[row["category"]]))

    def _top(
        self,
        top: TopMatch,
        image: Rgb | None,
        full_size: tuple[int, int],
        grid: tuple[int, int],
        size: tuple[int, int],
    ) -> Picture:
        y, x, height, width = box = self._geometry.box(full_size, grid, top.row, top.col)
        scale = size[0] / full_size[0]
        found: Picture = {
            "row": top.row,
            "col": top.col,
            "distance": top.distance,
            "box": [round(value * scale, 1) for value in (x, y, width, height)],
            "match": self._match(top),
        }
        if image is not None:
            found["patch"] = thumbnails.webp(thumbnails.patch_tile(image, box))
        return found

    def _match(self, top: TopMatch) -> Picture:
        row = self._run.references.get(top.image_id)
        match: Picture = {"id": top.image_id, "row": top.match_row, "col": top.match_col, "rotation": top.rotation}
        if row is None:
            return {**match, "note": "The run does not say where this image is: its banks are in another folder."}
        match["name"] = short_name(row["uri"])
        try:
            image = self._reference(row["uri"], top.rotation)
        except AnomalyDINOError as error:
            return {**match, "note": f"The image cannot be shown: {error}"}
        if image.shape[:2] != (row["height"], row["width"]):
            return {**match, "note": "The image has another size now than when it was used."}
        grid = (row["grid_rows"], row["grid_cols"])
        box = self._geometry.box(image.shape[:2], grid, top.match_row, top.match_col)
        return {**match, "patch": thumbnails.webp(thumbnails.patch_tile(image, box))}


def _rotated(uri: str, angle: float) -> Rgb:
    image = read(uri)
    return rotate_image(image, angle) if angle else image


def _truth(row: Mapping[str, Any], size: tuple[int, int], notes: list[str]) -> str:
    if not row["mask_uri"] or row["label"] == GOOD:
        return ""
    try:
        region: NDArray[np.bool_] = read(row["mask_uri"])[..., 0] > 0
    except AnomalyDINOError as error:
        notes.append(f"The ground truth cannot be shown: {error}")
        return ""
    if max(region.shape) > 2048:  # outlines of thumbnails need no more
        smaller = thumbnails.fitted(region.shape, 2048)
        region = cv2.resize(region.astype(np.uint8), smaller[::-1], interpolation=cv2.INTER_AREA) > 0
    return thumbnails.outline(region, size)
