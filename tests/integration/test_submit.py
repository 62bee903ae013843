"""`anomalydino submit` and `--ray_address` against a real head node on loopback addresses."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from generated import TINY

BIN = Path(sys.executable).parent
HOST = "127.0.0.2"
ROOT = Path(__file__).parents[2]
SETTINGS = {"backbone": TINY, "weights": "random:0", "resolution": 64, "masking": "off", "threads": 1, "shard-size": 2}
FLAGS = [f"--{name}={value}" for name, value in SETTINGS.items()]
pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind((HOST, 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """Environment that reaches a head node of two CPUs; started in a folder that holds a stranger's `jobs`."""
    port, dashboard, client, agent = free_ports(4)
    folder = tmp_path_factory.mktemp("head")
    stranger(folder)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # as on nodes where our command is installed
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    # Not 127.0.0.1, for which Ray takes the machine's own address.
    session = Path(tempfile.mkdtemp(prefix="ad-", dir="/tmp"))  # short: a socket's path has at most 107 characters
    command = [
        *(str(BIN / "ray"), "start", "--head", f"--node-ip-address={HOST}", f"--port={port}", "--num-cpus=2"),
        *("--include-dashboard=true", f"--dashboard-host={HOST}", f"--dashboard-port={dashboard}", "--num-gpus=0"),
        *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}", f"--temp-dir={session}"),
    ]
    address = f"http://{HOST}:{dashboard}"
    try:
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, timeout=200)
        wait_for_jobs_api(address)
        yield {**environment, "RAY_API_SERVER_ADDRESS": address, "TEST_RAY_PORT": str(port)}
    finally:
        stop(session)
        shutil.rmtree(session, ignore_errors=True)


def stop(session: Path) -> None:
    """End the processes of one cluster; `ray stop` would end all clusters of the machine."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if process.name.isdecimal() and f"{session}/".encode() in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), number)
        time.sleep(2)


def wait_for_jobs_api(address: str) -> None:
    from ray.job_submission import JobSubmissionClient

    deadline = time.monotonic() + 60
    while True:
        try:
            JobSubmissionClient(address).list_jobs()
            return
        except (ConnectionError, RuntimeError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def stranger(folder: Path) -> None:
    (folder / "jobs").mkdir()
    (folder / "jobs" / "__init__.py").write_text("raise RuntimeError('a stranger')")


def anomalydino(*words: object, head: dict[str, str], cwd: Path) -> subprocess.CompletedProcess:
    command = [str(BIN / "anomalydino"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, env=head, timeout=280)


@pytest.fixture(scope="module")
def submitted(head, mvtec_tree, tmp_path_factory):
    """A job submitted with relative paths, from a folder that holds a stranger's `jobs`."""
    folder = tmp_path_factory.mktemp("user")
    stranger(folder)
    (folder / "parts").symlink_to(mvtec_tree / "01")
    words = ["submit", "--", "score", "--images", "parts", "--out", "out", *FLAGS]
    return folder, words, anomalydino(*words, head=head, cwd=folder)


def test_a_job_leaves_scores_and_its_log_is_followed(submitted):
    folder, _, done = submitted
    assert done.returncode == 0, done.stdout + done.stderr
    assert "submitted job anomalydino-score-" in done.stdout
    assert "6 images done, 0 failed" in done.stdout  # printed by the job
    assert "succeeded" in done.stdout
    assert "stranger" not in done.stdout + done.stderr
    job = json.loads((folder / "out" / "job.json").read_text())["stages"]["score"]
    assert job["config"]["images"] == str((folder / "parts").resolve())
    assert job["counts"]["done"] == 6


def test_submitting_again_resumes(submitted, head):
    folder, words, first = submitted
    (folder / "out" / ".state" / "score" / "done" / folder_of(folder) / "000001.json").unlink()
    again = anomalydino(*words, head=head, cwd=folder)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{job_id(first)}-2 (attempt 2; finished shards are skipped)" in again.stdout
    assert "resuming: 2 of 3 shards are finished" in again.stdout


