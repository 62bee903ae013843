import json
import signal
import threading

import pytest
import ray

import jobs
from anomalydino_plugin import ConfigError, ResourceError
from jobs import cluster
from jobs.cluster import DECODE_CPUS, WRITE_CPUS, plan_resources


@pytest.mark.parametrize("cpus", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("workers", [None, 1, 2, 3])
def test_a_cpu_share_stays_free_for_reading_and_writing(cpus, workers):
    plan = plan_resources(workers, None, None, cpus=cpus, gpus=0, node_cpus=cpus)
    assert plan.workers * plan.cpus_per_worker + DECODE_CPUS + WRITE_CPUS <= cpus + 1e-9
    assert plan.device == "cpu"
    assert len({plan.cpus_per_worker, DECODE_CPUS, WRITE_CPUS}) == 3  # equal shares would be fused


@pytest.mark.parametrize(("nodes", "workers"), [(3, 2), (3, 3), (4, 8)])
def test_a_lost_node_leaves_room_for_reading_and_writing(nodes, workers):
    """Encoders that filled their nodes made a run wait for ever once the node with the free CPU was gone."""
    plan = plan_resources(workers, None, 1, cpus=2 * nodes, gpus=0, node_cpus=2, nodes=nodes)
    on_a_node = -(-workers // nodes) * plan.cpus_per_worker
    assert on_a_node + DECODE_CPUS + WRITE_CPUS <= 2 + 1e-9


def test_threads_do_not_depend_on_the_number_of_workers():
    assert {plan_resources(count, None, None, cpus=8, gpus=0, node_cpus=8).threads for count in (1, 2, 3)} == {8}


def test_one_worker_for_each_gpu():
    plan = plan_resources(None, None, None, cpus=16, gpus=4, node_cpus=16)
    assert (plan.workers, plan.gpus_per_worker, plan.device) == (4, 1.0, "cuda")
    assert plan_resources(None, 0.5, None, cpus=16, gpus=4, node_cpus=16).workers == 8


@pytest.mark.parametrize(("share", "encoders"), [(1.0, 1), (0.5, 2), (0.125, 8)])
def test_encoders_on_a_gpu_leave_the_cpus_to_decoding(share, encoders):
    """One that booked all CPUs but one left room for three decoding tasks."""
    plan = plan_resources(None, share, None, cpus=16, gpus=1, node_cpus=16)
    assert plan.workers == encoders
    assert (16 - encoders * plan.cpus_per_worker - WRITE_CPUS) // plan.decode_cpus >= 15 - encoders
    assert len({plan.cpus_per_worker, plan.decode_cpus, WRITE_CPUS}) == 3
    assert plan_resources(None, share, 2, cpus=32, gpus=1, node_cpus=32).cpus_per_worker == 2


def test_a_small_node_beside_those_with_gpus_does_not_count():
    plan = plan_resources(None, None, None, cpus=66, gpus=8, node_cpus=2, gpu_node_cpus=64, nodes=2)
    assert plan.decode_cpus == plan_resources(None, None, None, cpus=64, gpus=8, node_cpus=64).decode_cpus > DECODE_CPUS


def test_a_node_of_one_cpu_beside_them_keeps_room_for_its_share():
    plan = plan_resources(None, None, None, cpus=65, gpus=8, node_cpus=1, gpu_node_cpus=64, nodes=2)
    assert plan.workers == 8
    assert 0 < 4 * plan.cpus_per_worker + plan.decode_cpus + WRITE_CPUS <= 1 + 1e-9


@pytest.mark.parametrize("cpus", [1, 2, 3, 4])
def test_few_cpus_beside_a_gpu_hold_an_encoder_and_a_decoding_task(cpus):
    plan = plan_resources(None, None, None, cpus=cpus, gpus=1, node_cpus=cpus)
    assert plan.cpus_per_worker + plan.decode_cpus + WRITE_CPUS <= cpus + 1e-9


def test_refused_with_numbers():
    with pytest.raises(ConfigError, match="needs 3 GPUs; the cluster has 1"):
        plan_resources(3, 1.0, None, cpus=8, gpus=1, node_cpus=8)
    with pytest.raises(ConfigError, match="Lower --num_workers"):
        plan_resources(1000, None, None, cpus=2, gpus=0, node_cpus=2)


@pytest.mark.parametrize("message", ["The current node timed out during startup. This could ...", "no room"])
def test_a_ray_that_does_not_start_is_told_in_one_line(monkeypatch, message):
    import ray

    def init(**_):
        raise Exception(message)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ResourceError, match="Ray did not start: .*Repeat the command"), cluster.connect(None):
        pass


@pytest.mark.parametrize(("limit", "workers"), [(None, None), (1.1e9, 1), (1.9e9, 1), (4e9, 4)])
def test_workers_are_as_many_as_the_control_group_has_memory_for(limit, workers):
    assert cluster.workers_that_fit(limit) == workers


def test_memory_lowers_the_number_of_workers_that_is_found_and_none_that_is_asked_for():
    assert plan_resources(None, None, 1, cpus=8, gpus=0, node_cpus=8).workers == 8
    assert plan_resources(None, None, 1, cpus=8, gpus=0, node_cpus=8, most=2).workers == 2
    assert plan_resources(4, None, 1, cpus=8, gpus=0, node_cpus=8, most=2).workers == 4


def test_ray_is_not_started_where_its_control_group_has_no_memory_for_it(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("started"))
    monkeypatch.setattr(cluster, "group_limit", lambda: 700_000_000)
    with pytest.raises(ResourceError, match=r"one worker it holds some 1\.9 GB.*Give it more"), cluster.connect(None):
        pass


def test_another_package_called_jobs_is_pointed_out(tmp_path, monkeypatch):
    (tmp_path / "jobs.py").write_text("")
    monkeypatch.setattr(jobs, "__file__", str(tmp_path / "jobs.py"))
    with pytest.raises(ConfigError, match=r"the package 'jobs' found is .*Rename the other one"):
        cluster.check_jobs_package()


def test_outside_the_main_thread_signals_are_left_alone():
    before, found = signal.getsignal(signal.SIGTERM), []

    def look():
        with cluster._sigterm_as_ctrl_c():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [before]


def test_inside_a_ray_job_its_cluster_is_joined(monkeypatch):
    seen = {}

    def start(**settings):
        seen.update(settings)

    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"working_dir": "gcs://x.zip"}}))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "shutdown", lambda: seen.update(left=True))
    with cluster.connect(None):
        assert cluster._embedded == []
    assert seen["address"] == "auto"
    assert "working_dir" not in seen["runtime_env"], "the job's own stays"
    assert seen["left"]
