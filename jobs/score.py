"""``anomalydino score``: few-shot scores of images, or of stored embeddings."""

from __future__ import annotations

import hashlib
from functools import partial

from rich.console import Console

# Workers import this module for its names alone: what needs torch is imported where it is used.
from anomalydino_plugin import BankError
from jobs import cluster, dataflow, encoder
from jobs.config import FitConfig, ScoreConfig, part_of
from jobs.filesystem import Folder
from jobs.fit import build_banks
from jobs.inputs import Inputs, discover
from jobs.shards import cut_shards, joined_shards, shard_size
from jobs.stage import RunSummary, StageRun
from jobs.store import Store
from jobs.task_pool import run_tasks

STAGE = "score"
_SHARD = 32  # images, where nothing makes files of a sensible size by itself


def run(config: ScoreConfig, console: Console | None = None) -> RunSummary:
    """Score all images of a configuration.

    Raises:
        AnomalyDINOError: bad input or settings, before work starts; or too many failures (finished shards stay).
    """
    console = console or Console()
    cluster.check_jobs_package()
    return _score_images(config, console) if config.images is not None else _score_embeddings(config, console)


def _score_images(config: ScoreConfig, console: Console) -> RunSummary:
    inputs = discover(
        str(config.images),
        categories=config.categories,
        references=config.references,
        normal=config.banks is None,
    )
    weights = encoder.find_weights(config, console)
    shape = encoder.encoder_shape(config)
    row_bytes = shape.row_bytes(config.embedding_dtype)
    size = config.shard_size or (shard_size(shape.patches, row_bytes) if config.write_embeddings else _SHARD)
    store = Store(config.out, STAGE, joined_shards(size, shape.patches, row_bytes))
    kinds = ("images", "scores", "patch_scores", *(["embeddings"] if config.write_embeddings else []))
    stage = StageRun(store, config, console)
    with cluster.connect(config.ray_address):
        layout = cluster.cluster_resources(config.num_workers, config.gpus_per_worker, config.threads)
        banks = _banks(config, inputs, weights, layout, console)
        files = [f"{record.image_id} {record.uri}" for record in inputs.images]
        store.claim(config.identity(weights[1], [*files, banks.identity()]), kinds, config.effective())
        with store.exclusive():
            from jobs.scorer import Scorer

            arguments = (config, weights[0], banks)
            sizes = (config.resolution, shape.patch_size)
            pipeline = dataflow.Pipeline(Scorer, arguments, *sizes, store, layout, config.max_pixels)
            if todo := stage.todo(cut_shards(inputs.images, size)):
                stage.follow("scoring", todo, dataflow.run(pipeline, todo), config.max_failures)
            made = [record["bank"] for record in banks.done()]
            return stage.finish(layout, weights[1], len(inputs.images), banks=made, patch_size=shape.patch_size)


def _banks(
    config: ScoreConfig, inputs: Inputs, weights: tuple[str, str], layout: cluster.Resources, console: Console
) -> Store:
    """Where the banks are, built first unless they are given."""
    if config.banks is not None:
        from anomalydino_plugin import feature_fingerprint, reduced_precision

        banks = Store(config.banks, "fit")
        _require_banks(banks, inputs.categories)
        precision = reduced_precision(config.engine)
        made_with = feature_fingerprint(config.backbone, weights[1], config.resolution, precision)
        _check_banks(banks, inputs.categories, made_with)
        return banks
    _point_out_doubled(inputs, config, console)
    build_banks(part_of(config, FitConfig), inputs, weights, layout, console)
    return Store(config.out, "fit")


def _require_banks(banks: Store, categories: tuple[str, ...]) -> None:
    banks.identity()  # says so where no `fit` ran there
    present = {record["category"] for record in banks.done()}
    if missing := sorted(set(categories) - present):
        raise BankError(
            f"no bank of category {missing[0]!r} under {banks.location!r}: found {sorted(present)}. Run `anomalydino "
            "fit` on it, or choose with --category."
        )


def _point_out_doubled(inputs: Inputs, config: ScoreConfig, console: Console) -> None:
    from jobs.fit import choose

    quiet = Console(quiet=True)
    fit = part_of(config, FitConfig)
    chosen = {record.uri for category in inputs.references for record in choose(fit, inputs, category, quiet)}
    if doubled := chosen & {record.uri for record in inputs.images}:
        console.print(
            f"warning: {len(doubled)} reference image(s) are also scored ({sorted(doubled)[0]!r}): their distance is 0",
            markup=False,
            soft_wrap=True,
        )


def _score_embeddings(config: ScoreConfig, console: Console) -> RunSummary:
    from jobs.bank_builder import read_bank
    from jobs.embedding_scorer import EmbeddingScorer
    from jobs.embeddings import StoredRun

    stored, banks = StoredRun.read(str(config.embeddings), config.categories), Store(str(config.banks), "fit")
    _require_banks(banks, tuple(stored.sets))
    _check_banks(banks, tuple(stored.sets), stored.fingerprint)
    size = config.shard_size or _SHARD
    patches = max(image.plan.grid[0] * image.plan.grid[1] for image in stored.images)
    store = Store(config.out, STAGE, joined_shards(size, patches, 4))
    apart = ["images"] if store.location != Folder(str(config.embeddings)).location else []
    identity = config.identity(stored.fingerprint["weights"], [stored.identity, banks.identity(), *_digests(banks)])
    store.claim(identity, ("scores", "patch_scores", *apart), config.effective())
    stage = StageRun(store, config, console)
    shards = cut_shards([image.record for image in stored.images], size)
    by_category = {
        category: (found, {image.record.image_id: image for image in stored.of(category)})
        for category, found in stored.sets.items()
    }
    with store.exclusive(), cluster.connect(config.ray_address):
        layout = cluster.cluster_resources(config.num_workers, config.gpus_per_worker, config.threads)
        if todo := stage.todo(shards):
            results = run_tasks(EmbeddingScorer, (config, by_category, partial(read_bank, banks), store), todo, layout)
            stage.follow("scoring", todo, (row for _, row in results), config.max_failures)
        made = [record["bank"] for record in banks.done()]
        more = {"banks": made, "fingerprint": stored.fingerprint}
        return stage.finish(layout, stored.fingerprint["weights"], len(stored.images), **more)


def _check_banks(banks: Store, categories: tuple[str, ...], fingerprint: dict[str, str]) -> None:
    from anomalydino_plugin import check_fingerprint
    from jobs.bank_builder import read_bank

    for category in categories:
        bank = read_bank(banks, category)
        made_with = {name: bank.fingerprint.get(name, "") for name in fingerprint}
        check_fingerprint(made_with, fingerprint, f"{banks.location} ({category})")


def _digests(banks: Store) -> list[str]:
    from jobs.store import folder_name

    return [
        hashlib.sha256(banks.folder.read(f"banks/{folder_name(record['category'])}.safetensors")).hexdigest()
        for record in banks.done()
    ]
