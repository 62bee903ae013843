"""Few-shot scoring over Ray: banks first, then shards through read -> decode -> encode -> write.

The rows that flow through Ray Data are shards: cut from the sorted images by configured size alone, so that the same
settings give the same bytes whatever the number of workers. Each shard's files and its completion record are written
by one task; finished shards are skipped when the command is repeated.
"""

from __future__ import annotations

import dataclasses
import logging
import pickle
import platform
import time
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
from rich.console import Console

# Writing tasks import this module: what needs torch is imported where it is used.
from anomalydino_plugin import AnomalyDINOError, InputError
from jobs import cluster
from jobs.config import ScoreConfig
from jobs.inputs import ImageRecord, Inputs, choose_references, discover, list_images
from jobs.progress import ImageProgress
from jobs.schema import SCHEMA_VERSION
from jobs.store import REFERENCE_SHARD, Store

if TYPE_CHECKING:
    from ray.data import Dataset

_VERSIONED = ("anomalydino-plugin", "anomalib", "torch", "timm", "ray", "pyarrow", "numpy", "opencv-python-headless")


class Shard(NamedTuple):
    """A unit of work: some images of one category, in order."""

    category: str
    name: str
    records: tuple[ImageRecord, ...]


class RunSummary(NamedTuple):
    """What a run did.

    Attributes:
        scored: images with a score.
        failed: images in ``failures``.
        job: content of ``job.json``.
    """

    scored: int
    failed: int
    job: dict[str, Any]


def cut_shards(images: tuple[ImageRecord, ...], size: int) -> list[Shard]:
    """Cut images, sorted by category and id, into shards; names are zero-padded and sort in order."""
    shards = []
    for category in sorted({record.category for record in images}):
        own = tuple(record for record in images if record.category == category)
        shards += [
            Shard(category, f"{start // size:06d}", own[start : start + size]) for start in range(0, len(own), size)
        ]
    return shards


def run(config: ScoreConfig, console: Console | None = None) -> RunSummary:
    """Score all images of a configuration.

    Raises:
        AnomalyDINOError: bad input or settings, before work starts; or too many failures (finished shards stay).
    """
    console = console or Console()
    cluster.check_jobs_package()
    started = time.perf_counter()
    inputs = discover(config.images, categories=config.categories, references=config.references)
    references = {name: _chosen(config, inputs, name, console) for name in inputs.categories}
    held_out = _held_out(config)
    weights, checksum = _weights(config)
    store = Store(config.out)
    chosen = [record for records in references.values() for record in records]
    files = [f"{record.image_id} {record.uri}" for record in (*inputs.images, *chosen)]
    store.claim(config.identity(checksum, [*files, *held_out]))
    if doubled := {record.uri for record in chosen} & {record.uri for record in inputs.images}:
        console.print(
            f"warning: {len(doubled)} reference image(s) are also scored ({sorted(doubled)[0]}): their distance is 0",
            markup=False,
            soft_wrap=True,
        )
    with cluster.connect(config.ray_address):
        layout = cluster.cluster_resources(config.num_workers, config.gpus_per_worker, config.threads)
        job = _Job(config, weights, layout, store, console)
        job.build_banks(references, held_out)
        job.score(cut_shards(inputs.images, config.shard_size))
    return _finish(config, store, layout, checksum, len(inputs.images), time.perf_counter() - started)


def _chosen(config: ScoreConfig, inputs: Inputs, category: str, console: Console) -> tuple[ImageRecord, ...]:
    shots = config.shots if config.shots is not None or config.references is not None else 1
    chosen = choose_references(inputs.references[category], shots, config.seed, category)
    names = ", ".join(record.uri.rsplit("/", 1)[-1] for record in chosen[:4]) + (", ..." if len(chosen) > 4 else "")
    console.print(
        f"{category}: {len(chosen)} reference image(s) of {len(inputs.references[category])} normal ones ({names})",
        markup=False,
    )
    return chosen


