"""Workers on logical GPUs: each sees its own device. No GPU is needed: Ray counts what it is told."""

import dataclasses
import os
import sys
import time
from collections import Counter

import pytest

from anomalydino_plugin import BankError, ResourceError, WeightsError
from jobs import cluster, dataflow
from jobs.cluster import Resources
from jobs.inputs import discover
from jobs.shards import cut_shards
from jobs.store import Store
from jobs.task_pool import run_tasks

pytestmark = pytest.mark.thorough


class Reporter:
    """A body of work that says which devices its process sees."""

    def __init__(self, device):
        assert device == "cuda"

    def process(self, category, decoded, failures):
        time.sleep(0.3)  # long enough for every worker to get some
        devices = os.environ["CUDA_VISIBLE_DEVICES"]
        return {}, {"done": len(decoded), "failed": 0, "seconds": 0.0, "devices": devices, "process": os.getpid()}

    def run(self, item):
        time.sleep(0.3)
        return os.environ["CUDA_VISIBLE_DEVICES"]


@pytest.fixture(scope="module", autouse=True)
def _two_logical_gpus():
    import ray
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    ray.init(address="local", num_cpus=3, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.parametrize(("share", "workers"), [(1.0, 2), pytest.param(0.5, 4, marks=pytest.mark.slow)])
def test_encoders_see_one_device_each(mvtec_tree, tmp_path, share, workers):
    store = Store(tmp_path, "extract")
    layout = Resources(workers, 0.4, share, 1)
    pipeline = dataflow.Pipeline(Reporter, (), 64, 16, store, layout)
    list(dataflow.run(pipeline, cut_shards(discover(str(mvtec_tree)).images, 1)))
    seen = {record["process"]: record["devices"] for record in store.done()}
    assert 2 <= len(seen) <= workers  # on a busy machine one may start when the others are done
    assert set(seen.values()) == {"0", "1"}
    assert max(Counter(seen.values()).values()) <= workers // 2


def test_tasks_see_one_device_each():
    results = run_tasks(Reporter, (), list(range(6)), Resources(2, 0.4, 1.0, 1))
    assert {devices for _, devices in results} == {"0", "1"}


def test_the_layout_follows_the_gpus_found():
    assert cluster.cluster_resources(None, None, 1).workers == 2
    layout = cluster.cluster_resources(None, 0.5, 1)
    assert (layout.workers, layout.gpus_per_worker, layout.device) == (4, 0.5, "cuda")


class Refuser:
    """A body of work that cannot go on."""

    def __init__(self, device):
        pass

    def process(self, category, decoded, failures):
        raise BankError(f"no bank of {category}")

    def run(self, item):
        raise BankError(f"no bank for {item}")


class Broken:
    """A body of work that cannot be made."""

    def __init__(self, device):
        raise WeightsError("no weights here")


def test_errors_of_workers_arrive_as_they_were_raised(mvtec_tree, tmp_path):
    layout = Resources(1, 0.4, 0.0, 1)
    pipeline = dataflow.Pipeline(Refuser, (), 64, 16, Store(tmp_path, "extract"), layout)
    with pytest.raises(BankError, match="no bank of 01"):
        list(dataflow.run(pipeline, cut_shards(discover(str(mvtec_tree)).images[:1], 1)))
    pipeline = dataclasses.replace(pipeline, body=Broken)
    with pytest.raises(WeightsError, match="no weights here"):
        list(dataflow.run(pipeline, cut_shards(discover(str(mvtec_tree)).images[:1], 1)))
    with pytest.raises(BankError, match="no bank for 7"):
        list(run_tasks(Refuser, (), [7], layout))


class Killed:
    """A body of work whose process is ended while it is made, as the OOM killer does it."""

    def __init__(self, device):
        os._exit(1)


class KilledAtWork(Refuser):
    """The same, later."""

    def process(self, category, decoded, failures):
        os._exit(1)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("body", [Killed, pytest.param(KilledAtWork, marks=pytest.mark.slow)])
def test_workers_that_are_ended_again_and_again_end_the_run(mvtec_tree, tmp_path, monkeypatch, capfd, body):
    """Found with a control group of 1.5 GB: Ray made new workers for as long as one waited."""
    monkeypatch.setattr(cluster, "LOST", 1)
    pipeline = dataflow.Pipeline(body, (), 64, 16, Store(tmp_path, "extract"), Resources(1, 0.4, 0.0, 1))
    with pytest.raises(ResourceError, match="worker processes ended before their work was done, again and again"):
        list(dataflow.run(pipeline, cut_shards(discover(str(mvtec_tree)).images[:1], 1)))
    assert "Traceback" not in capfd.readouterr().err
