"""Rows read back, a row group at a time: do they say what they should, and does every image have its own?

Legend: ``h w`` patch grid.

Of each image only its id and its grid are kept, one category at a time: memory does not grow with patches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jobs.parquet import image_spans
from jobs.store import folder_name
from jobs.verify_findings import Findings
from jobs.verify_records import ListedFile

Grid = tuple[int, int]
_STATUSES = {
    "extract": frozenset({"extracted", "failed"}),
    "score": frozenset({"scored", "failed"}),
    "match": frozenset({"scored"}),
    "fit": frozenset({"reference"}),
}
_MODES = {"score": frozenset({"few-shot"}), "match": frozenset({"official", "musc"})}
_MATCH = ("match_image_id", "match_row", "match_col", "match_rotation")
_LARGEST_DISTANCE = 2.0  # 1 - cosine
_NORMALISED_WITHIN = 1e-6  # a few roundings of float32 at 1


class CategoryImages:
    """Images of one category.

    Attributes:
        done: grid by id of those that were scored or extracted.
        failed: ids of those that could not be processed.
        references: grid by id.
    """

    def __init__(self) -> None:
        self.done: dict[str, Grid] = {}
        self.failed: set[str] = set()
        self.references: dict[str, Grid] = {}
        self._grids: dict[Grid, Grid] = {}  # one tuple for all images of a grid

    def take(self, listed: ListedFile, table: pa.Table, findings: Findings) -> None:
        """Take in rows of ``images``."""
        allowed = _STATUSES.get(listed.stage, frozenset())
        for row in table.select(["image_id", "status", "width", "height", "grid_rows", "grid_cols"]).to_pylist():
            self._take(listed, row, allowed, findings)

    def _take(self, listed: ListedFile, row: dict[str, Any], allowed: frozenset[str], findings: Findings) -> None:
        file, name, status = listed.record.file, row["image_id"], row["status"]
        if status not in allowed:
            statuses = " or ".join(sorted(allowed)) or "no rows"
            findings.count(file, f"images with status {status!r}", f"{statuses}, from {listed.stage}", 1, name)
        if name in (self.references if status == "reference" else self):
            findings.count(file, "images that have a row already", "one row for each image", 1, name)
            return
        if status == "failed":
            self.failed.add(name)
            return
        sizes = [row[key] for key in ("width", "height", "grid_rows", "grid_cols")]
        if not all(sizes):
            findings.count(file, "images without size or patch grid", "both, unless the image failed", 1, name)
        grid = self._grids.setdefault((sizes[2] or 0, sizes[3] or 0), (sizes[2] or 0, sizes[3] or 0))
        (self.references if status == "reference" else self.done)[name] = grid

    def __contains__(self, name: object) -> bool:
        return name in self.done or name in self.failed


class Coverage:
    """Which images have rows of one kind, and which still wait for theirs.

    Args:
        grids: grid of every image that should have some.
        status: ``"done"`` or ``"failed"``, of these images.
        findings: where problems go.
    """

    def __init__(self, grids: Mapping[str, Grid], status: str, findings: Findings) -> None:
        self._grids, self._status, self._findings = grids, status, findings
        self._waiting = set(grids)

    def see(self, file: str, name: str) -> Grid | None:
        """Note the rows of an image; its grid, where these are its first ones."""
        if name not in self._grids:
            what = f"images that images/ does not list as {self._status}"
            self._findings.count(file, what, "only those it lists", 1, name)
        elif name not in self._waiting:
            self._findings.count(file, "images that have rows already", "their rows once, in one row group", 1, name)
        else:
            self._waiting.discard(name)
            return self._grids[name]
        return None

    def see_rows(self, file: str, table: pa.Table) -> None:
        """Note rows of a kind that has one for each image."""
        for name in table["image_id"].to_pylist():
            self.see(file, name)

    def finish(self, place: str) -> None:
        """Report images without rows."""
        what, expected = (
            f"{self._status} images without rows",
            f"rows of every image that images/ lists as {self._status}",
        )
        self._findings.count(place, what, expected, len(self._waiting), min(self._waiting, default=""))


def check_category(listed: ListedFile, table: pa.Table, findings: Findings) -> None:
    """Do all rows belong to the category that file and folder stand for?"""
    file, own = listed.record.file, listed.category
    for category, number in _counted(table["category"]):
        if category != own:
            findings.count(file, f"rows of category {category!r}", f"category {own!r} only", number, own)
    folder = f"{listed.record.kind}/{folder_name(own)}/"
    if listed.record.kind != "failures" and not file.startswith(folder):
        findings.add(file, f"a file of category {own!r}", f"it under {folder}")


def check_scores(listed: ListedFile, table: pa.Table, findings: Findings) -> None:
    """Are scores finite, and verdicts what score and threshold say?"""
    file, modes = listed.record.file, _MODES.get(listed.stage, frozenset())
    for row in table.to_pylist():
        name, score, threshold = row["image_id"], row["score"], row["threshold"]
        if not math.isfinite(score) or (threshold is not None and not math.isfinite(threshold)):
            findings.count(file, "scores or thresholds that are not finite", "finite ones", 1, name)
            continue
        if row["is_anomalous"] != (None if threshold is None else score > threshold):
            findings.count(file, "wrong verdicts", "is_anomalous = score > threshold", 1, name)
        if not _is_normalised(row["normalised_score"], score, threshold):
            findings.count(file, "wrong normalised scores", "score / (score + threshold)", 1, name)
        if row["mode"] not in modes:
            findings.count(file, f"rows with mode {row['mode']!r}", f"{' or '.join(sorted(modes))}", 1, name)


def _is_normalised(value: float | None, score: float, threshold: float | None) -> bool:
    if threshold is None or value is None:
        return threshold is None and value is None
    total = score + threshold
    return abs(value - (score / total if total > 0 else 0.5)) <= _NORMALISED_WITHIN


def check_positions(listed: ListedFile, table: pa.Table, coverage: Coverage, findings: Findings) -> int:
    """Has every image one row for each patch, in row-major order?

    Returns:
        Images whose rows begin here.
    """
    file = listed.record.file
    rows, columns = (_numpy(table[name]) for name in ("patch_row", "patch_col"))
    images = 0
    for name, start, end in image_spans(table):
        images += 1
        grid = coverage.see(file, name)
        if grid is None:
            continue
        if end - start != grid[0] * grid[1]:
            example = f"{name} with {end - start} instead of {grid[0] * grid[1]}"
            findings.count(file, "images with too few or too many patch rows", "grid_rows * grid_cols", 1, example)
            continue
        expected = _row_major(grid)
        if (rows[start:end] != expected[0]).any() or (columns[start:end] != expected[1]).any():
            findings.count(file, "images with patches missing, doubled or out of order", "row-major order", 1, name)
    return images


def check_distances(listed: ListedFile, table: pa.Table, findings: Findings) -> None:
    """Are distances in range, and masked patches without distance and match?"""
    distance, masked = _numpy(table["distance"]), ~_numpy(table["foreground"])
    outside = ~((distance >= 0) & (distance <= _LARGEST_DISTANCE))  # NaN is outside, too
    _flag(listed, table, outside, "distances that are not in [0, 2]", "1 - cosine", findings)
    _flag(listed, table, masked & (distance != 0), "masked patches with a distance", "distance 0", findings)
    null = np.stack([_numpy(table[name].is_null()) for name in _MATCH])
    _flag(listed, table, masked & ~null.all(axis=0), "masked patches with a match", "null", findings)
    _flag(listed, table, ~masked & null.any(axis=0), "patches without a match that are not masked", "a match", findings)


def check_matches(listed: ListedFile, table: pa.Table, targets: Mapping[str, Grid], findings: Findings) -> None:
    """Do matches name images that are there, and patches on their grids?

    Args:
        listed: the file.
        table: rows of ``patch_scores``.
        targets: grid by id of images that can be matched.
        findings: where problems go.
    """
    encoded = table["match_image_id"].combine_chunks().dictionary_encode()
    grids = [targets.get(name) for name in encoded.dictionary.to_pylist()]
    grids.append((1, 1))  # stands for no match
    index = _numpy(encoded.indices.fill_null(len(grids) - 1))
    unknown = np.array([grid is None for grid in grids])[index]
    known = ~unknown & (index < len(grids) - 1)
    kind = "reference images" if listed.stage == "score" else "other images of the category"
    _flag(listed, table, unknown, "matches that name no row of images", kind, findings)
    limits = np.array([grid or (1, 1) for grid in grids])[index]
    places = np.stack([_numpy(table[name].fill_null(0)) for name in ("match_row", "match_col")], axis=1)
    outside = known & ((places < 0) | (places >= limits)).any(axis=1)
    _flag(listed, table, outside, "matches outside the patch grid of their image", "rows and columns inside", findings)
    if listed.stage == "match":
        own = _numpy(pc.equal(table["image_id"], table["match_image_id"]).fill_null(False))
        _flag(listed, table, own, "patches matched to their own image", kind, findings)


def check_embeddings(listed: ListedFile, table: pa.Table, findings: Findings) -> None:
    """Are embeddings finite?"""
    column = table["embedding"].combine_chunks()
    finite = np.isfinite(_numpy(column.flatten()).reshape(-1, column.type.list_size)).all(axis=1)
    _flag(listed, table, ~finite, "embeddings that are not finite", "finite ones", findings)


def count_images(table: pa.Table) -> int:
    """Images whose rows stand in a row group."""
    return sum(1 for _ in image_spans(table))


def _flag(
    listed: ListedFile, table: pa.Table, faulty: NDArray[np.bool_], what: str, expected: str, findings: Findings
) -> None:
    if faulty.any():
        row = table.slice(int(faulty.argmax()), 1).select(["image_id", "patch_row", "patch_col"]).to_pylist()[0]
        example = f"{row['image_id']} at row {row['patch_row']}, column {row['patch_col']}"
        findings.count(listed.record.file, what, expected, int(faulty.sum()), example)


def _counted(values: pa.ChunkedArray) -> Iterator[tuple[str, int]]:
    for row in values.value_counts().to_pylist():
        yield row["values"], row["counts"]


def _numpy(values: Any) -> NDArray[Any]:
    joined = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    array: NDArray[Any] = joined.to_numpy(zero_copy_only=False)
    return array


@functools.lru_cache(maxsize=64)
def _row_major(grid: Grid) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    rows, columns = np.indices(grid, dtype=np.int16)
    return rows.reshape(-1), columns.reshape(-1)
