"""Image metrics of a finished run: one row for each category, from the Parquet files alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from jobs.inputs import GOOD
from jobs.store import Store


class CategoryMetrics(NamedTuple):
    """Metrics of one category; ``None`` where the labels do not allow them.

    Attributes:
        category: which.
        images: scored images.
        labelled: those with a label.
        defects: labelled images that are not good.
        auroc: area under the ROC curve.
        average_precision: area under the precision-recall curve.
        f1_max: largest F1 over all thresholds.
        f1_threshold: raw score at which it is reached.
        false_alarms: share of good images above the run's own threshold.
        misses: share of defects at or below it.
    """

    category: str
    images: int
    labelled: int
    defects: int
    auroc: float | None
    average_precision: float | None
    f1_max: float | None
    f1_threshold: float | None
    false_alarms: float | None
    misses: float | None


def image_metrics(
    category: str, scores: NDArray[np.float64], labels: list[str | None], threshold: float | None
) -> CategoryMetrics:
    """Metrics of one category.

    Args:
        category: for the row.
        scores: (N,) raw scores.
        labels: ``"good"``, a kind of defect, or ``None``.
        threshold: the run's own, on raw scores.
    """
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

    known = np.array([label is not None for label in labels], dtype=bool)
    defect = np.array([label not in {None, GOOD} for label in labels], dtype=bool)[known]
    values = scores[known]
    auroc = precision = f1 = best = None
    if defect.any() and not defect.all():
        auroc, precision = float(roc_auc_score(defect, values)), float(average_precision_score(defect, values))
        p, r, limits = precision_recall_curve(defect, values)
        f1_curve = 2 * p[:-1] * r[:-1] / np.maximum(p[:-1] + r[:-1], np.finfo(float).tiny)
        f1, best = float(f1_curve.max()), float(limits[f1_curve.argmax()])
    false_alarms = misses = None
    if threshold is not None:
        false_alarms = float((values[~defect] > threshold).mean()) if (~defect).any() else None
        misses = float((values[defect] <= threshold).mean()) if defect.any() else None
    return CategoryMetrics(
        category, len(scores), int(known.sum()), int(defect.sum()), auroc, precision, f1, best, false_alarms, misses
    )


def evaluate(out: str) -> list[CategoryMetrics]:
    """Metrics of every category of a run; also written to ``OUT/metrics.json``.

    Raises:
        InputError: ``out`` is no output folder of a run.
    """
    store = Store(out)
    scores = store.read("scores", ["image_id", "category", "score", "threshold"]).to_pylist()
    labels = {
        row["image_id"]: row["label"]
        for row in store.read("images", ["image_id", "label", "status"]).to_pylist()
        if row["status"] != "reference"
    }
    metrics = []
    for category in sorted({row["category"] for row in scores}):
        own = [row for row in scores if row["category"] == category]
        values = np.array([row["score"] for row in own], dtype=np.float64)
        metrics.append(
            image_metrics(category, values, [labels.get(row["image_id"]) for row in own], own[0]["threshold"])
        )
    store.write_json("metrics.json", {row.category: row._asdict() for row in metrics})
    return metrics


def main(options: Any, console: Console) -> int:
    """``anomalydino evaluate OUT``."""
    print_table(evaluate(options.out), console)
    return 0


def print_table(metrics: list[CategoryMetrics], console: Console) -> None:
    """Print the metrics, with the mean over categories where there are several."""
    table = Table(title="image metrics, per cent")
    table.add_column("category")
    for heading in ("images", "defects", "AUROC", "AP", "F1max", "false+", "missed"):
        table.add_column(heading, justify="right")
    for row in metrics:
        images = str(row.images) if row.labelled == row.images else f"{row.labelled} of {row.images}"
        table.add_row(row.category, images, str(row.defects), *_percent(row))
    if len(metrics) > 1:
        table.add_section()
        table.add_row("mean", "", "", *(_format(mean_of(metrics, name)) for name in _SHOWN))
    console.print(table)


_SHOWN = ("auroc", "average_precision", "f1_max", "false_alarms", "misses")


def _percent(row: CategoryMetrics) -> list[str]:
    return [_format(getattr(row, name)) for name in _SHOWN]


def mean_of(metrics: list[CategoryMetrics], name: str) -> float | None:
    """Mean of one metric over the categories that have it."""
    values = [getattr(row, name) for row in metrics if getattr(row, name) is not None]
    return float(np.mean(values)) if values else None


def _format(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