def _held_out(config: ScoreConfig) -> tuple[str, ...]:
    if config.calibration is None:
        return ()
    from pathlib import Path

    folder = Path(config.calibration).expanduser().resolve()
    paths = list_images(folder) if folder.is_dir() else []
    if not paths:
        raise InputError(f"--calibration {config.calibration!r} has no images: expected a folder of normal images.")
    return tuple(str(path) for path in paths)


def _weights(config: ScoreConfig) -> tuple[str, str]:
    """Path (or ``random:SEED``) and checksum, resolved once on the driver."""
    if config.weights is not None and config.weights.partition(":")[0] == "random":
        return config.weights, config.weights
    from anomalydino_plugin import resolve_weights

    file = resolve_weights(config.backbone, config.weights, index_source=config.index_source)
    return str(file.path), file.sha256


class _Job:
    """The Ray side of one run."""

    def __init__(
        self, config: ScoreConfig, weights: str, layout: cluster.Resources, store: Store, console: Console
    ) -> None:
        self.config = dataclasses.replace(config, out=str(store.root))
        self.weights = weights
        self.layout = layout
        self.store = store
        self.console = console

    def build_banks(self, references: dict[str, tuple[ImageRecord, ...]], held_out: tuple[str, ...]) -> None:
        """A task for each category whose bank is not there yet."""
        import ray

        missing = [category for category in references if not self.store.is_done(category, REFERENCE_SHARD)]
        if not missing:
            return
        builders = [
            ray.remote(num_cpus=self.layout.cpus_per_worker, num_gpus=self.layout.gpus_per_worker)(_BankBuilder).remote(
                self.config, self.weights, self.layout
            )
            for _ in range(min(self.layout.workers, len(missing)))
        ]
        pending = {
            builders[number % len(builders)].build.remote(name, references[name], held_out): name
            for number, name in enumerate(missing)
        }
        total = sum(len(references[name]) for name in missing)
        try:
            with ImageProgress(self.console, "memory banks", total) as progress:
                while pending:
                    (ready,), _ = ray.wait(list(pending), num_returns=1)
                    summary = _unwrap(ray.get(ready))
                    progress.advance(len(references[pending.pop(ready)]))
                    self.console.print(_bank_line(summary), markup=False, soft_wrap=True)
        finally:
            for builder in builders:  # gives their memory back before the encoders start
                ray.kill(builder)

    def score(self, shards: list[Shard]) -> None:
        """Send unfinished shards through the pipeline; stop if too many images fail."""
        todo = [shard for shard in shards if not self.store.is_done(shard.category, shard.name)]
        if len(todo) < len(shards):
            self.console.print(f"resuming: {len(shards) - len(todo)} of {len(shards)} shards are finished")
        if not todo:
            return
        total = sum(len(shard.records) for shard in todo)
        allowed = self.config.max_failures * total
        failed = 0
        with ImageProgress(self.console, "scoring", total) as progress:
            for row in _rows(score_pipeline(self.config, self.weights, self.layout, todo)):
                progress.advance(row["scored"] + row["failed"])
                failed += row["failed"]
                if failed > allowed:
                    raise InputError(
                        f"{failed} of {total} images failed, more than --max_failures={self.config.max_failures:g}. "
                        f"See {self.store.root / 'failures'}; finished shards are kept."
                    )


