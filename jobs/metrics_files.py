"""Metrics as Parquet and JSON, whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import schema
from jobs.filesystem import Folder
from jobs.metric_rows import CategoryMetrics, Spread, mean_over_categories
from jobs.resources import expect_memory
from jobs.store import Store

METRICS_FILE = "metrics"
SPREAD_FILE = "metrics_over_runs"


def write_metrics(folder: Folder, rows: Sequence[CategoryMetrics]) -> None:
    """Write ``metrics.parquet``, a row for each category, and ``metrics.json``, with the mean over categories."""
    table = pa.Table.from_pylist([row._asdict() for row in rows], schema=schema.METRICS)
    content = {
        "categories": {row.category: row._asdict() for row in rows},
        "mean_over_categories": mean_over_categories(rows),
    }
    _write(folder, METRICS_FILE, table, content)


def write_spread(folder: Folder, runs: Sequence[str], spreads: Sequence[Spread]) -> None:
    """Write ``metrics_over_runs.parquet`` and ``.json``: a row for each category and metric.

    Args:
        folder: where.
        runs: output folders that were read.
        spreads: of the metrics.
    """
    table = pa.Table.from_pylist([spread._asdict() for spread in spreads], schema=schema.METRICS_OVER_RUNS)
    _write(folder, SPREAD_FILE, table, {"runs": list(runs), "spreads": [spread._asdict() for spread in spreads]})


def _write(folder: Folder, name: str, table: pa.Table, content: dict[str, Any]) -> None:
    expect_memory()
    content_of_table = pa.BufferOutputStream()  # small; a process that ends in here leaves no half file behind
    pq.write_table(table, content_of_table, compression="zstd")
    folder.write(f"{name}.parquet", content_of_table.getvalue().to_pybytes())
    Store(folder.location).write_json(f"{name}.json", {"schema_version": schema.SCHEMA_VERSION, **content})
