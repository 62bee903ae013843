"""Ray: start or join, and how much of it each worker gets.

Three facts of Ray shape this file. Actors that fill all logical CPUs starve the read and write tasks, and Ray Data
then waits for ever: an encoder never takes the last CPU. Ray puts the driver's working folder on the workers'
import path, where a stranger's ``jobs`` package would hide ours: the working folder is an empty one of our own. Ray
sets OMP_NUM_THREADS to 1: workers set their threads themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anomalydino_plugin import ConfigError, ResourceError
from jobs.resources import GO_ON, group_limit, memory_state

# Different shares for different stages: Ray fuses stages of equal resources into one task.
DECODE_CPUS = 0.30
WRITE_CPUS = 0.20
# Beside encoders on GPUs, decoding is most of what the CPUs do: an encoder leaves them to it, and hardly one is shared,
# which would keep the encoder's own thread waiting. Nodes of fewer CPUs go on sharing.
_GPU_ENCODER_CPUS, _GPU_DECODE_CPUS, _GPU_NODE_CPUS = 1.0, 0.9, 4
# Processes or nodes that one encoder, or one task, may lose: without a limit the OOM killer's work never ends.
LOST = 10
# An embedded Ray, its driver and its store; an encoder of S/14 and a decoding task; what is not worth a try.
_RAY_BYTES, _WORKER_BYTES, _LEAST_BYTES = 1.2e9, 0.7e9, 1.0e9
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it, under this very name, for the driver of a job
_embedded: list[Any] = []  # the session of the Ray that this process has started, while it runs


@dataclass(frozen=True)
class Resources:
    """How the encoders are laid out.

    Attributes:
        workers: encoder processes.
        cpus_per_worker: logical CPUs Ray books for each.
        gpus_per_worker: GPUs Ray books for each.
        threads: CPU threads each one uses; the same whatever the number of workers, so that results are too.
        decode_cpus: logical CPUs Ray books for a task that reads and decodes.
    """

    workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    threads: int
    decode_cpus: float = DECODE_CPUS

    @property
    def device(self) -> str:
        """Torch device of a worker."""
        return "cuda" if self.gpus_per_worker > 0 else "cpu"

    def without_gpus(self) -> Resources:
        """The same for work that needs no GPU."""
        return dataclasses.replace(self, gpus_per_worker=0.0)


@contextlib.contextmanager
def connect(address: str | None) -> Iterator[None]:
    """Start an embedded Ray, or join a cluster; leave it afterwards as it was found.

    Args:
        address: ``None`` for embedded, or inside a Ray job its cluster; ``auto``, or host:port.

    Raises:
        ConfigError: no cluster answers at the address.
        ResourceError: an embedded one did not start, or its control group has too little memory for it.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # workers without GPUs keep CUDA's own view
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    # Ray Data hands settings to its actors by reference and then warns of it, in the middle of our progress bar.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    job = _surrounding_job()
    if address is None and job is not None:
        address = "auto"
    with tempfile.TemporaryDirectory(prefix="anomalydino-") as empty:
        # A working folder that a job was submitted with stays: Ray takes one only.
        folder = {} if job is not None and "working_dir" in job else {"working_dir": empty}
        joined, session = ray.is_initialized(), None
        if not joined:
            if address is None and (group_limit() or _LEAST_BYTES) < _LEAST_BYTES:
                raise ResourceError(
                    f"Ray was not started: with one worker it holds some {(_RAY_BYTES + _WORKER_BYTES) / 1e9:.1f} GB. "
                    f"{memory_state()} Give it more, or use anomalydino_plugin from Python: that is one process."
                )
            try:
                context = ray.init(
                    address=address or "local",
                    include_dashboard=False if address is None else None,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    runtime_env={**folder, "env_vars": {"PYTHONWARNINGS": "ignore"}},
                )
            except ConnectionError as error:
                raise ConfigError(
                    f"no Ray cluster answers at {address!r}: {error}. Leave --ray_address out."
                ) from error
            except Exception as error:  # Ray has no class for what may go wrong while it starts
                raise ResourceError(
                    f"Ray did not start: {type(error).__name__}: {str(error).splitlines()[0][:200]} Mostly the machine "
                    f"is short of memory, or busy for longer than Ray waits (30 s). {memory_state()} {GO_ON}"
                ) from error
            if address is None:
                session = context.address_info.get("session_dir")
                _embedded.append(session)
        try:
            with _sigterm_as_ctrl_c():  # after Ray, which has a handler of its own that ends in an abort
                yield
        except BaseException:
            session = None  # its logs may be wanted
            raise
        finally:
            if not joined:
                ray.shutdown()
                _embedded.clear()
            if session is not None:  # Ray leaves a folder for each start, for ever
                shutil.rmtree(session, ignore_errors=True)


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """What schedulers send ends a run as Ctrl-C does: whole files, and a line that says how to go on."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _surrounding_job() -> dict[str, Any] | None:
    """Runtime environment of the Ray job whose driver this process is; ``None`` outside of one."""
    description = os.environ.get(_JOB_VARIABLE)
    if description is None:
        return None
    return dict(json.loads(description).get("runtime_env") or {})


def plan_resources(
    workers: int | None,
    gpus_per_worker: float | None,
    threads: int | None,
    *,
    cpus: float,
    gpus: float,
    node_cpus: int,
    nodes: int = 1,
    gpu_node_cpus: int | None = None,
    most: int | None = None,
) -> Resources:
    """Lay the encoders out on what the cluster has.

    Args:
        workers: as configured, or ``None``.
        gpus_per_worker: as configured, or ``None``.
        threads: as configured, or ``None``.
        cpus: logical CPUs of the cluster.
        gpus: GPUs of the cluster.
        node_cpus: logical CPUs of its smallest node.
        nodes: how many it has.
        gpu_node_cpus: logical CPUs of the smallest of those with GPUs; ``node_cpus`` if not given.
        most: encoders that there is memory for, where that is known; ``workers`` may exceed it.

    Raises:
        ConfigError: what was asked for cannot run; says what there is.
    """
    share = gpus_per_worker if gpus_per_worker is not None else (1.0 if gpus >= 1 else 0.0)
    most_on_gpus = int(gpus / share) if share > 0 else None
    booked = float(threads or (_GPU_ENCODER_CPUS if share > 0 else node_cpus))
    threads = threads or node_cpus
    count = workers or min(most_on_gpus or max(1, int(cpus // max(threads, 1))), most or sys.maxsize)
    if share > 0 and count * share > gpus:
        raise ConfigError(
            f"--num_workers={count} with --gpus_per_worker={share:g} needs {count * share:g} GPUs; the cluster has "
            f"{gpus:g}. Lower one of them."
        )
    roomy = (gpu_node_cpus or node_cpus) >= _GPU_NODE_CPUS and node_cpus > _GPU_DECODE_CPUS + WRITE_CPUS
    decode_cpus = _GPU_DECODE_CPUS if share > 0 and roomy else DECODE_CPUS
    side_work = decode_cpus + WRITE_CPUS
    spare = max(1.0, side_work) if cpus > 1 else side_work
    # On every node, not just somewhere: when one is lost, encoders that fill the others would wait for ever for the
    # reading and writing that no node has room for.
    on_a_node = (node_cpus - side_work) / math.ceil(count / nodes)
    # Ray counts in ten-thousandths; rounding down keeps the sum below what there is.
    per_worker = int(10_000 * min(booked, (cpus - spare) / count, on_a_node)) / 10_000
    if per_worker < 0.01:
        raise ConfigError(
            f"--num_workers={count} on {cpus:g} CPUs leaves {per_worker:g} CPU for each encoder. Lower --num_workers."
        )
    return Resources(count, per_worker, share, threads, decode_cpus)


def cluster_resources(workers: int | None, gpus_per_worker: float | None, threads: int | None) -> Resources:
    """``plan_resources`` on the connected cluster."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return plan_resources(
        workers,
        gpus_per_worker,
        threads,
        cpus=sum(node.get("CPU", 0.0) for node in alive),
        gpus=sum(node.get("GPU", 0.0) for node in alive),
        node_cpus=int(min((node["CPU"] for node in alive if node.get("CPU")), default=1)),
        gpu_node_cpus=int(min((node["CPU"] for node in alive if node.get("CPU") and node.get("GPU")), default=0)),
        nodes=sum(1 for node in alive if node.get("CPU")) or 1,
        most=workers_that_fit(group_limit()) if _embedded else None,
    )


def workers_that_fit(limit: int | None) -> int | None:
    """Encoders that an embedded Ray has memory for.

    Args:
        limit: bytes of this process's control group, which the workers will share; ``None`` for no limit.
    """
    return None if limit is None else max(1, int((limit - _RAY_BYTES) / _WORKER_BYTES))


def check_jobs_package() -> None:
    """Make sure that the ``jobs`` in use is ours; call it in every process.

    Raises:
        ConfigError: another package of that name hides it.
    """
    import anomalydino_plugin
    import jobs

    ours = Path(anomalydino_plugin.__file__).resolve().parent.parent / "jobs"
    found = Path(jobs.__file__ or "").resolve().parent
    if not (found / "schema.py").is_file() or not (found / "dataflow.py").is_file():
        raise ConfigError(f"the package 'jobs' found is {str(found)!r}: expected {str(ours)!r}. Rename the other one.")
