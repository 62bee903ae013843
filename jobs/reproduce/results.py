"""One row for each setting, seed and category: written as it is measured, and joined into Parquet and JSON.

OUT/rows/SETTING/C.json           a row; written last, so that what it says of is finished
OUT/results.parquet, .json        all rows
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import schema
from jobs.metric_rows import CategoryMetrics
from jobs.reproduce.protocol import Setting
from jobs.store import Store, folder_name

_OWN = ("dataset", "rotated", "masked", "references", "run", "pixel")  # of a row beside setting and metrics


class ResultRow(NamedTuple):
    """Metrics of one category under one setting.

    Attributes:
        dataset: ``mvtec``, ``visa`` or ``folder``.
        setting: with its seed.
        rotated: whether references were rotated.
        masked: whether test images were masked.
        references: ids of the reference images, joined by ``|``; empty for batched zero-shot.
        run: folder of the run below OUT; empty for baselines.
        pixel: whether pixels were to be measured.
        metrics: of the category.
    """

    dataset: str
    setting: Setting
    rotated: bool
    masked: bool
    references: str
    run: str
    pixel: bool
    metrics: CategoryMetrics

    def flat(self) -> dict[str, Any]:
        """As one row of a table."""
        own = {name: getattr(self, name) for name in _OWN}
        return {**own, **self.setting._asdict(), **self.metrics._asdict()}

    @classmethod
    def of(cls, row: dict[str, Any]) -> ResultRow:
        """Inverse of ``flat``."""
        setting = Setting(**{name: row[name] for name in Setting._fields})
        values = {name: row[name] for name in CategoryMetrics._fields} | {"mask_problems": tuple(row["mask_problems"])}
        own = {name: row[name] for name in _OWN}
        return cls(setting=setting, metrics=CategoryMetrics(**values), **own)


class Results:
    """The rows of an output folder.

    Args:
        out: path or URI.
    """

    def __init__(self, out: str) -> None:
        self.store = Store(out)

    def has(self, setting: Setting, category: str, pixel: bool) -> bool:
        """Whether a row is there, with pixel metrics where they are wanted."""
        name = _row_name(setting, category)
        return self.store.folder.has(name) and (not pixel or bool(self.store.read_json(name)["pixel"]))

    def put(self, row: ResultRow) -> None:
        """Write one row, whole or not at all."""
        self.store.write_json(_row_name(row.setting, row.metrics.category), row.flat())

    def rows(self) -> list[ResultRow]:
        """All rows, sorted."""
        names = self.store.folder.files("rows")
        return sorted((ResultRow.of(self.store.read_json(name)) for name in names), key=_order)

    def join(self) -> list[ResultRow]:
        """Write ``results.parquet`` and ``results.json``; returns the rows."""
        rows = self.rows()
        table = pa.Table.from_pylist([row.flat() for row in rows], schema=schema.REPRODUCTION)
        with self.store.folder.writing("results.parquet") as path:
            pq.write_table(table, path, compression="zstd")
        content = {"schema_version": schema.SCHEMA_VERSION, "rows": [row.flat() for row in rows]}
        self.store.write_json("results.json", content)
        return rows


def by_setting(rows: Sequence[ResultRow]) -> dict[Setting, list[list[CategoryMetrics]]]:
    """Metrics by setting without its seed: a list for each seed."""
    found: dict[Setting, dict[int | None, list[CategoryMetrics]]] = {}
    for row in rows:
        seeds = found.setdefault(row.setting._replace(seed=None), {})
        seeds.setdefault(row.setting.seed, []).append(row.metrics)
    return {setting: list(seeds.values()) for setting, seeds in found.items()}


def _order(row: ResultRow) -> tuple[Any, ...]:
    batched = row.setting.shots is None
    numbers = (row.setting.resolution, batched, row.setting.shots or 0, row.setting.k, row.setting.seed or 0)
    return (row.setting.method != "anomalydino", row.setting.method, *numbers, row.setting.name, row.metrics.category)


def _row_name(setting: Setting, category: str) -> str:
    return f"rows/{setting.name}/{folder_name(category)}.json"
