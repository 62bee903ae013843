"""``anomalydino match``: batched zero-shot scores from stored embeddings, every image against all others.

A task for each query shard streams all references, so that nothing but its own output must be merged, and commits its
results by itself.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

# Workers import this module for its names alone: what needs torch is imported where it is used.
from anomalydino_plugin import InputError, lowest_count, vote_on_masks
from jobs import cluster
from jobs.config import MatchConfig
from jobs.embeddings import StoredImage, StoredRun
from jobs.filesystem import Folder
from jobs.match_cost import CategoryCost, Estimate, estimate
from jobs.shards import Shard, cut_shards, joined_shards
from jobs.stage import RunSummary, StageRun
from jobs.store import Store
from jobs.task_pool import run_tasks

if TYPE_CHECKING:
    from jobs.matcher import CategoryPlan

STAGE = "match"


def run(config: MatchConfig, console: Console | None = None) -> RunSummary:
    """Match all images of a configuration.

    Raises:
        AnomalyDINOError: bad input or settings, before work starts.
    """
    from jobs.matcher import Matcher, query_images, sampled_name

    console = console or Console()
    cluster.check_jobs_package()
    stored = StoredRun.read(config.embeddings, config.categories)
    plans = {category: _plan(config, stored, category, console) for category in stored.sets}
    patches = max(_patches(image) for image in stored.images)
    width = next(iter(stored.sets.values())).width
    size = config.shard_size or query_images(config, patches, width)
    store = Store(config.out, STAGE, joined_shards(size, patches, 4))
    copy_images = store.location != Folder(config.embeddings).location
    kinds = ("scores", "patch_scores", *(["images"] if copy_images else []))
    identity = config.identity(stored.fingerprint["weights"], [stored.identity])
    store.claim(identity, kinds, config.effective())
    stage = StageRun(store, config, console)
    with store.exclusive(), cluster.connect(config.ray_address):
        layout = cluster.cluster_resources(config.num_workers, config.gpus_per_worker, config.threads)
        cost: dict[str, object] = {}
        if todo := stage.todo(cut_shards([image.record for image in stored.images], size)):
            plans = _with_samples(plans, store, layout)
            expected = _announce(config, plans, todo, layout, (store, copy_images), console)
            results = run_tasks(Matcher, (config, plans, store, copy_images), todo, layout)
            started = time.perf_counter()
            stage.follow("matching", todo, (row for _, row in results), config.max_failures)
            cost = _compare(expected, time.perf_counter() - started, console)
        for category in plans:
            store.folder.remove(sampled_name(category))
        return stage.finish(
            layout, stored.fingerprint["weights"], len(stored.images), cost=cost, fingerprint=stored.fingerprint
        )


def _with_samples(plans: dict[str, CategoryPlan], store: Store, layout: cluster.Resources) -> dict[str, CategoryPlan]:
    """Copy chosen references together: every round would read all embeddings to find them."""
    from jobs.matcher import Sampler

    chosen = [(category, plan) for category, plan in plans.items() if plan.references is not None]
    copied = run_tasks(Sampler, (store,), chosen, layout.without_gpus())
    return {**plans, **{category: plan._replace(sampled=found) for (category, plan), found in copied}}


def choose_references(ids: Sequence[str], fraction: float | None, most: int | None, seed: int) -> frozenset[str] | None:
    """Ids of the images that others are compared with; ``None`` for all. The choice depends on ids and seed alone.

    Args:
        ids: of all images of a category.
        fraction: share of them.
        most: upper limit of their number.
        seed: of the choice.
    """
    count = min(math.ceil((fraction or 1.0) * len(ids)), most or len(ids))
    count = max(2, count)  # one alone could not be compared with anything
    if count >= len(ids):
        return None
    order = sorted(ids, key=lambda image_id: hashlib.sha256(f"{seed}/{image_id}".encode()).digest())
    return frozenset(order[:count])


def _plan(config: MatchConfig, stored: StoredRun, category: str, console: Console) -> CategoryPlan:
    from jobs.matcher import CategoryPlan

    images = stored.of(category)
    if len(images) < 2:
        raise InputError(
            f"category {category!r} has one image: batched zero-shot compares images with each other, so it needs at "
            "least two. Add images, or score few-shot with `anomalydino score`."
        )
    ids = [image.record.image_id for image in images]
    references = choose_references(ids, config.reference_fraction, config.max_references, config.seed)
    use_mask = _use_mask(config, images, category)
    count = len(images) if references is None else len(references)
    console.print(
        f"{category}: {len(images)} images, each compared with {count - (references is None)} others, masking "
        f"{'on' if use_mask else 'off'}",
        markup=False,
    )
    return CategoryPlan(stored.sets[category], images, references, use_mask)


def _use_mask(config: MatchConfig, images: Sequence[StoredImage], category: str) -> bool:
    if config.masking == "off":
        return False
    votes = [image.masking_test for image in images]
    if None in votes:
        raise InputError(
            f"the embeddings of category {category!r} hold no foreground masks: they were extracted with masking off. "
            "Set --masking off, or extract them again."
        )
    return config.masking == "on" or vote_on_masks(map(bool, votes))


def _patches(image: StoredImage) -> int:
    return image.plan.grid[0] * image.plan.grid[1]


def _announce(
    config: MatchConfig,
    plans: dict[str, CategoryPlan],
    todo: Sequence[Shard],
    layout: cluster.Resources,
    output: tuple[Store, bool],
    console: Console,
) -> Estimate:
    """Say what matching will cost on the workers at hand; ``output`` as the last two arguments of ``Matcher``."""
    from jobs.match_rates import RateProbe
    from jobs.matcher import passes

    costs: dict[str, CategoryCost] = {}
    counts: dict[str, int] = {}
    for category, plan in plans.items():
        ids = {record.image_id for shard in todo if shard.category == category for record in shard.records}
        queries = sum(_patches(image) for image in plan.images if image.record.image_id in ids)
        references = sum(map(_patches, plan.reference_images()))
        count = lowest_count(config.mode, len(plan.reference_images()), references, config.share)
        shards = sum(shard.category == category for shard in todo)
        rounds = max(shards, passes(config, queries, count))
        own = round(plan.embeddings.file_bytes * len(ids) / len(plan.images))
        read = own + rounds * (plan.sampled or plan.embeddings).file_bytes
        costs[category], counts[category] = CategoryCost(queries, references, rounds, read), count
    largest = max(plans, key=lambda category: plans[category].embeddings.file_bytes)
    settings = (config, *output, counts[largest], costs[largest].references)
    ((_, rates),) = run_tasks(RateProbe, settings, [plans[largest]], layout)
    width = plans[largest].embeddings.width
    found = estimate(list(costs.values()), width, rates, min(layout.workers, len(todo)))
    console.print(f"matching: {found}", markup=False, soft_wrap=True)
    return found


def _compare(expected: Estimate, seconds: float, console: Console) -> dict[str, object]:
    console.print(f"matching took {seconds:.0f} s, {seconds / max(expected.seconds, 1e-9):.2f} times the estimate")
    return {"estimate": expected.as_json(), "seconds": round(seconds, 3)}
