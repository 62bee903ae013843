"""Tables of a reproduction, in per cent: beside the paper, and by category; for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table

from jobs.metric_rows import Spread, spread_over_runs
from jobs.reproduce.paper import PaperFigure, figures_of
from jobs.reproduce.results import ResultRow, by_setting

IMAGE = ("auroc", "f1_max", "average_precision")
PIXEL = ("pixel_auroc", "pixel_f1_max", "pro_30")
_HEADINGS = {
    "auroc": "AUROC",
    "f1_max": "F1-max",
    "average_precision": "AP",
    "pixel_auroc": "pixel AUROC",
    "pixel_f1_max": "pixel F1-max",
    "pro_30": "PRO",
}
PAPER_CATEGORIES = {"mvtec": 15, "visa": 12}


class Sheet(NamedTuple):
    """A table.

    Attributes:
        title: above it.
        headings: of its columns.
        rows: cells.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def rich(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title, title_justify="left")
        for number, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table

    def markdown(self) -> str:
        """As Markdown."""
        lines = [self.headings, tuple("---" for _ in self.headings), *self.rows]
        body = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
        return f"### {self.title}\n\n{body}\n"


def sheets_of(rows: Sequence[ResultRow]) -> list[Sheet]:
    """All tables: of images and of pixels beside the paper, then by category."""
    found = []
    for names, what in ((IMAGE, "images"), (PIXEL, "pixels")):
        if any(getattr(row.metrics, name) is not None for row in rows for name in names):
            found.append(beside_paper(rows, names, f"{what}, per cent: ours, the paper's, difference"))
    return [*found, by_category(rows)]


def beside_paper(rows: Sequence[ResultRow], names: Sequence[str], title: str) -> Sheet:
    """A row for each setting: mean over the categories present and deviation over seeds, beside the paper's figure.

    Where not all seeds have a metric, the cell says how many.
    """
    dataset = rows[0].dataset if rows else "folder"
    headings = ["setting", "categories", "seeds"]
    headings += [f"{_HEADINGS[name]}{end}" for name in names for end in ("", " paper", " diff.")]
    lines = []
    for setting, seeds in by_setting(rows).items():
        paper = figures_of(dataset, setting)
        found = {spread.metric: spread for spread in spread_over_runs(seeds) if spread.category is None}
        shared = set.intersection(*({metrics.category for metrics in runs} for runs in seeds))
        cells = [setting.label, str(len(shared)), str(len(seeds))]
        for name in names:
            cells += _compared(found.get(name), paper.get(name), len(seeds))
        lines.append(tuple(cells))
    return Sheet(title, tuple(headings), tuple(lines))


def by_category(rows: Sequence[ResultRow]) -> Sheet:
    """A row for each category and setting: mean and deviation over seeds."""
    headings = ("category", "setting", "seeds", "masked", *(_HEADINGS[name] for name in (*IMAGE, *PIXEL)))
    masked = {(row.metrics.category, row.setting._replace(seed=None)): row.masked for row in rows}
    lines = []
    for setting, seeds in by_setting(rows).items():
        spreads = {(spread.category, spread.metric): spread for spread in spread_over_runs(seeds)}
        for category in sorted({metrics.category for runs in seeds for metrics in runs}):
            held = sum(any(metrics.category == category for metrics in runs) for runs in seeds)
            cells = [category, setting.label, str(held), "yes" if masked[category, setting] else "no"]
            lines.append((*cells, *(_shown(spreads.get((category, name)), held) for name in (*IMAGE, *PIXEL))))
    return Sheet("by category, per cent", headings, tuple(sorted(lines, key=lambda line: line[0])))


def notes(rows: Sequence[ResultRow]) -> list[str]:
    """What a reader must know before comparing."""
    if not rows:
        return []
    dataset = rows[0].dataset
    present = sorted({row.metrics.category for row in rows})
    lines = [f"Ours: mean over the {len(present)} categories present ({', '.join(present)}), ± is over seeds."]
    if dataset in PAPER_CATEGORIES:
        lines.append(
            f"The paper's figures are means over all {PAPER_CATEGORIES[dataset]} categories of {dataset}: where fewer "
            "are present, a difference says how these categories differ from the mean of all, not how our code differs "
            "from the paper's. The paper has no figures by category here."
        )
    return lines


def _compared(ours: Spread | None, paper: PaperFigure | None, seeds: int) -> list[str]:
    difference = "-" if ours is None or paper is None else f"{100 * ours.mean - paper.value:+.2f}"
    if paper is None:
        return [_shown(ours, seeds), "-", difference]
    deviation = "" if paper.standard_deviation is None else f" ±{paper.standard_deviation:.1f}"
    return [_shown(ours, seeds), f"{paper.value:.1f}{deviation}", difference]


def _shown(spread: Spread | None, seeds: int) -> str:
    if spread is None:
        return "-"
    deviation = "" if spread.standard_deviation is None else f" ±{100 * spread.standard_deviation:.2f}"
    return f"{100 * spread.mean:.2f}{deviation}" + (f" ({spread.runs} of {seeds})" if spread.runs < seeds else "")
