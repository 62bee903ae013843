"""Runs in one process, again and again: no file, thread, child process or temporary file is left.

Ray itself leaves a thread, and sockets whose connection has ended, each time it is started and shut down (2.58.0), so
that runs are counted on one Ray, where nothing may be left, and runs that each start one beside a bare Ray.
"""

import gc
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from generated import TINY, save, textured
from process_state import closed_connections, own_children, own_files, own_threads

from anomalydino_plugin import BatchedModel, FewShotModel
from jobs.cli import main

ENCODING = ["--backbone", TINY, "--weights", "random:0", "--resolution", "64", "--masking", "off", "--threads", "1"]
TRIES = 100  # a tenth of a second each: Ray's processes take a moment to go


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Images, and a folder of our own for temporary files."""
    for index in range(3):
        save(tmp_path / "images" / "train" / "good" / f"{index}.png", textured(100 + index))
        save(tmp_path / "images" / "test" / "good" / f"{index}.png", textured(index))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path


def held(place: Path) -> tuple[int, int, int, int]:
    """Files, threads, child processes, temporary files."""
    gc.collect()
    temporary = list((place / "temporary").rglob("*"))
    return len(own_files()), own_threads(), len(own_children()), len(temporary)


def settled(place: Path, allowed: tuple[int, ...]) -> tuple[int, int, int, int]:
    """What is held once what was stopped has gone."""
    for _ in range(TRIES):
        found = held(place)
        if all(own <= most for own, most in zip(found, allowed, strict=True)):
            break
        time.sleep(0.1)
    return found


def score_by_api(place: Path) -> None:
    from anomalydino_plugin import load_backbone

    files = sorted((place / "images").rglob("*.png"))
    model = FewShotModel(load_backbone(TINY, "random:0"), resolution=64).fit(files[:1])
    model.score(files[1])
    BatchedModel(model.backbone, resolution=64, memory_budget=0, spill_folder=str(place / "temporary")).score_set(files)


def score_by_command(place: Path, number: int) -> None:
    assert main(["score", "--images", str(place / "images"), "--out", str(place / f"out{number}"), *ENCODING]) == 0


def sessions() -> set[str]:
    """Ray's folders of logs: those of embedded runs that ended well go, others are kept for whoever looks into it."""
    return {path.name for path in Path("/tmp/ray").glob("session_2*")}  # noqa: S108


def check_api(place: Path, runs: int) -> None:
    score_by_api(place)  # what is loaded once stays: libraries, pools of threads
    before = held(place)
    for _ in range(runs):
        score_by_api(place)
    after = settled(place, before)
    assert all(own <= earlier for own, earlier in zip(after, before, strict=True)), (before, after, own_files())


@pytest.fixture
def one_ray() -> Iterator[None]:
    """As a service would hold it: ``connect`` joins what it finds started."""
    import ray

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


def bare_ray(place: Path) -> None:
    """What a run asks of Ray, with nothing of ours: start, an actor's blocks, shut down."""
    import ray

    class Same:
        def __call__(self, batch):
            return batch

    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"working_dir": str(place / "temporary")},
    )
    blocks = ray.data.range(8, override_num_blocks=4).map_batches(Same, concurrency=1, num_cpus=0.5)
    rows = [ray.get(ref).num_rows for bundle in blocks.iter_internal_ref_bundles() for ref in bundle.block_refs]
    assert sum(rows) == 8
    ray.shutdown()


def growth(place: Path, run: Callable[[int], None], runs: int) -> tuple[int, ...]:
    """What ``runs`` leave, in all, after two that load what is loaded once."""
    for number in (0, 1):
        run(number)
    time.sleep(1)
    before = held(place)
    for number in range(runs):
        run(2 + number)
    after = settled(place, before)
    return tuple(own - earlier for own, earlier in zip(after, before, strict=True))


def check_command(place: Path, runs: int) -> None:
    left = growth(place, lambda number: score_by_command(place, number), runs)
    # Ray Data's, which it does not stop where nothing is prefetched: one was left by every run.
    assert not any(thread.name == "Prefetcher" for thread in threading.enumerate())
    assert all(grown <= 0 for grown in left), (left, own_files())


def test_runs_of_the_api_leave_nothing(place):
    check_api(place, 5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_of_the_command_leave_nothing(place, one_ray):
    check_command(place, 3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_runs_that_start_ray_leave_what_ray_leaves(place):
    runs = 4
    bare = growth(place, lambda _: bare_ray(place), runs)
    closed, sessions_before = closed_connections(), sessions()
    ours = growth(place, lambda number: score_by_command(place, number), runs)
    assert ours[1] <= bare[1], "threads"
    # To Ray's processes, which have ended: their number differs from run to run, in a bare Ray as well.
    assert ours[0] <= closed_connections() - closed, (bare, ours, own_files())
    assert not any(ours[2:]), "processes, temporary files"
    assert not {name for name in sessions() - sessions_before if name.endswith(f"_{os.getpid()}")}


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_fifty_runs_leave_nothing(place, one_ray):
    check_api(place, 50)
    check_command(place, 50)
