"""The stages of the pipeline as plain functions: errors of one are handed on to the driver, which raises them."""

import pickle

import pyarrow as pa
import pytest
import ray

from anomalydino_plugin import AnomalyDINOError, InputError, ResourceError
from jobs import cluster, dataflow, task_pool
from jobs.shards import Shard
from jobs.store import Store

LAYOUT = cluster.plan_resources(1, None, 1, cpus=2, gpus=0, node_cpus=2)
SHARD = Shard("01", "000000", ())


class Body:
    """Fails when it is made, or when it works."""

    work = "playing"

    def __init__(self, fails, device):
        self.device = device
        if fails == "made":
            raise InputError("no such model")
        self.fails = fails

    def process(self, category, decoded, failures):
        if self.fails == "works":
            raise InputError("not these images")
        if self.fails == "memory":
            raise MemoryError
        return {"images": pa.table({"image_id": ["a"]})}, {"done": len(decoded), "failed": len(failures)}


@pytest.fixture(autouse=True)
def _as_many_threads_as_before(monkeypatch):
    monkeypatch.setattr(dataflow, "start_worker", lambda layout: None)


def unpacked(batch):
    return pickle.loads(batch["payload"][0].as_py())


def encoded(fails, decoded=("image",)):
    stage = dataflow._EncodeStage(Body, (fails,), LAYOUT)
    return unpacked(stage(dataflow._packed((SHARD, decoded, [], 0.5))))


def test_a_shard_goes_on_with_its_tables_and_record():
    shard, streams, record = encoded(None)
    assert shard == SHARD
    assert pa.ipc.open_stream(streams["images"]).read_all().to_pydict() == {"image_id": ["a"]}
    assert (record["done"], record["failed"], record["decode_seconds"]) == (1, 0, 0.5)


@pytest.mark.parametrize(
    ("fails", "kind", "message"),
    [
        ("made", InputError, "no such model"),
        ("works", InputError, "not these images"),
        ("memory", ResourceError, "encoding shard 000000 of '01'.*memory ran out"),
    ],
)
def test_what_an_encoder_raises_is_handed_on(fails, kind, message):
    _, error, record = encoded(fails)
    assert isinstance(error, kind)
    assert record == {}
    with pytest.raises(kind, match=message):
        raise error


def test_what_decoding_raised_is_not_encoded():
    earlier = ResourceError("disk full")
    _, error, record = encoded(None, earlier)
    assert (str(error), record) == ("disk full", {})


def test_an_error_is_written_as_a_row_and_nothing_else(tmp_path):
    batch = dataflow._packed((SHARD, ResourceError("disk full"), {}))
    (row,) = dataflow._write_stage(batch, Store(tmp_path, "extract")).to_pylist()
    assert (row["category"], row["shard"], row["done"], row["failed"]) == ("01", "000000", 0, 0)
    error = pickle.loads(row["error"])
    assert isinstance(error, AnomalyDINOError)
    assert str(error) == "disk full"
    assert list(tmp_path.iterdir()) == []


def test_a_pool_says_what_it_did_when_its_workers_are_lost(monkeypatch):
    def lost(_):
        raise ray.exceptions.WorkerCrashedError

    monkeypatch.setattr(ray, "get", lost)
    with pytest.raises(ResourceError, match="playing: worker processes ended before their work was done"):
        task_pool._result(None, Body)

    def ours(_):
        raise ray.exceptions.RayTaskError("f", "a traceback", ValueError("ours"))

    monkeypatch.setattr(ray, "get", ours)
    with pytest.raises(ray.exceptions.RayTaskError, match="a traceback"):
        task_pool._result(None, Body)
