"""Tables of metrics for people, in per cent."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs.metric_rows import (
    IMAGE_METRICS,
    PIXEL_METRICS,
    RATES,
    CategoryMetrics,
    Spread,
    mean_over_categories,
)

_HEADINGS = {
    "auroc": "AUROC",
    "average_precision": "AP",
    "f1_max": "F1max",
    "pixel_auroc": "AUROC",
    "pixel_average_precision": "AP",
    "pixel_f1_max": "F1max",
    "pro_30": "PRO 0.3",
    "pro_05": "PRO 0.05",
    "false_alarms": "false alarms",
    "misses": "missed",
}
_MEAN = "mean"


def print_table(rows: Sequence[CategoryMetrics], console: Console) -> None:
    """Print the metrics of a run: of images, at its threshold, and of pixels where there are masks."""
    _print(
        console,
        "image metrics, per cent",
        ("images", "defects"),
        IMAGE_METRICS,
        [_image_row(row) for row in rows],
        rows,
    )
    if any(row.threshold is not None for row in rows):
        title = "at the run's threshold, per cent with 95 % interval"
        _print(console, title, ("threshold",), RATES, [_rate_row(row) for row in rows], rows)
    if any(row.pixel_images for row in rows):
        _print(
            console,
            "pixel metrics, per cent",
            ("images", "regions"),
            PIXEL_METRICS,
            [_pixel_row(row) for row in rows],
            rows,
        )
    for problem in (problem for row in rows for problem in row.mask_problems):
        console.print(f"left out of the pixel metrics: {problem}", markup=False, soft_wrap=True)


def print_spread(spreads: Sequence[Spread], runs: int, console: Console) -> None:
    """Print mean and standard deviation over runs."""
    categories = list(dict.fromkeys(spread.category for spread in spreads))
    found = {(spread.category, spread.metric): spread for spread in spreads}
    for kind, names in (("image", IMAGE_METRICS), ("verdicts", RATES), ("pixel", PIXEL_METRICS)):
        if any(name in names for _, name in found):
            table = _table(f"{kind}, {runs} runs: mean ± standard deviation, per cent", names)
            for category in categories:
                if category is None:
                    table.add_section()
                own = [found.get((category, name)) for name in names]
                held = max((spread.runs for spread in own if spread), default=0)
                label = _MEAN if category is None else escape(category)
                table.add_row(label if held == runs else f"{label} ({held} of {runs})", *map(_spread, own))
            console.print(table, markup=False)


def _print(
    console: Console,
    title: str,
    counted: Sequence[str],
    names: Sequence[str],
    cells: Sequence[Sequence[str]],
    rows: Sequence[CategoryMetrics],
) -> None:
    table = _table(title, (*counted, *names))
    for row in cells:
        table.add_row(*row)
    if len(rows) > 1:
        means = mean_over_categories(rows)
        table.add_section()
        table.add_row(_MEAN, *("" for _ in counted), *(_percent(means[name]) for name in names))
    console.print(table)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title)
    table.add_column("category")
    for name in columns:
        table.add_column(_HEADINGS.get(name, name), justify="right")
    return table


def _image_row(row: CategoryMetrics) -> list[str]:
    return [
        escape(row.category),
        _share(row.labelled, row.images + row.failed),
        str(row.defects),
        *(_percent(getattr(row, name)) for name in IMAGE_METRICS),
    ]


def _pixel_row(row: CategoryMetrics) -> list[str]:
    return [
        escape(row.category),
        _share(row.pixel_images, row.images + row.failed),
        str(row.pixel_regions),
        *(_percent(getattr(row, name)) for name in PIXEL_METRICS),
    ]


def _rate_row(row: CategoryMetrics) -> list[str]:
    threshold = "-" if row.threshold is None else f"{row.threshold:.4f}"
    return [escape(row.category), threshold, *(_rate(row, name) for name in RATES)]


def _rate(row: CategoryMetrics, name: str) -> str:
    share, low, high = (getattr(row, f"{name}{end}") for end in ("", "_low", "_high"))
    return "-" if share is None else f"{100 * share:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _share(count: int, total: int) -> str:
    return str(count) if count == total else f"{count} of {total}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    deviation = "" if spread.standard_deviation is None else f"±{100 * spread.standard_deviation:.2f}"
    return f"{100 * spread.mean:.2f}{deviation}"
