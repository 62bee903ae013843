"""The Ray Data pipeline that images go through: read and decode on CPU tasks, encode on an actor pool, write on tasks.

The rows that flow are shards, cut from the sorted images by configured size alone, so that the same settings give the
same bytes whatever the number of workers. One task writes a shard's files and its completion record.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

# Writing tasks import this module: what needs torch is imported where it is used.
from anomalydino_plugin import AnomalyDINOError
from jobs import cluster
from jobs.resources import lost_workers, stated
from jobs.shards import Shard
from jobs.store import Store
from jobs.worker import start_worker

if TYPE_CHECKING:
    from ray.data import Dataset


_LESS_MEMORY = (
    "Give it more, or fewer --num_workers; smaller --batch_size or --shard_size need less, too, but another --out."
)


@dataclass(frozen=True)
class Pipeline:
    """How shards are worked on.

    Attributes:
        body: class with a method ``process(category, decoded, failures)`` that returns tables by kind and a record.
        arguments: of its constructor, before the device.
        resolution: smaller edge after resizing, pixels.
        patch_size: pixels.
        store: where results go.
        layout: resources of an encoder.
        max_pixels: of an image; ``None`` for the decoder's limit.
    """

    body: type
    arguments: tuple[Any, ...]
    resolution: int
    patch_size: int
    store: Store
    layout: cluster.Resources
    max_pixels: int | None = None


def run(pipeline: Pipeline, shards: Sequence[Shard]) -> Iterator[dict[str, Any]]:
    """Work through shards.

    Yields:
        Category, shard, and counts and seconds of each, when its files are written.

    Raises:
        AnomalyDINOError: that a worker raised.
    """
    import ray

    dataset = plan(pipeline, shards)
    try:
        # Not iter_batches: without prefetching it never stops its prefetching thread, and with it a row comes late.
        for bundle in dataset.iter_internal_ref_bundles():
            for row in (row for block in ray.get(bundle.block_refs) for row in block.to_pylist()):
                if row["error"] is not None:
                    raise pickle.loads(row["error"])  # a message for the user, not a traceback of a worker
                yield row
    except AnomalyDINOError:
        raise
    except Exception as error:  # Ray Data has errors of its own around those of tasks and of Ray
        known = lost_workers(error, "working through the images", _LESS_MEMORY)
        if known is None:
            raise
        raise known from error


def plan(pipeline: Pipeline, shards: Sequence[Shard]) -> Dataset:
    """The Ray Data plan; nothing runs before it is iterated."""
    import ray
    from ray.data import ActorPoolStrategy

    _quiet()
    layout = pipeline.layout
    payloads = pa.array([pickle.dumps(shard) for shard in shards], pa.large_binary())
    source = ray.data.from_arrow([pa.table({"payload": payloads.slice(i, 1)}) for i in range(len(shards))])
    # Different shares for different stages: Ray fuses stages of equal resources into one task.
    decoded = source.map_batches(
        _decode_stage,
        fn_kwargs={
            "resolution": pipeline.resolution,
            "patch_size": pipeline.patch_size,
            "max_pixels": pipeline.max_pixels,
        },
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=layout.decode_cpus,
        max_retries=cluster.LOST,
    )
    encoded = decoded.map_batches(
        _EncodeStage,
        fn_constructor_args=(pipeline.body, pipeline.arguments, layout),
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=min(layout.workers, len(shards))),
        num_cpus=layout.cpus_per_worker,
        num_gpus=layout.gpus_per_worker,
        max_restarts=cluster.LOST,
    )
    return encoded.map_batches(
        _write_stage,
        fn_kwargs={"store": pipeline.store},
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=cluster.WRITE_CPUS,
        max_retries=cluster.LOST,
    )


def _quiet() -> None:
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    # Its notices would tear our progress bar, and it shows the stack of an error that it then raises.
    for name in ("ray.data", "ray.data._internal.progress"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


# Stages: thin shells around plain functions


def _decode_stage(batch: pa.Table, resolution: int, patch_size: int, max_pixels: int | None) -> pa.Table:
    from jobs.decode import decode

    started = time.perf_counter()
    shard: Shard = pickle.loads(batch["payload"][0].as_py())  # made by our own driver
    try:
        with stated(f"decoding shard {shard.name} of {shard.category!r}", _LESS_MEMORY):
            decoded, failures = decode(shard.records, resolution, patch_size, max_pixels)
            return _packed((shard, decoded, failures, round(time.perf_counter() - started, 3)))
    except AnomalyDINOError as error:
        return _packed((shard, error, [], 0.0))


class _EncodeStage:
    def __init__(self, body: type, arguments: tuple[Any, ...], layout: cluster.Resources) -> None:
        try:
            with stated("loading the backbone", _LESS_MEMORY):
                start_worker(layout)
                self.body = body(*arguments, layout.device)
        except AnomalyDINOError as error:  # Ray would make a new worker, and another one
            self.body = _Refusing(error)
        self.ready = time.time()

    def __call__(self, batch: pa.Table) -> pa.Table:
        shard, decoded, failures, decode_seconds = pickle.loads(batch["payload"][0].as_py())
        if isinstance(decoded, AnomalyDINOError):
            return _packed((shard, decoded, {}))
        try:
            with stated(f"encoding shard {shard.name} of {shard.category!r}", _LESS_MEMORY):
                tables, record = self.body.process(shard.category, decoded, failures)
                record = {**record, "decode_seconds": decode_seconds, "worker_ready": round(self.ready, 3)}
                return _packed((shard, {kind: _to_ipc(table) for kind, table in tables.items()}, record))
        except AnomalyDINOError as error:
            return _packed((shard, error, {}))


class _Refusing:
    """Stands in for a body of work that could not be made."""

    def __init__(self, error: AnomalyDINOError) -> None:
        self.error = error

    def process(self, *_: Any) -> Any:
        raise self.error


def _write_stage(batch: pa.Table, store: Store) -> pa.Table:
    shard, streams, record = pickle.loads(batch["payload"][0].as_py())
    error = streams if isinstance(streams, AnomalyDINOError) else _commit(store, shard, streams, record)
    if error is not None:
        record = {"done": 0, "failed": 0, "seconds": 0.0}
    counts = {key: [record[key]] for key in ("done", "failed", "seconds")}
    row = {"category": [shard.category], "shard": [shard.name], **counts}
    return pa.table({**row, "error": pa.array([None if error is None else pickle.dumps(error)], pa.large_binary())})


def _commit(store: Store, shard: Shard, streams: Any, record: dict[str, Any]) -> AnomalyDINOError | None:
    try:
        with stated(f"writing shard {shard.name} of {shard.category!r}", _LESS_MEMORY):
            tables = {kind: pa.ipc.open_stream(stream).read_all() for kind, stream in streams.items()}
            store.commit(shard.category, shard.name, tables, record)
    except AnomalyDINOError as error:
        return error
    return None


def _to_ipc(table: pa.Table) -> pa.Buffer:
    """Arrow's own stream: a pickled table forgets that elements of its lists are never null."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _packed(value: object) -> pa.Table:
    # One row for each shard: Ray Data may cut or join blocks, but never a row.
    return pa.table({"payload": pa.array([pickle.dumps(value, protocol=5)], pa.large_binary())})
