"""The runs that are measured, one for each category and setting that differs for it; each is a run as others are.

    OUT/runs/NAME/C/     scores and patch distances, as ``anomalydino score --embeddings`` and ``match`` write them

``anomalydino evaluate``, ``report`` and ``maps`` read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from rich.console import Console

# Workers import this module for its names alone: what needs torch is imported where it is used.
from anomalydino_plugin import MemoryBank
from jobs import match
from jobs.config import MatchConfig, ScoreConfig
from jobs.evaluate import evaluate
from jobs.filesystem import Folder
from jobs.inputs import ImageRecord
from jobs.metric_rows import CategoryMetrics
from jobs.reproduce.features import FeatureKind, features_folder, read_references
from jobs.reproduce.protocol import Setting
from jobs.reproduce.results import ResultRow
from jobs.reproduce.settings import ReproduceConfig
from jobs.shards import cut_shards
from jobs.stage import write_job
from jobs.store import Store, folder_name

_SHARD = 512  # images; a category of the benchmarks in one


class RunOrder(NamedTuple):
    """One run to make and measure.

    Attributes:
        category: which.
        settings: all that mean the same for this category.
        run: folder below OUT.
        rotated: whether references are rotated.
        references: reference images; none for batched zero-shot.
        banks: names of their banks.
        failed: test images that could not be encoded.
    """

    category: str
    settings: tuple[Setting, ...]
    run: str
    rotated: bool
    references: tuple[ImageRecord, ...] = ()
    banks: tuple[str, ...] = ()
    failed: int = 0


class Measured(NamedTuple):
    """What a run gave.

    Attributes:
        metrics: of its category.
        masked: whether test images were masked.
    """

    metrics: CategoryMetrics
    masked: bool


def run_orders(config: ReproduceConfig, settings: Iterable[Setting], category: str, failed: int) -> dict[str, RunOrder]:
    """Orders by run, without references."""
    orders: dict[str, RunOrder] = {}
    for setting in settings:
        run = f"runs/{setting.run_name(config.dataset, category)}/{folder_name(category)}"
        known = orders.get(run)
        together = (*known.settings, setting) if known else (setting,)
        orders[run] = RunOrder(category, together, run, setting.rotates(config.dataset, category), failed=failed)
    return orders


class FewShotRun:
    """Scores and measures a category under one setting; knows no Ray.

    Args:
        config: of the command.
        device: ``"cpu"`` or ``"cuda"``.
    """

    def __init__(self, config: ReproduceConfig, device: str) -> None:
        self.config, self.device = config, device

    def run(self, order: RunOrder) -> Measured:
        """Score what is not scored yet, then measure."""
        setting = order.settings[0]
        out = Folder(self.config.out).uri(order.run)
        store = Store(out, "score")
        if not store.is_finished():
            self._score(order, setting, store)
        return measure(out, order, self.config.pixel)

    def _score(self, order: RunOrder, setting: Setting, store: Store) -> None:
        from jobs.embedding_scorer import EmbeddingScorer
        from jobs.embeddings import StoredRun

        kind = FeatureKind(setting.backbone, setting.resolution)
        embeddings = features_folder(self.config, kind, order.category)
        stored = StoredRun.read(embeddings)
        settings = ScoreConfig(
            out=store.location,
            embeddings=embeddings,
            banks=Folder(self.config.out).uri("references"),
            shots=setting.shots,
            seed=setting.seed or 0,
            masking=setting.masks(self.config.dataset, order.category),
            rotations="agnostic" if order.rotated else "informed",
            k=setting.k,
            statistic=setting.statistic,
            kernel=self.config.kernel,
        )
        store.claim(settings.identity(stored.fingerprint["weights"], [stored.identity, *order.banks]), _KINDS, {})
        sources = {
            order.category: (
                stored.sets[order.category],
                {image.record.image_id: image for image in stored.of(order.category)},
            )
        }
        scorer = EmbeddingScorer(settings, sources, self._bank(order), store, self.device)
        for shard in cut_shards([image.record for image in stored.images], _SHARD):
            if not store.is_done(shard.category, shard.name):
                scorer.run(shard)
        write_job(store, _job(settings.effective(), stored, len(stored.images), order.failed))

    def _bank(self, order: RunOrder) -> Any:
        def merged(_: str) -> MemoryBank:
            return read_references(self.config, order.banks, order.rotated)

        return merged


_KINDS = ("images", "scores", "patch_scores")


def _job(settings: dict[str, Any], stored: Any, done: int, failed: int) -> dict[str, Any]:
    return {
        "config": settings,
        "weights_sha256": stored.fingerprint["weights"],
        "fingerprint": stored.fingerprint,
        "counts": {"images": done + failed, "done": done, "failed": failed},
    }


def batched_run(config: ReproduceConfig, order: RunOrder, console: Console) -> Measured:
    """Match a category's images against each other, then measure; Ray is connected.

    Raises:
        AnomalyDINOError: as ``anomalydino match``.
    """
    setting, out = order.settings[0], Folder(config.out).uri(order.run)
    if not Store(out, match.STAGE).is_finished():
        settings = MatchConfig(
            out=out,
            embeddings=features_folder(config, FeatureKind(setting.backbone, setting.resolution), order.category),
            masking=setting.masks(config.dataset, order.category),
            statistic=setting.statistic,
            kernel=config.kernel,
            num_workers=config.num_workers,
            gpus_per_worker=config.gpus_per_worker,
            threads=config.threads,
        )
        match.run(settings, console)
    return measure(out, order, config.pixel)


def measure(out: str, order: RunOrder, pixel: bool) -> Measured:
    """Metrics of a finished run.

    Args:
        out: its folder.
        order: that it is of.
        pixel: whether to measure pixels, where there are masks.
    """
    (metrics,) = evaluate(out, pixel=None if pixel else False)
    masked = Store(out).read("scores", ["masked"])["masked"].to_pylist()
    return Measured(metrics._replace(failed=order.failed), any(masked))


def rows_of(config: ReproduceConfig, order: RunOrder, measured: Measured) -> Iterator[ResultRow]:
    """A row for each setting of an order."""
    for setting in order.settings:
        yield ResultRow(
            config.dataset,
            setting,
            order.rotated,
            measured.masked,
            "|".join(record.image_id for record in order.references),
            order.run,
            config.pixel,
            measured.metrics,
        )


def chosen_references(available: Sequence[ImageRecord], setting: Setting) -> tuple[ImageRecord, ...] | None:
    """The official rule; ``None`` where there are fewer images."""
    from anomalydino_plugin import InputError
    from jobs.inputs import choose_references

    try:
        return choose_references(tuple(available), setting.shots, setting.seed or 0, "")
    except InputError:
        return None
