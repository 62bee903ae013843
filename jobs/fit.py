"""``anomalydino fit``: memory banks of normal images, one for each category, in parallel."""

from __future__ import annotations

from typing import Any

from rich.console import Console

# Workers import this module for its names alone: what needs torch is imported where it is used.
from jobs import cluster, encoder
from jobs.config import FitConfig
from jobs.inputs import ImageRecord, Inputs, choose_references, discover, list_images
from jobs.progress import ImageProgress
from jobs.stage import RunSummary, StageRun
from jobs.store import REFERENCE_SHARD, Store
from jobs.task_pool import run_tasks

STAGE = "fit"


def run(config: FitConfig, console: Console | None = None) -> RunSummary:
    """Build the banks of a configuration.

    Raises:
        AnomalyDINOError: bad input or settings, or a reference image that cannot be used.
    """
    console = console or Console()
    cluster.check_jobs_package()
    inputs = discover(config.images, categories=config.categories, references=config.references, to_score=False)
    weights, checksum = encoder.find_weights(config, console)
    with cluster.connect(config.ray_address):
        layout = cluster.cluster_resources(config.num_workers, config.gpus_per_worker, config.threads)
        return build_banks(config, inputs, (weights, checksum), layout, console)


def build_banks(
    config: FitConfig, inputs: Inputs, weights: tuple[str, str], layout: cluster.Resources, console: Console
) -> RunSummary:
    """Build the banks that are not there yet; Ray is connected.

    Args:
        config: settings.
        inputs: normal images by category.
        weights: path and checksum.
        layout: of the workers.
        console: for progress.
    """
    from jobs.bank_builder import BankBuilder, BankOrder

    chosen = {category: choose(config, inputs, category, console) for category in sorted(inputs.references)}
    held_out = () if config.calibration is None else list_images(config.calibration, "calibration")
    store = Store(config.out, STAGE)
    files = [f"{category} {r.image_id} {r.uri}" for category, records in chosen.items() for r in records]
    store.claim(config.identity(weights[1], [*files, *held_out]), ("banks",), config.effective())
    stage = StageRun(store, config, console)
    with store.exclusive():
        orders = [
            BankOrder(category, records, held_out)
            for category, records in chosen.items()
            if not store.is_done(category, REFERENCE_SHARD)
        ]
        total = sum(len(order.references) for order in orders)
        if orders:
            with ImageProgress(console, "memory banks", total) as progress:
                for order, summary in run_tasks(BankBuilder, (config, weights[0], store), orders, layout):
                    progress.advance(len(order.references))
                    console.print(bank_line(summary), markup=False, soft_wrap=True)
        banks = [record["bank"] for record in store.done()]
        images = sum(len(records) for records in chosen.values())
        return stage.finish(layout, weights[1], images, banks=banks)


def choose(config: FitConfig, inputs: Inputs, category: str, console: Console) -> tuple[ImageRecord, ...]:
    """Reference images of a category; says which."""
    shots = config.shots if config.shots is not None or config.references is not None else 1
    chosen = choose_references(inputs.references[category], shots, config.seed, category)
    names = ", ".join(record.uri.rsplit("/", 1)[-1] for record in chosen[:4]) + (", ..." if len(chosen) > 4 else "")
    console.print(
        f"{category}: {len(chosen)} reference image(s) of {len(inputs.references[category])} normal ones ({names})",
        markup=False,
    )
    return chosen


def bank_line(summary: dict[str, Any]) -> str:
    """One line about a bank."""
    masking = summary.get("masking_test")
    evidence = f" ({masking['reason']}; confidence {masking['confidence']:.2f})" if masking else ""
    if summary["threshold"] is None:
        threshold = "no threshold"
    else:
        threshold = (
            f"threshold {summary['threshold']:.4f} from {summary['threshold_images']} {summary['threshold_source']}"
        )
    return (
        f"{summary['category']}: bank of {summary['rows']} patches, masking "
        f"{'on' if summary['masked'] else 'off'}{evidence}, {threshold}"
    )
