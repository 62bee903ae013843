"""Independent pieces of work as Ray tasks: tasks, not actors, so that a lost node's work goes to any other one.

A worker process keeps the object that does the work (a model, a bank) between tasks.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from anomalydino_plugin import AnomalyDINOError
from jobs import cluster
from jobs.resources import lost_workers, stated
from jobs.worker import start_worker

_LESS_MEMORY = "Give it more, or fewer --num_workers."
_kept: dict[str, Any] = {}  # in a worker process: the object in use


def run_tasks(
    body: type, arguments: Sequence[Any], items: Sequence[Any], layout: cluster.Resources
) -> Iterator[tuple[Any, Any]]:
    """Do pieces of work, as many at a time as there are workers.

    Args:
        body: class with a method ``run(item)``, and what it does as ``work``; made once in each worker process.
        arguments: of its constructor, before the device.
        items: pieces of work.
        layout: resources of a worker.

    Yields:
        Piece and result, in the order they are finished.

    Raises:
        AnomalyDINOError: that a piece raised.
    """
    import ray

    if not items:
        return
    key = uuid.uuid4().hex  # of this call: a worker process may have served another one
    settings = ray.put((body, tuple(arguments), layout))
    task = ray.remote(num_cpus=layout.cpus_per_worker, num_gpus=layout.gpus_per_worker, max_retries=cluster.LOST)(_do)
    waiting, running = list(reversed(items)), dict[Any, Any]()
    while waiting or running:
        while waiting and len(running) < layout.workers:
            item = waiting.pop()
            running[task.remote(key, settings, item)] = item
        (ready,), _ = ray.wait(list(running), num_returns=1)
        result = _result(ready, body)
        if isinstance(result, AnomalyDINOError):
            raise result  # a message for the user, not a traceback of a worker
        yield running.pop(ready), result


def _result(ready: Any, body: type) -> Any:
    import ray

    try:
        return ray.get(ready)
    except ray.exceptions.RayError as error:
        known = lost_workers(error, _work(body), _LESS_MEMORY)
        if known is None:
            raise
        raise known from error


def _work(body: type) -> str:
    """What a body of work does, for messages."""
    return str(getattr(body, "work", body.__name__))


def _do(key: str, settings: tuple[type, tuple[Any, ...], cluster.Resources], item: Any) -> Any:
    try:
        body, arguments, layout = settings
        with stated(_work(body), _LESS_MEMORY):
            if key not in _kept:
                start_worker(layout)
                _kept.clear()  # one model at a time
                _kept[key] = body(*arguments, layout.device)
            return _kept[key].run(item)
    except AnomalyDINOError as error:
        return error
