"""``anomalydino reproduce``: features once, runs for each setting, a row for each category, tables.

What is finished is found on disk: a command that was killed goes on when it is repeated, and another command on the
same folder shares its features and runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich.console import Console

from anomalydino_plugin import InputError
from jobs import cluster, encoder
from jobs.config import ExtractConfig
from jobs.inputs import ImageRecord, discover
from jobs.reproduce.features import FeatureKind, encode_references, extract_tests
from jobs.reproduce.protocol import Setting, settings_of
from jobs.reproduce.results import ResultRow, Results
from jobs.reproduce.runs import FewShotRun, RunOrder, batched_run, chosen_references, rows_of, run_orders
from jobs.reproduce.settings import ReproduceConfig
from jobs.reproduce.tables import notes, sheets_of
from jobs.store import Store
from jobs.task_pool import run_tasks

STAGE = "reproduce"
_WIDTH = 200


def run(config: ReproduceConfig, console: Console | None = None) -> None:
    """Measure all settings of a configuration that are not measured yet, and print the tables.

    Raises:
        AnomalyDINOError: no categories or images, settings that cannot run, or an output folder of another dataset.
    """
    console = console or Console()
    cluster.check_jobs_package()
    inputs = discover(config.root, categories=config.category or None, normal=config.few_shot or bool(config.baselines))
    if not inputs.categories:
        raise InputError(f"no test images under {config.root!r}: expected CATEGORY/test folders, or VisA's split file.")
    store = Store(config.out, STAGE)
    dataset = hashlib.sha256(json.dumps([config.dataset, config.root]).encode()).hexdigest()
    store.claim(dataset, (), config.effective())
    with store.exclusive():
        work = _Work(config, console, Results(config.out), inputs.references)
        skipped = _measure(work, settings_of(config), inputs.categories)
        if config.baselines:
            from jobs.reproduce.baselines import measure_baselines

            skipped += measure_baselines(config, inputs, work.results, console)
        _report(work.results.join(), skipped, store, console)


class _Work(NamedTuple):
    config: ReproduceConfig
    console: Console
    results: Results
    references: dict[str, tuple[ImageRecord, ...]]


def _measure(work: _Work, settings: Sequence[Setting], categories: Sequence[str]) -> list[str]:
    """Measure what has no row yet; returns a line for each setting that cannot be."""
    config, skipped = work.config, list[str]()
    kinds = list(dict.fromkeys(FeatureKind(setting.backbone, setting.resolution) for setting in settings))
    with cluster.connect(config.ray_address):
        layout = cluster.cluster_resources(config.num_workers, config.gpus_per_worker, config.threads)
        for kind in kinds:
            own = [setting for setting in settings if (setting.backbone, setting.resolution) == kind]
            todo, lines = _orders(work, own, categories)
            skipped += lines
            if not todo:
                continue
            failed = {
                category: extract_tests(config, kind, category, work.console).failed
                for category in dict.fromkeys(order.category for order in todo)
            }
            todo = [order._replace(failed=failed[order.category]) for order in todo]
            few = _with_banks(work, kind, [order for order in todo if order.references], layout)
            work.console.print(f"{len(todo)} runs to make and measure", markup=False)
            for order, measured in run_tasks(FewShotRun, (config,), few, layout):
                _keep(work, rows_of(config, order, measured))
            for order in todo:
                if not order.references:
                    _keep(work, rows_of(config, order, batched_run(config, order, work.console)))
    return skipped


def _orders(work: _Work, settings: Sequence[Setting], categories: Sequence[str]) -> tuple[list[RunOrder], list[str]]:
    """Runs that some setting without a row needs, with their references; and why others are left out."""
    config, found, skipped = work.config, list[RunOrder](), list[str]()
    for category in categories:
        left = [one for one in settings if not work.results.has(one, category, config.pixel)]
        for order in run_orders(config, left, category, 0).values():
            setting = order.settings[0]
            if setting.shots is None:
                found.append(order)
                continue
            chosen = chosen_references(work.references[category], setting)
            if chosen is None:
                skipped.append(_too_few(category, setting, len(work.references[category])))
            else:
                found.append(order._replace(references=chosen))
    for line in skipped:
        work.console.print(line, markup=False, soft_wrap=True)
    return found, skipped


def _too_few(category: str, setting: Setting, available: int) -> str:
    first, last = (setting.shots or 0) * (setting.seed or 0), (setting.shots or 0) * ((setting.seed or 0) + 1)
    return (
        f"skipped: {category}, {setting.label}, seed {setting.seed} takes training images {first} to {last - 1}, "
        f"and there are {available}"
    )


def _with_banks(
    work: _Work, kind: FeatureKind, orders: Sequence[RunOrder], layout: cluster.Resources
) -> list[RunOrder]:
    """The orders with the names of their references' banks, which are encoded where they are not."""
    if not orders:
        return []
    config = work.config
    fitting = ExtractConfig(
        images=config.root,
        out=config.out,
        backbone=kind.backbone,
        weights=config.weights,
        index_source=config.index_source,
    )
    weights, _ = encoder.find_weights(fitting, Console(quiet=True))  # extract has said what there is to say
    wanted = [
        (dataclasses.replace(record, category=order.category), order.rotated)
        for order in orders
        for record in order.references
    ]
    names = encode_references(config, kind, wanted, weights, layout, work.console)
    return [
        order._replace(banks=tuple(names[record.image_id, order.rotated] for record in order.references))
        for order in orders
    ]


def _keep(work: _Work, rows: Iterable[ResultRow]) -> None:
    for row in rows:
        work.results.put(row)
        seed = "" if row.setting.seed is None else f", seed {row.setting.seed}"
        auroc = "-" if row.metrics.auroc is None else f"{100 * row.metrics.auroc:.2f}"
        work.console.print(
            f"{row.metrics.category}, {row.setting.label}{seed}: image AUROC {auroc}", markup=False, soft_wrap=True
        )


def _report(rows: Sequence[ResultRow], skipped: Sequence[str], store: Store, console: Console) -> None:
    """Print the tables, and write them as Markdown."""
    sheets, remarks = sheets_of(rows), notes(rows)
    width = None if console.is_terminal else _WIDTH  # a file has no edge to fold at
    for sheet in sheets:
        console.print(sheet.rich(), markup=False, width=width, crop=console.is_terminal)
    for line in remarks:
        console.print(line, markup=False, soft_wrap=True)
    text = "\n".join([*(sheet.markdown() for sheet in sheets), *(f"- {line}" for line in [*remarks, *skipped])]) + "\n"
    store.folder.write("tables.md", text.encode())
    console.print(f"rows: {store.folder.uri('results.parquet')}\ntables: {store.folder.uri('tables.md')}", markup=False)
