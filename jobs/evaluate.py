"""``anomalydino evaluate OUT``: metrics of finished runs, from their Parquet files and the masks these name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from anomalydino_plugin import ConfigError, error_rate
from anomalydino_plugin import image_metrics as metrics_of_scores
from jobs.filesystem import Folder
from jobs.inputs import GOOD
from jobs.metric_rows import CategoryMetrics, spread_over_runs
from jobs.metrics_files import write_metrics, write_spread
from jobs.metrics_table import print_spread, print_table
from jobs.pixel_evaluation import evaluate_pixels, passes
from jobs.progress import ImageProgress
from jobs.scored_run import ScoredRun

__all__ = ["evaluate", "image_metrics", "main", "print_table"]

# Settings that may differ between runs that are averaged: places, layout, and what is averaged over.
_MAY_DIFFER = frozenset(
    {"out", "seed", "weights", "num_workers", "gpus_per_worker", "ray_address", "threads", "shard_size", "batch_size"}
) | {"max_failures", "index_source", "embeddings", "banks", "category", "write_embeddings", "embedding_dtype", "report"}


def image_metrics(
    category: str, scores: NDArray[np.float64], labels: list[str | None], threshold: float | None, failed: int = 0
) -> CategoryMetrics:
    """Image metrics of one category.

    Args:
        category: for the row.
        scores: (N,) raw scores.
        labels: ``"good"``, a kind of defect, or ``None``.
        threshold: the run's own, on raw scores.
        failed: images without a score.
    """
    known = np.array([label is not None for label in labels], dtype=bool)
    defect = np.array([label not in {None, GOOD} for label in labels], dtype=bool)[known]
    values = scores[known]
    row = CategoryMetrics(
        category,
        len(scores),
        failed,
        int(known.sum()),
        int(defect.sum()),
        *metrics_of_scores(values, defect),
        threshold,
    )
    return row if threshold is None else row._replace(**_rates(values > threshold, defect))


def _rates(alarms: NDArray[np.bool_], defect: NDArray[np.bool_]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, wrong in (("false_alarms", alarms[~defect]), ("misses", ~alarms[defect])):
        if (rate := error_rate(wrong)) is not None:
            found |= {name: rate.share, f"{name}_low": rate.low, f"{name}_high": rate.high}
    return found


def evaluate(out: str, console: Console | None = None, *, pixel: bool | None = None) -> list[CategoryMetrics]:
    """Metrics of every category of a run; also written to ``OUT/metrics.parquet`` and ``OUT/metrics.json``.

    Args:
        out: output folder of a run, path or URI.
        console: for progress.
        pixel: whether to measure pixels; where there are masks if not given.

    Raises:
        InputError: ``out`` is no output folder of a run.
        ConfigError: pixels are asked for and there is no mask.
    """
    return evaluate_run(ScoredRun(out), console or Console(quiet=True), pixel)


def evaluate_run(run: ScoredRun, console: Console, pixel: bool | None) -> list[CategoryMetrics]:
    """The same of a run that is read already."""
    rows = [_image_row(run, category) for category in run.images]
    maps = 0 if pixel is False else sum(passes(images) for images in run.images.values())
    if pixel and not maps:
        raise ConfigError(
            f"--pixel: no image under {run.store.location!r} has a mask. Expected ground_truth/LABEL folders, or "
            "mask_uri in the manifest, when the run was made."
        )
    if maps:
        with ImageProgress(console, "pixel metrics (maps, two passes)", maps) as progress:
            rows = [_with_pixels(row, run, progress) for row in rows]
    write_metrics(run.store.folder, rows)
    return rows


def _image_row(run: ScoredRun, category: str) -> CategoryMetrics:
    images = run.images[category]
    scores = np.array([image.score for image in images], dtype=np.float64)
    labels = [image.label for image in images]
    return image_metrics(category, scores, labels, images[0].threshold, run.failed[category])


def _with_pixels(row: CategoryMetrics, run: ScoredRun, progress: ImageProgress) -> CategoryMetrics:
    if not passes(run.images[row.category]):
        return row
    images, metrics, problems = evaluate_pixels(run, row.category, progress)
    if metrics is None:
        return row._replace(mask_problems=problems)
    return row._replace(
        pixel_images=images,
        pixel_regions=metrics.regions,
        pixel_auroc=metrics.auroc,
        pixel_average_precision=metrics.average_precision,
        pixel_f1_max=metrics.f1_max,
        pixel_f1_threshold=metrics.f1_threshold,
        pro_30=metrics.pro_30,
        pro_05=metrics.pro_05,
        pixel_dropped_bits=metrics.dropped_bits,
        mask_problems=problems,
    )


def main(options: Any, console: Console) -> int:
    """``anomalydino evaluate OUT [OUT ...]``.

    Raises:
        ConfigError: the same folder twice, or a summary of one run.
    """
    outs = [options.out] if isinstance(options.out, str) else list(options.out)
    summary = getattr(options, "summary", None)
    runs = [ScoredRun(out) for out in outs]
    _check_outs([run.store.location for run in runs], summary)
    measured = []
    for run in runs:
        if len(runs) > 1:
            console.print(run.store.location, style="bold", markup=False, soft_wrap=True)
        measured.append(evaluate_run(run, console, options.pixel))
        print_table(measured[-1], console)
    if len(runs) > 1:
        _summarise(runs, measured, summary, console)
    return 0


def _check_outs(locations: Sequence[str], summary: str | None) -> None:
    if len(set(locations)) < len(locations):
        raise ConfigError(f"evaluate of {list(locations)}: expected different folders, one for each seed.")
    if summary is not None and len(locations) == 1:
        raise ConfigError(f"--summary {summary!r} of one run: expected the folders of several. Give them all.")


def _summarise(
    runs: Sequence[ScoredRun], measured: Sequence[Sequence[CategoryMetrics]], summary: str | None, console: Console
) -> None:
    spreads = spread_over_runs(measured)
    print_spread(spreads, len(runs), console)
    for note in _differences(runs):
        console.print(note, markup=False, soft_wrap=True)
    if summary is not None:
        write_spread(Folder(summary), [run.store.location for run in runs], spreads)


def _differences(runs: Sequence[ScoredRun]) -> list[str]:
    """What, besides seeds, the runs do not share."""
    notes = []
    if len({str(sorted(run.images)) for run in runs}) > 1:
        notes.append("the runs do not hold the same categories: the mean is over those that all of them hold")
    for name in sorted({name for run in runs for name in run.settings} - _MAY_DIFFER):
        values = [run.settings.get(name) for run in runs]
        if any(value != values[0] for value in values):
            notes.append(f"the runs differ in {name} ({', '.join(map(str, values))}): the spread is not of seeds alone")
    return notes
