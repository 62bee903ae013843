"""The life of one stage on one output folder: what is left to do, progress, failures, joined files, the summary."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any, NamedTuple

from rich.console import Console

from anomalydino_plugin import InputError
from jobs import cluster
from jobs.progress import ImageProgress
from jobs.schema import SCHEMA_VERSION
from jobs.settings import JobSettings
from jobs.shards import Shard
from jobs.store import Store, folder_name
from jobs.task_pool import run_tasks

_VERSIONED = ("anomalydino-plugin", "anomalib", "torch", "timm", "ray", "pyarrow", "numpy", "opencv-python-headless")


class RunSummary(NamedTuple):
    """What a stage did, over all its runs on the folder.

    Attributes:
        done: images that are finished.
        failed: images in ``failures``.
        job: what ``job.json`` says of the stage.
    """

    done: int
    failed: int
    job: dict[str, Any]


class StageRun:
    """One call of one stage.

    Args:
        store: its output.
        config: its settings.
        console: for progress.
    """

    def __init__(self, store: Store, config: JobSettings, console: Console) -> None:
        self.store, self.config, self.console = store, config, console
        self._started = time.perf_counter()

    def todo(self, shards: Sequence[Shard]) -> list[Shard]:
        """Shards that no completion record names; says so where some are finished."""
        done = self.store.done_shards()
        left = [shard for shard in shards if (folder_name(shard.category), shard.name) not in done]
        if len(left) < len(shards):
            self.console.print(f"resuming: {len(shards) - len(left)} of {len(shards)} shards are finished")
        return left

    def follow(
        self, title: str, shards: Sequence[Shard], results: Iterable[dict[str, Any]], max_failures: float
    ) -> None:
        """Show progress while results come in; stop where too many images fail.

        Raises:
            InputError: more than ``max_failures`` of all images failed, those of earlier calls included.
        """
        total = sum(len(shard.records) for shard in shards)
        before = self.store.done()
        failed = sum(record["failed"] for record in before)
        everything = total + sum(record["done"] + record["failed"] for record in before)
        with ImageProgress(self.console, title, total) as progress:
            for row in results:
                progress.advance(row["done"] + row["failed"])
                failed += row["failed"]
                if failed > max_failures * everything:
                    self._join(kind="failures")
                    raise InputError(
                        f"{failed} of {everything} images failed, more than --max_failures={max_failures:g}. "
                        f"See {self.store.folder.uri('failures')}; finished shards are kept."
                    )

    def finish(self, layout: cluster.Resources, checksum: str, images: int, **more: Any) -> RunSummary:
        """Join small files, and write ``job.json`` last.

        Args:
            layout: of the workers.
            checksum: of the weights.
            images: that were found.
            **more: for ``job.json``.
        """
        self._join(layout=layout)
        self.store.drop_parts()
        records = [record for record in self.store.done() if "done" in record]
        done, failed = (sum(record[key] for record in records) for key in ("done", "failed"))
        seconds = {
            "total": round(time.perf_counter() - self._started, 3),
            "workers": round(sum(record["seconds"] for record in records), 3),
        }
        job = {
            "config": self.config.effective(),
            "weights_sha256": checksum,
            "counts": {"images": images, "done": done, "failed": failed},
            "resources": dataclasses.asdict(layout),
            "seconds": seconds,
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in _VERSIONED}},
            **more,
        }
        write_job(self.store, job)
        return RunSummary(done, failed, job)

    def _join(self, kind: str | None = None, layout: cluster.Resources | None = None) -> None:
        todo = [item for item in self.store.unjoined() if kind in (None, item[0])]
        if layout is None or len(todo) == 1:
            for item in todo:
                self.store.join(*item)
            return
        for _ in run_tasks(_Joiner, (self.store,), todo, layout.without_gpus()):
            pass


class _Joiner:
    """Joins the small files of some shards, in a worker process."""

    work = "joining small files"

    def __init__(self, store: Store, device: str) -> None:
        del device
        self.store = store

    def run(self, item: tuple[str, str, str, list[str]]) -> None:
        self.store.join(*item)


def what_is_kept(out: str) -> str:
    """After an interruption: remove what is not whole, and say in half a line what is kept and how to go on."""
    lines = []
    for stage in Store(out).stages():
        store = Store(out, stage)
        store.sweep()
        records = store.done()
        images = sum(record.get("done", 0) + record.get("failed", 0) for record in records)
        lines.append(f"{stage}: {len(records)} shard(s), {images} image(s)")
    kept = "; ".join(lines) or "nothing"
    return f"committed under {out!r} are {kept}. Repeat the command to go on."


def write_job(store: Store, job: dict[str, Any]) -> None:
    """Put what a stage did into ``job.json``, beside the other stages."""
    name = "job.json"
    stages = store.read_json(name)["stages"] if store.folder.has(name) else {}
    store.write_json(name, {"schema_version": SCHEMA_VERSION, "stages": {**stages, store.stage: job}})


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
