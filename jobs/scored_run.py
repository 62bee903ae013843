"""A finished run read back for evaluation: scores and labels at once, patch distances as a stream.

Legend: ``H W`` pixels, ``h w`` patch grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from anomalydino_plugin import InputError, anomaly_map, patch_size_of, plan_geometry
from jobs.parquet import image_spans, read_rows
from jobs.store import Store, folder_name

_SCORING = ("score", "match")  # stages that write scores


class ScoredImage(NamedTuple):
    """One scored image.

    Attributes:
        image_id: which.
        uri: where it is.
        label: ``"good"``, the kind of defect, or ``None`` where unknown.
        mask_uri: ground truth, or ``None``.
        size: (H, W).
        grid: (h, w).
        score: raw.
        threshold: of the run, on raw scores; ``None`` where it has none.
    """

    image_id: str
    uri: str
    label: str | None
    mask_uri: str | None
    size: tuple[int, int]
    grid: tuple[int, int]
    score: float
    threshold: float | None


class ScoredRun:
    """One output folder.

    Args:
        out: path or URI.

    Attributes:
        images: scored images by category, sorted; by id within it.
        failed: images that could not be processed, by category.
        settings: of the stage that scored.

    Raises:
        InputError: ``out`` holds no scores, or not the images they are for.
    """

    def __init__(self, out: str) -> None:
        self.store = Store(out)
        scores = self.store.read("scores", ["image_id", "category", "score", "threshold"]).to_pylist()
        rows = {row["image_id"]: row for row in self.store.read("images").to_pylist() if row["status"] != "reference"}
        self.images: dict[str, list[ScoredImage]] = {}
        for row in sorted(scores, key=lambda row: (row["category"], row["image_id"])):
            if row["image_id"] not in rows:
                raise InputError(
                    f"image {row['image_id']!r} has a score and no row in images under {self.store.location!r}: "
                    "expected both. `anomalydino verify` says what else is missing."
                )
            self.images.setdefault(row["category"], []).append(_scored_image(row, rows[row["image_id"]]))
        self.failed = dict.fromkeys(self.images, 0)
        for row in rows.values():
            if row["status"] == "failed":
                self.failed[row["category"]] = self.failed.get(row["category"], 0) + 1
        self.settings, self._patch_size = self._how_it_scored()

    def _how_it_scored(self) -> tuple[dict[str, Any], int | None]:
        """Settings of the scoring stage, and the patch size if it is known; none while the run goes on."""
        stages = self.store.read_json("job.json")["stages"] if self.store.folder.has("job.json") else {}
        entry: dict[str, Any] = next((stages[stage] for stage in _SCORING if stage in stages), {})
        # What the features say goes before what was asked for: they may come from another run.
        settings = {**entry.get("config", {}), **(entry.get("fingerprint") or {})}
        patch_size = entry.get("patch_size")
        if patch_size is None and "backbone" in settings:
            patch_size = patch_size_of(settings["backbone"])
        return settings, patch_size

    def distances(self, category: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Id and (P,) patch distances of each image of a category, a row group in memory at a time."""
        prefix = f"patch_scores/{folder_name(category)}/"
        for record in self.store.files():
            if record.file.startswith(prefix):
                with self.store.folder.open(record.file) as source, pq.ParquetFile(source) as file:
                    for number in range(file.num_row_groups):
                        yield from _by_image(read_rows(file, number, ["image_id", "distance"]))

    def anomaly_map(self, image: ScoredImage, distances: NDArray[np.float32]) -> NDArray[np.float32]:
        """(H, W) map of an image at its own size, as the library makes it: over the area that patches cover.

        Raises:
            InputError: the distances, or the run's resolution, do not fit the patch grid.
        """
        import torch

        if distances.size != image.grid[0] * image.grid[1]:
            raise InputError(f"{distances.size} patch distances: expected a grid of {image.grid}.")
        values = torch.from_numpy(np.array(distances).reshape(image.grid))
        return np.asarray(anomaly_map(values, image.size, coverage=self._coverage(image)).numpy())

    def _coverage(self, image: ScoredImage) -> tuple[float, float]:
        if self._patch_size is None or "resolution" not in self.settings:
            return (1.0, 1.0)
        resolution = int(self.settings["resolution"])
        plan = plan_geometry(*image.size, resolution, self._patch_size)
        if plan.grid != image.grid:
            raise InputError(
                f"patch grid {image.grid} of an image of {image.size}: expected {plan.grid} at resolution "
                f"{resolution}, as job.json states it."
            )
        return plan.coverage


def _scored_image(score: dict[str, Any], row: dict[str, Any]) -> ScoredImage:
    return ScoredImage(
        image_id=row["image_id"],
        uri=row["uri"],
        label=row["label"],
        mask_uri=row["mask_uri"],
        size=(row["height"], row["width"]),
        grid=(row["grid_rows"], row["grid_cols"]),
        score=score["score"],
        threshold=score["threshold"],
    )


def _by_image(table: Any) -> Iterator[tuple[str, NDArray[np.float32]]]:
    distances = table["distance"].to_numpy()
    for image_id, start, end in image_spans(table):
        yield image_id, distances[start:end]
