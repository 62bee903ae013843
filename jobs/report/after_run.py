"""``--report``: what a run found, in the terminal and as a page, as soon as it has ended."""

from __future__ import annotations

from rich.console import Console

from jobs.config import ReportConfig
from jobs.evaluate import evaluate, print_table
from jobs.report import command
from jobs.scored_run import ScoredRun


def show(out: str, console: Console) -> None:
    """Evaluate a finished run where images have labels, and write its report.

    Args:
        out: its folder, a path or URI.
        console: to print to.

    Raises:
        AnomalyDINOError: as ``anomalydino evaluate`` and ``anomalydino report``; the run itself is finished.
    """
    if _has_labels(out):
        print_table(evaluate(out, console), console)
    command.run(ReportConfig(out), console)


def _has_labels(out: str) -> bool:
    images = ScoredRun(out).images
    return any(image.label is not None for rows in images.values() for image in rows)
