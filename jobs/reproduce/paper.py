"""The paper's figures, from ``jobs/data/paper_figures.json``, which says where they come from and what is missing."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any, NamedTuple

from jobs.reproduce.protocol import Setting


class PaperFigure(NamedTuple):
    """One figure, in per cent.

    Attributes:
        value: mean over all categories, and seeds.
        standard_deviation: over seeds; ``None`` where the source has none.
    """

    value: float
    standard_deviation: float | None


@functools.cache
def content() -> dict[str, Any]:
    """The file."""
    found: dict[str, Any] = json.loads(resources.files("jobs").joinpath("data/paper_figures.json").read_text("utf-8"))
    return found


def figures_of(dataset: str, setting: Setting) -> dict[str, PaperFigure]:
    """The paper's figures for a setting, by metric; none where it has none.

    Args:
        dataset: ``mvtec`` or ``visa``.
        setting: its seed does not matter.
    """
    if not setting.of_the_paper:
        return {}
    wanted = (dataset, setting.shots, setting.resolution)
    for row in content()["figures"]:
        if (row["dataset"], row["shots"], row["resolution"]) == wanted:
            return {
                name: PaperFigure(cell["value"], cell.get("standard_deviation"))
                for name, cell in row["metrics"].items()
            }
    return {}
