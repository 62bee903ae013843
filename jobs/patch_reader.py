"""Patch scores of single images, read back from a run a row group at a time.

Legend: ``h w`` patch grid.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from jobs.parquet import image_spans, read_rows
from jobs.store import Store

_COLUMNS = ["image_id", "foreground", "distance", "match_image_id", "match_row", "match_col", "match_rotation"]


class TopMatch(NamedTuple):
    """The most anomalous patch of an image, and the reference patch that it matched.

    Attributes:
        row: of the patch on its grid.
        col: likewise.
        distance: its patch distance, in [0, 2].
        image_id: of the image it matched.
        match_row: of the matched patch, on the grid of the rotated image.
        match_col: likewise.
        rotation: of the reference image, degrees counter-clockwise.
    """

    row: int
    col: int
    distance: float
    image_id: str
    match_row: int
    match_col: int
    rotation: float


class ImagePatches(NamedTuple):
    """One image.

    Attributes:
        image_id: which.
        distances: (h, w) float32, 0 where masked.
        foreground: (h, w) bool, the mask that was used.
        top: its most anomalous patch, the first of equal ones; ``None`` where all are masked.
    """

    image_id: str
    distances: NDArray[np.float32]
    foreground: NDArray[np.bool_]
    top: TopMatch | None


def read_patches(store: Store, grids: Mapping[str, tuple[int, int]]) -> Iterator[ImagePatches]:
    """Patch scores of some images, in the order of the files; one row group is held at a time.

    Args:
        store: a finished run.
        grids: (h, w) of the images wanted, by id. An image whose rows are not h * w is left out.
    """
    wanted = sorted(grids)
    for name in [record.file for record in store.files() if record.kind == "patch_scores"]:
        with store.folder.open(name) as opened:
            file = pq.ParquetFile(opened)
            for number in range(file.num_row_groups):
                if _may_hold(file.metadata.row_group(number), wanted):
                    yield from _images(read_rows(file, number, _COLUMNS), grids)


def _may_hold(group: Any, wanted: list[str]) -> bool:
    column = next(i for i in range(group.num_columns) if group.column(i).path_in_schema == "image_id")
    statistics = group.column(column).statistics
    if statistics is None or not statistics.has_min_max:
        return True
    first = bisect.bisect_left(wanted, statistics.min)
    return first < len(wanted) and wanted[first] <= statistics.max


def _images(table: pa.Table, grids: Mapping[str, tuple[int, int]]) -> Iterator[ImagePatches]:
    for image_id, start, end in image_spans(table):
        grid = grids.get(image_id)
        if grid is not None and grid[0] * grid[1] == end - start:
            yield _image(image_id, grid, table.slice(start, end - start))


def _image(image_id: str, grid: tuple[int, int], rows: pa.Table) -> ImagePatches:
    distances = np.array(rows["distance"].to_numpy(), dtype=np.float32)
    foreground = np.array(rows["foreground"].to_numpy(zero_copy_only=False), dtype=bool)
    return ImagePatches(image_id, distances.reshape(grid), foreground.reshape(grid), _top(distances, grid, rows))


def _top(distances: NDArray[np.float32], grid: tuple[int, int], rows: pa.Table) -> TopMatch | None:
    index = int(np.argmax(distances))
    matched = rows.slice(index, 1).to_pylist()[0]
    if matched["match_image_id"] is None:
        return None
    row, col = divmod(index, grid[1])
    return TopMatch(
        row,
        col,
        float(distances[index]),
        matched["match_image_id"],
        int(matched["match_row"]),
        int(matched["match_col"]),
        float(matched["match_rotation"]),
    )
