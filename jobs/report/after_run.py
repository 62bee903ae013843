"""``--report``: what a run found, in the terminal and as a page, as soon as it has ended."""

from __future__ import annotations

from rich.console import Console

from jobs.config import ReportConfig
from jobs.evaluate import evaluate_run, print_table
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
    run = ScoredRun(out)
    if any(image.label is not None for images in run.images.values() for image in images):
        print_table(evaluate_run(run, console, None), console)
    command.run(ReportConfig(out), console)
