"""Pictures of a finished run, drawn from its Parquet files and the images they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from anomalydino_plugin import AnomalyDINOError, ConfigError
from jobs.decode import read
from jobs.inputs import GOOD
from jobs.patch_reader import read_patches
from jobs.pictures import heat_colors, overlay, panel, write_png
from jobs.run_geometry import RunGeometry
from jobs.store import Store, folder_name


def write_gallery(out: str, *, per_category: int) -> list[Path]:
    """Draw the most and the least anomalous images of every category.

    Args:
        out: output folder of a run.
        per_category: pictures for each category, half of them from either end.

    Returns:
        Paths of the pictures, under ``OUT/pictures``.
    """
    store = Store(out)
    root = store.folder.local
    if root is None:
        raise ConfigError(f"pictures of {out!r}: expected a local folder. Copy the run's folder first.")
    scores = store.read("scores").to_pylist()
    images = {row["image_id"]: row for row in store.read("images").to_pylist() if row["status"] != "reference"}
    geometry, written = RunGeometry.of(store), []
    for category in sorted({row["category"] for row in scores}):
        ranked = sorted((row for row in scores if row["category"] == category), key=lambda row: -row["score"])
        chosen = _ends(ranked, per_category)
        scale = heat_scale(ranked)
        own = {row["image_id"]: images[row["image_id"]] for row in chosen}
        grids = {name: (image["grid_rows"], image["grid_cols"]) for name, image in own.items()}
        distances = {patches.image_id: patches.distances for patches in read_patches(store, grids)}
        for row in chosen:
            path = root / "pictures" / folder_name(category) / _picture_name(row, ranked.index(row) + 1)
            if _draw(path, row, own[row["image_id"]], distances[row["image_id"]], geometry, scale):
                written.append(path)
    return written


def _ends(ranked: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    if len(ranked) <= count:
        return ranked
    return ranked[: count - count // 2] + ranked[len(ranked) - count // 2 :]


def heat_scale(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Distances of no heat and of full heat: one scale for a category, so that pictures can be compared.

    Args:
        rows: of ``scores``, all of one category.

    Returns:
        Half the threshold, and the highest score, but at least 1.5 thresholds: normal images alone stay cold. Without a
        threshold, half the highest score, and the highest score.
    """
    threshold, highest = rows[0]["threshold"], float(max(row["score"] for row in rows))
    return (0.5 * threshold, max(highest, 1.5 * threshold)) if threshold else (0.5 * highest, highest)


def _picture_name(row: dict[str, Any], rank: int) -> str:
    source = Path(row["uri"])
    return f"{rank:04d}_{folder_name(source.parent.name)}_{folder_name(source.stem)}.png"[-200:]


def _draw(
    path: Path,
    row: dict[str, Any],
    image_row: dict[str, Any],
    distances: NDArray[np.float32],
    geometry: RunGeometry,
    scale: tuple[float, float],
) -> bool:
    try:
        image = read(row["uri"])
        truth = read(image_row["mask_uri"])[..., 0] > 0 if image_row["mask_uri"] else None
    except AnomalyDINOError:
        return False  # the file went away after scoring
    values = geometry.anomaly_map((image.shape[0], image.shape[1]), distances)
    if truth is not None and truth.shape != values.shape:
        truth = cv2.resize(truth.astype(np.uint8), values.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0
    verdict = {True: "anomalous", False: "normal", None: "no threshold"}[row["is_anomalous"]]
    label = image_row["label"] or "unlabelled"
    title = f"{row['category']} / {label} / {Path(row['uri']).name}: score {row['score']:.3f}, {verdict}"
    truth_caption = "heat; green: ground truth" if label != GOOD and truth is not None else "heat"
    pictures = [image, overlay(image, values, *scale, truth=truth), heat_colors(values, 0.0, scale[1])]
    write_png(path, panel(pictures, ["image", truth_caption, f"anomaly map, 0 to {scale[1]:.2f}"], title))
    return True
