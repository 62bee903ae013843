"""A command of ours in one plain process: the very functions that Ray would call in its workers, called one by one.

    python tests/faults/without_ray.py score --images ... --out ...

Ray maps many gigabytes of address space that it never touches, so that `ulimit -v` says nothing of the work itself.
Environment: CEILING (bytes of address space, set once the modules are loaded), PEAK (a file that gets the most address
space used).
"""

import contextlib
import os
import pickle
import re
import resource
import sys
from pathlib import Path

import pyarrow as pa

from jobs import cli, cluster, dataflow, fit, match, score, stage, task_pool

LAYOUT = cluster.Resources(1, 1.0, 0.0, 1)  # one thread: libgomp ends a process that cannot start another one


def run_pipeline(pipeline, shards):
    worker = dataflow._EncodeStage(pipeline.body, pipeline.arguments, LAYOUT)
    sizes = (pipeline.resolution, pipeline.patch_size, pipeline.max_pixels)
    for shard in shards:
        batch = dataflow._decode_stage(pa.table({"payload": [pickle.dumps(shard)]}), *sizes)
        for row in dataflow._write_stage(worker(batch), pipeline.store).to_pylist():
            if row["error"] is not None:
                raise pickle.loads(row["error"])
            yield row


def run_tasks(body, arguments, items, layout):
    key = f"{id(items)}"
    for item in items:
        result = task_pool._do(key, (body, tuple(arguments), layout), item)
        if isinstance(result, Exception):
            raise result
        yield item, result


def install() -> None:
    """Load what the stages use, and put plain calls in Ray's place."""
    import torch  # noqa: F401  # loaded before the ceiling comes: what is tried is the work
    from timm import create_model  # noqa: F401

    from jobs import bank_builder, batched, evaluate, extract, matcher, scorer  # noqa: F401
    from jobs.report import command  # noqa: F401

    cluster.connect = lambda address: contextlib.nullcontext()
    cluster.cluster_resources = lambda *asked: LAYOUT
    dataflow.run = run_pipeline
    for module in (fit, match, score, stage):
        module.run_tasks = run_tasks


def main() -> int:
    install()
    if ceiling := os.environ.get("CEILING"):
        used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + int(ceiling),) * 2)
    loaded = re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    status = cli.main()
    if peak := os.environ.get("PEAK"):
        most = re.search(r"VmPeak:\s+(\d+)", Path("/proc/self/status").read_text())[1]
        Path(peak).write_text(str(1024 * (int(most) - int(loaded))))
    return status


if __name__ == "__main__":
    sys.exit(main())