def folder_of(folder: Path) -> str:
    return next((folder / "out" / ".state" / "score" / "done").iterdir()).name


def job_id(done: subprocess.CompletedProcess) -> str:
    return done.stdout.partition("submitted job ")[2].split()[0]


def test_the_exit_status_of_a_failing_job(head, tmp_path):
    done = anomalydino("submit", "--", "evaluate", tmp_path / "none", head=head, cwd=tmp_path)
    assert done.returncode == 1
    assert "no scores under" in done.stdout  # the job's own message
    assert "failed with exit status 1. Submit it again to go on." in done.stderr


def test_a_command_that_the_nodes_lack(head, monkeypatch):
    from jobs import submit

    command = submit.JobCommand(("evaluate", "x"))
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head["RAY_API_SERVER_ADDRESS"])
    client = submit._client(head["RAY_API_SERVER_ADDRESS"])
    job = client.submit_job(entrypoint="no-such-command", submission_id=command.submission_id)
    details = submit._ended(client, job)
    assert submit._status(details, job, None) == 127


def test_interrupted_while_following_and_followed_again(head, tmp_path, mvtec_tree):
    words = ["submit", "--", "score", f"--images={mvtec_tree}", f"--out={tmp_path / 'out'}", *FLAGS]
    process = subprocess.Popen(
        [str(BIN / "anomalydino"), *words],
        env=head,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "submitted job" in process.stdout.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.count("\n") == 1
    assert "goes on. Follow it: repeat the command" in error
    assert f"ray job stop --address http://{HOST}:" in error
    again = anomalydino(*words, head=head, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "is running already: following it" in again.stdout
    assert "12 images done, 0 failed" in again.stdout


def test_the_code_may_come_as_a_wheel(head, tmp_path, mvtec_tree):
    """A wheel of another version than what is installed: the job must use the wheel's."""
    source = tmp_path / "source"
    skipped = shutil.ignore_patterns(".git", ".venv", "build", "docs", "tests", "*.egg-info", ".*_cache", "results")
    shutil.copytree(ROOT, source, ignore=skipped)
    project = source / "pyproject.toml"
    project.write_text(project.read_text().replace('version = "0.1.0"', 'version = "0.1.0+wheel"', 1))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist")]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").iterdir()
    out = tmp_path / "out"
    words = ["submit", "--wheel", wheel, "--", "score", "--images", mvtec_tree / "01", "--out", out, *FLAGS]
    done = anomalydino(*words, head=head, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    job = json.loads((out / "job.json").read_text())["stages"]["score"]
    assert job["versions"]["anomalydino-plugin"] == "0.1.0+wheel"
    assert job["counts"]["done"] == 6


def test_a_pipeline_may_be_submitted(head, tmp_path, mvtec_tree):
    (tmp_path / "images").symlink_to(mvtec_tree / "01")
    (tmp_path / "stages.yaml").write_text(
        f"defaults: {{out: out, backbone: {TINY}, weights: 'random:0', resolution: 64, threads: 1, masking: off}}\n"
        "stages: [extract: {images: images}, match: {embeddings: out}, evaluate]\n"
    )
    done = anomalydino("submit", "--", "run", "stages.yaml", head=head, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stage 3 of 3: evaluate" in done.stdout
    assert set(json.loads((tmp_path / "out" / "job.json").read_text())["stages"]) == {"extract", "match"}


def test_a_command_joins_the_cluster_by_address(head, tmp_path, mvtec_tree):
    address = f"--ray_address={HOST}:{head['TEST_RAY_PORT']}"
    words = ["score", address, f"--images={mvtec_tree / '01'}", f"--out={tmp_path / 'out'}", *FLAGS]
    done = anomalydino(*words, head=head, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 images done" in done.stdout
