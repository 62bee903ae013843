"""Results of a shard -> the tables of ``schema.py``.

Legend: ``P`` patches of one image, ``D`` features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from anomalydino_plugin import Detection, Geometry, ImageError, MemoryBank, normalise_score
from jobs import schema
from jobs.decode import Failure
from jobs.inputs import ImageRecord


class Scored(NamedTuple):
    """One scored image; ``features`` (P, D) float32 only where embeddings are written."""

    record: ImageRecord
    detection: Detection
    features: NDArray[np.float32] | None = None


class Extracted(NamedTuple):
    """One encoded image.

    Attributes:
        record: which.
        plan: its sizes.
        features: (P, D) float32, not normalised.
        foreground: (h, w) bool, as masks would have it; all true where none were computed.
        masking_test: whether the masking test passes; ``None`` where it was not run.
    """

    record: ImageRecord
    plan: Geometry
    features: NDArray[np.float32]
    foreground: NDArray[np.bool_]
    masking_test: bool | None


def scored_images(scored: Sequence[Scored], failures: Sequence[Failure]) -> pa.Table:
    """``images`` rows of a scored shard, sorted by id."""
    rows = [_image_row(item.record, item.detection.geometry, "scored") for item in scored]
    return _images([*rows, *_failed(failures)])


def extracted_images(extracted: Sequence[Extracted], failures: Sequence[Failure]) -> pa.Table:
    """``images`` rows of an encoded shard, sorted by id."""
    rows = [
        {**_image_row(item.record, item.plan, "extracted"), "masking_test": item.masking_test} for item in extracted
    ]
    return _images([*rows, *_failed(failures)])


def reference_images(records: Sequence[ImageRecord], plans: Sequence[Geometry]) -> pa.Table:
    """``images`` rows of reference images, so that matches can be joined to files."""
    rows = [_image_row(record, plan, "reference") for record, plan in zip(records, plans, strict=True)]
    return pa.Table.from_pylist(rows, schema=schema.IMAGES)


def _images(rows: list[dict[str, object]]) -> pa.Table:
    return pa.Table.from_pylist(sorted(rows, key=lambda row: str(row["image_id"])), schema=schema.IMAGES)


def _failed(failures: Sequence[Failure]) -> list[dict[str, object]]:
    return [_image_row(failure.record, None, "failed") for failure in failures]


def _image_row(record: ImageRecord, plan: Geometry | None, status: str) -> dict[str, object]:
    height, width = plan.image_size if plan else (None, None)
    grid_rows, grid_cols = plan.grid if plan else (None, None)
    return {
        "image_id": record.image_id,
        "uri": record.uri,
        "category": record.category,
        "split": record.split,
        "label": record.label,
        "mask_uri": record.mask_uri,
        "width": width,
        "height": height,
        "grid_rows": grid_rows,
        "grid_cols": grid_cols,
        "status": status,
        "masking_test": None,
    }


def scores_table(
    scored: Sequence[Scored], threshold: float | None, statistic: str, masked: bool, mode: str = "few-shot"
) -> pa.Table:
    """A row for each scored image.

    Args:
        scored: results.
        threshold: on the raw score; ``None`` where there is none.
        statistic: how the score was made.
        masked: whether foreground masks were used; a row says so only where its mask hides a patch.
        mode: of scoring.
    """
    # The verdict compares what is stored: float32 on both sides.
    limit = None if threshold is None else np.float32(threshold)
    rows = []
    for item in scored:
        score = np.float32(item.detection.score)
        rows.append(
            {
                "image_id": item.record.image_id,
                "uri": item.record.uri,
                "category": item.record.category,
                "mode": mode,
                "score": float(score),
                "threshold": None if limit is None else float(limit),
                "is_anomalous": None if limit is None else bool(score > limit),
                "normalised_score": None if limit is None else normalise_score(float(score), float(limit)),
                "statistic": statistic,
                "masked": masked and not bool(item.detection.foreground.all()),
                "foreground_share": float(item.detection.foreground.mean()),
            }
        )
    return pa.Table.from_pylist(rows, schema=schema.SCORES)


class MatchSource(NamedTuple):
    """Where the rows that patches can match come from.

    Attributes:
        image_ids: names of reference images.
        sources: from (n,) row numbers to (n, 4): index of the image, index of the angle, grid row, grid column.
        angles: degrees.
    """

    image_ids: Sequence[str]
    sources: Callable[[NDArray[np.int64]], NDArray[np.int64]]
    angles: Sequence[float]


def bank_source(bank: MemoryBank) -> MatchSource:
    """Rows of a memory bank."""
    table = bank.sources.cpu().numpy().astype(np.int64)
    return MatchSource(bank.image_ids, lambda rows: table[rows], bank.angles)


def patch_scores_table(scored: Sequence[Scored], source: MatchSource) -> pa.Table:
    """A row for each patch: its distance and the reference patch it matched."""
    parts = [_patch_columns(item, source) for item in scored]
    return pa.concat_tables([schema.PATCH_SCORES.empty_table(), *parts]).combine_chunks()


def _patch_columns(item: Scored, source: MatchSource) -> pa.Table:
    detection = item.detection
    matched = detection.matched_rows.reshape(-1)
    masked = matched < 0
    found = np.zeros((len(matched), 4), np.int64)
    found[~masked] = source.sources(matched[~masked])
    used, position = np.unique(found[:, 0], return_inverse=True)  # not all ids of a large set for each image
    names = pa.array([source.image_ids[index] for index in used], pa.string())
    arrays = [
        pa.array([item.record.image_id] * len(matched), pa.string()),
        pa.array([item.record.category] * len(matched), pa.string()),
        *_positions(detection.geometry.grid),
        pa.array(detection.foreground.reshape(-1)),
        pa.array(detection.distances.reshape(-1)),
        _masked(names.take(pa.array(position)), masked),
        pa.array(found[:, 2].astype(np.int16), mask=masked),
        pa.array(found[:, 3].astype(np.int16), mask=masked),
        pa.array(np.asarray(source.angles, dtype=np.float32)[found[:, 1]], mask=masked),
    ]
    return pa.Table.from_arrays(arrays, schema=schema.PATCH_SCORES)


def _masked(values: pa.Array, mask: NDArray[np.bool_]) -> pa.Array:
    import pyarrow.compute as pc

    return pc.if_else(pa.array(~mask), values, pa.scalar(None, values.type))


def _positions(grid: tuple[int, int]) -> tuple[pa.Array, pa.Array]:
    rows, columns = np.indices(grid, dtype=np.int16)
    return pa.array(rows.reshape(-1)), pa.array(columns.reshape(-1))


def scored_embeddings(scored: Sequence[Scored], width: int, dtype: str) -> pa.Table:
    """Embeddings of scored images that kept their features."""
    items = [
        Extracted(item.record, item.detection.geometry, item.features, item.detection.foreground, None)
        for item in scored
        if item.features is not None
    ]
    return embeddings_table(items, width, dtype)


def refuse_overflow(features: NDArray[np.float32], dtype: str) -> None:
    """Features beyond the range of float16 would be stored as infinite.

    Args:
        features: (P, D) float32, finite.
        dtype: ``"float32"`` or ``"float16"``.

    Raises:
        ImageError: naming the largest one.
    """
    largest = float(np.abs(features).max())
    if dtype == "float16" and largest > float(np.finfo(np.float16).max):
        raise ImageError(f"patch features reach {largest:g}, beyond float16 (65504): set --embedding_dtype=float32.")


def embeddings_table(extracted: Sequence[Extracted], width: int, dtype: str) -> pa.Table:
    """A row for each patch with its (D,) embedding, not normalised, as the backbone gives it."""
    table_schema = schema.embeddings(width, dtype)
    parts = [table_schema.empty_table()]
    for item in extracted:
        count = len(item.features)
        values = pa.array(item.features.astype(np.float16 if dtype == "float16" else np.float32).reshape(-1))
        arrays = [
            pa.array([item.record.image_id] * count, pa.string()),
            pa.array([item.record.category] * count, pa.string()),
            *_positions(item.plan.grid),
            pa.array(item.foreground.reshape(-1)),
            pa.FixedSizeListArray.from_arrays(values, type=table_schema.field("embedding").type),
        ]
        parts.append(pa.Table.from_arrays(arrays, schema=table_schema))
    return pa.concat_tables(parts).combine_chunks()


def failures_table(failures: Sequence[Failure]) -> pa.Table:
    """A row for each image that could not be processed."""
    rows = [
        {
            "image_id": failure.record.image_id,
            "uri": failure.record.uri,
            "category": failure.record.category,
            "stage": failure.stage,
            "error_type": failure.error_type,
            "message": failure.message,
        }
        for failure in failures
    ]
    return pa.Table.from_pylist(rows, schema=schema.FAILURES)