def score_pipeline(config: ScoreConfig, weights: str, layout: cluster.Resources, shards: list[Shard]) -> Dataset:
    """The Ray Data plan: decode on CPU tasks, encode and score on an actor pool, write on CPU tasks."""
    import ray
    from ray.data import ActorPoolStrategy

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    for name in ("ray.data", "ray.data._internal.progress"):  # its notices would tear our progress bar
        logging.getLogger(name).setLevel(logging.ERROR)
    payloads = pa.array([pickle.dumps(shard) for shard in shards], pa.large_binary())
    source = ray.data.from_arrow([pa.table({"payload": payloads.slice(i, 1)}) for i in range(len(shards))])
    resolution = config.resolution
    decoded = source.map_batches(
        _decode_stage,
        fn_kwargs={"resolution": resolution, "patch_size": _patch_size_of(config)},
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=cluster.DECODE_CPUS,
    )
    scored = decoded.map_batches(
        _EncodeStage,
        fn_constructor_args=(config, weights, layout),
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=min(layout.workers, len(shards))),
        num_cpus=layout.cpus_per_worker,
        num_gpus=layout.gpus_per_worker,
    )
    return scored.map_batches(
        _write_stage,
        fn_kwargs={"out": config.out},
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=cluster.WRITE_CPUS,
    )


def _rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from batch.to_pylist()


# Stages: thin shells around plain functions


def _decode_stage(batch: pa.Table, resolution: int, patch_size: int) -> pa.Table:
    from jobs.extract import decode

    shard: Shard = pickle.loads(batch["payload"][0].as_py())  # made by our own driver
    return _packed((shard, *decode(shard.records, resolution, patch_size)))


class _ScorerProcess:
    """What every process with a model does first."""

    def __init__(self, config: ScoreConfig, weights: str, layout: cluster.Resources) -> None:
        cluster.check_jobs_package()
        from jobs.scorer import Scorer

        cluster.set_threads(layout.threads)
        self.scorer = Scorer(config, weights, layout.device)


class _EncodeStage(_ScorerProcess):
    def __call__(self, batch: pa.Table) -> pa.Table:
        shard, decoded, failures = pickle.loads(batch["payload"][0].as_py())
        return _packed((shard, *self.scorer.score_shard(shard.category, decoded, failures)))


def _write_stage(batch: pa.Table, out: str) -> pa.Table:
    shard, tables, record = pickle.loads(batch["payload"][0].as_py())
    Store(out).commit(shard.category, shard.name, tables, record)
    counts = {key: [record[key]] for key in ("scored", "failed", "seconds")}
    return pa.table({"category": [shard.category], "shard": [shard.name], **counts})


def _packed(value: object) -> pa.Table:
    # One row for each shard: Ray Data may cut or join blocks, but never a row.
    return pa.table({"payload": pa.array([pickle.dumps(value, protocol=5)], pa.large_binary())})


class _BankBuilder(_ScorerProcess):
    def build(
        self, category: str, references: tuple[ImageRecord, ...], held_out: tuple[str, ...]
    ) -> dict[str, Any] | Exception:
        try:
            return self.scorer.build_bank(category, references, held_out)
        except AnomalyDINOError as error:
            return error  # a message for the user, not a traceback of a worker


def _unwrap(result: dict[str, Any] | Exception) -> dict[str, Any]:
    if isinstance(result, Exception):
        raise result
    return result


def _patch_size_of(config: ScoreConfig) -> int:
    from anomalydino_plugin import patch_size_of

    return patch_size_of(config.backbone)


def _bank_line(summary: dict[str, Any]) -> str:
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


def _finish(
    config: ScoreConfig, store: Store, layout: cluster.Resources, checksum: str, images: int, seconds: float
) -> RunSummary:
    records = store.done()
    shards = [record for record in records if "scored" in record]
    scored, failed = (sum(record[key] for record in shards) for key in ("scored", "failed"))
    job = {
        "command": "score",
        "schema_version": SCHEMA_VERSION,
        "config": dataclasses.asdict(config),
        "weights_sha256": checksum,
        "counts": {"images": images, "scored": scored, "failed": failed},
        "banks": [record["bank"] for record in records if "bank" in record],
        "resources": dataclasses.asdict(layout),
        "seconds": {"total": round(seconds, 3), "encode_and_score": round(sum(r["seconds"] for r in shards), 3)},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _VERSIONED}},
    }
    store.write_json(store.root / "job.json", job)
    return RunSummary(scored, failed, job)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
