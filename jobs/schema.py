"""Every Parquet schema, version 1; the only file that names columns. ``docs/parquet_schema.md`` explains them."""

from __future__ import annotations

import pyarrow as pa

SCHEMA_VERSION = "1"
_METADATA = {"anomalydino_schema_version": SCHEMA_VERSION}

IMAGES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("label", pa.string()),  # "good", the kind of defect, or null
        pa.field("mask_uri", pa.string()),
        pa.field("width", pa.int32()),  # pixels; null where decoding failed
        pa.field("height", pa.int32()),
        pa.field("grid_rows", pa.int32()),
        pa.field("grid_cols", pa.int32()),
        pa.field("status", pa.string(), nullable=False),  # scored, extracted, failed, reference
        pa.field("masking_test", pa.bool_()),  # whether it passes on this image; null where it was not run
    ],
    metadata=_METADATA,
)

SCORES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("mode", pa.string(), nullable=False),  # few-shot, official, musc
        pa.field("score", pa.float32(), nullable=False),  # raw image score
        pa.field("threshold", pa.float32()),  # on the raw score; null if it could not be set
        pa.field("is_anomalous", pa.bool_()),  # score > threshold
        pa.field("normalised_score", pa.float32()),  # score / (score + threshold)
        pa.field("statistic", pa.string(), nullable=False),
        pa.field("masked", pa.bool_(), nullable=False),  # a mask hid patches; false where it would have hidden all
        pa.field("foreground_share", pa.float32(), nullable=False),
    ],
    metadata=_METADATA,
)

PATCH_SCORES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("patch_row", pa.int16(), nullable=False),
        pa.field("patch_col", pa.int16(), nullable=False),
        pa.field("foreground", pa.bool_(), nullable=False),
        pa.field("distance", pa.float32(), nullable=False),  # 0 where masked
        pa.field("match_image_id", pa.string()),  # null where masked
        pa.field("match_row", pa.int16()),
        pa.field("match_col", pa.int16()),
        pa.field("match_rotation", pa.float32()),  # degrees; 0 in batched zero-shot
    ],
    metadata=_METADATA,
)

FAILURES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),  # decode, encode, score
        pa.field("error_type", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
    ],
    metadata=_METADATA,
)

METRICS = pa.schema(
    [
        pa.field("category", pa.string(), nullable=False),
        *(pa.field(name, pa.int64(), nullable=False) for name in ("images", "failed", "labelled", "defects")),
        pa.field("auroc", pa.float64()),  # of images; metrics are null where labels, masks or a threshold are missing
        pa.field("average_precision", pa.float64()),
        pa.field("f1_max", pa.float64()),
        pa.field("f1_threshold", pa.float64()),
        pa.field("threshold", pa.float64()),  # the run's own
        *(pa.field(f"false_alarms{end}", pa.float64()) for end in ("", "_low", "_high")),
        *(pa.field(f"misses{end}", pa.float64()) for end in ("", "_low", "_high")),
        *(pa.field(name, pa.int64(), nullable=False) for name in ("pixel_images", "pixel_regions")),
        pa.field("pixel_auroc", pa.float64()),
        pa.field("pixel_average_precision", pa.float64()),
        pa.field("pixel_f1_max", pa.float64()),
        pa.field("pixel_f1_threshold", pa.float64()),
        pa.field("pro_30", pa.float64()),
        pa.field("pro_05", pa.float64()),
        pa.field("pixel_dropped_bits", pa.int64(), nullable=False),
        pa.field("mask_problems", pa.list_(pa.string()), nullable=False),
    ],
    metadata=_METADATA,
)

REPRODUCTION = pa.schema(
    [
        *(pa.field(name, pa.string(), nullable=False) for name in ("dataset", "method")),
        pa.field("shots", pa.int64()),  # null: batched zero-shot
        pa.field("seed", pa.int64()),  # likewise
        pa.field("resolution", pa.int64(), nullable=False),
        *(pa.field(name, pa.string(), nullable=False) for name in ("preprocess", "rotations", "masking", "statistic")),
        pa.field("k", pa.int64(), nullable=False),
        pa.field("backbone", pa.string(), nullable=False),
        *(pa.field(name, pa.bool_(), nullable=False) for name in ("rotated", "masked", "pixel")),
        *(pa.field(name, pa.string(), nullable=False) for name in ("references", "run")),
        *METRICS,
    ],
    metadata=_METADATA,
)

METRICS_OVER_RUNS = pa.schema(
    [
        pa.field("category", pa.string()),  # null: the mean over categories
        pa.field("metric", pa.string(), nullable=False),
        pa.field("runs", pa.int64(), nullable=False),
        pa.field("mean", pa.float64(), nullable=False),
        pa.field("standard_deviation", pa.float64()),  # of the sample; null for one run
    ],
    metadata=_METADATA,
)


def embeddings(width: int, dtype: str) -> pa.Schema:
    """Schema of patch embeddings.

    Args:
        width: D, features.
        dtype: ``"float32"`` or ``"float16"``.
    """
    value = pa.float32() if dtype == "float32" else pa.float16()
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("category", pa.string(), nullable=False),
            pa.field("patch_row", pa.int16(), nullable=False),
            pa.field("patch_col", pa.int16(), nullable=False),
            pa.field("foreground", pa.bool_(), nullable=False),
            pa.field("embedding", pa.list_(pa.field("element", value, nullable=False), width), nullable=False),
        ],
        metadata=_METADATA,
    )
