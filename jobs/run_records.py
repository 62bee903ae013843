"""A finished run, read back: scores joined to images, failures, references; and which images to show of many."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anomalydino_plugin import InputError
from jobs.inputs import GOOD
from jobs.run_geometry import read_stages
from jobs.store import Store

Row = dict[str, Any]
MISSED, FALSE_ALARM = "missed", "false alarm"


@dataclass(frozen=True)
class Run:
    """What was read.

    Attributes:
        store: the run's folder.
        stages: what ``job.json`` says.
        scores: by category, highest score first; each row has label, mask, sizes and grid of its image, too.
        references: rows of ``images`` that a match can point to, by id.
        failures: rows of ``failures``.
    """

    store: Store
    stages: Mapping[str, Any]
    scores: Mapping[str, Sequence[Row]]
    references: Mapping[str, Row]
    failures: Sequence[Row]

    @property
    def images(self) -> int:
        """Scored images."""
        return sum(map(len, self.scores.values()))


def read_run(out: str, categories: Sequence[str] | None = None) -> Run:
    """Read scores, images and failures of a run.

    Args:
        out: its folder.
        categories: only these.

    Raises:
        InputError: no finished run there, or no such category.
    """
    store = Store(out)
    images = store.read("images").to_pylist()
    processed = {row["image_id"]: row for row in images if row["status"] != "reference"}
    scores = store.read("scores").to_pylist()
    failures = _failures(store, processed)
    _check_categories(categories, {row["category"] for row in [*scores, *failures]}, store.location)
    by_category: dict[str, list[Row]] = defaultdict(list)
    for row in scores:
        if categories is None or row["category"] in categories:
            by_category[row["category"]].append(_joined(row, processed.get(row["image_id"], {})))
    ranked = {
        category: sorted(rows, key=lambda row: (-row["score"], row["image_id"]))
        for category, rows in sorted(by_category.items())
    }
    kept = [row for row in failures if categories is None or row["category"] in categories]
    return Run(store, read_stages(store), ranked, _references(store, images), kept)


def _check_categories(wanted: Sequence[str] | None, present: set[str], location: str) -> None:
    if missing := sorted(set(wanted or ()) - present):
        raise InputError(f"no category {missing[0]!r} under {location!r}: found {sorted(present)}.")


def _failures(store: Store, images: Mapping[str, Row]) -> list[Row]:
    if not any(record.kind == "failures" for record in store.files()):
        return []
    rows = store.read("failures").to_pylist()
    return [{**row, "label": images.get(row["image_id"], {}).get("label")} for row in rows]


def _joined(score: Row, image: Row) -> Row:
    names = ("label", "mask_uri", "width", "height", "grid_rows", "grid_cols")
    return {**score, **{name: image.get(name) for name in names}}


def _references(store: Store, images: Iterable[Row]) -> dict[str, Row]:
    """Also those of banks that were built in another folder, while that is there."""
    banks = read_stages(store).get("score", {}).get("config", {}).get("banks")
    elsewhere: list[Row] = []
    if banks:
        try:
            elsewhere = Store(banks).read("images").to_pylist()
        except InputError:
            elsewhere = []  # the report says on each card that the reference is not there
    rows = sorted([*elsewhere, *images], key=lambda row: row["status"] == "reference")
    return {row["image_id"]: row for row in rows}


def judgement(row: Mapping[str, Any]) -> str | None:
    """``"right"``, ``"missed"`` or ``"false alarm"``; ``None`` without a label or a verdict."""
    if row["label"] is None or row["is_anomalous"] is None:
        return None
    defect = row["label"] != GOOD
    if defect == row["is_anomalous"]:
        return "right"
    return MISSED if defect else FALSE_ALARM


def choose(scores: Mapping[str, Sequence[Row]], most: int) -> list[Row]:
    """Images that get a card where there are more than the report should hold.

    Categories share the places; in each, half at most go to wrongly judged images, half of the rest to the highest
    scores, and what is left to images spread evenly over the other scores.

    Args:
        scores: by category, highest score first.
        most: places.
    """
    chosen: list[Row] = []
    waiting = sorted(scores, key=lambda category: len(scores[category]))
    for number, category in enumerate(waiting):
        chosen += _choose(scores[category], (most - len(chosen)) // (len(waiting) - number))
    return chosen


def _choose(rows: Sequence[Row], most: int) -> list[Row]:
    if len(rows) <= most:
        return list(rows)
    wrong = [index for index, row in enumerate(rows) if judgement(row) in {MISSED, FALSE_ALARM}]
    taken = set(_spread(wrong, most // 2))
    rest = [index for index in range(len(rows)) if index not in taken]
    top = math.ceil((most - len(taken)) / 2)
    taken |= {*rest[:top], *_spread(rest[top:], most - len(taken) - top)}
    return [rows[index] for index in sorted(taken)]


def _spread(indices: Sequence[int], count: int) -> list[int]:
    if len(indices) <= count:
        return list(indices)
    return [indices[int(place)] for place in np.linspace(0, len(indices) - 1, count).round()]


def short_name(uri: str) -> str:
    """File and folder of an image: every label has a ``000.png``."""
    return "/".join(uri.rstrip("/").split("/")[-2:])
