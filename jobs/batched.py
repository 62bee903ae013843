"""``anomalydino batched``: extract and match in one, into one output folder."""

from __future__ import annotations

from rich.console import Console

from jobs import cluster, extract, match
from jobs.config import BatchedConfig
from jobs.stage import RunSummary


def run(config: BatchedConfig, console: Console | None = None) -> RunSummary:
    """Score the images of a folder against each other.

    Raises:
        AnomalyDINOError: as ``extract`` and ``match``.
    """
    console = console or Console()
    with cluster.connect(config.ray_address):
        extract.run(config.extract, console)
        return match.run(config.match, console)
