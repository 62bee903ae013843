"""Runs in one process, again and again: no file, thread, child process or temporary file is left."""

import gc
import tempfile
import threading
import time
from pathlib import Path

import pytest
from generated import TINY, save, textured
from process_state import own_children, own_files, own_threads

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
    assert settled(place, before) <= before, own_files()


def check_command(place: Path, runs: int) -> None:
    score_by_command(place, 0)
    # Ray Data's, which it does not stop where nothing is prefetched: one was left by every run.
    assert not any(thread.name == "Prefetcher" for thread in threading.enumerate())
    # Ray's client keeps a few threads and sockets for the life of the process: the second run may add, later ones not.
    score_by_command(place, 1)
    time.sleep(1)
    before = held(place)
    for number in range(runs):
        score_by_command(place, 2 + number)
    after = settled(place, before)
    assert all(own <= most for own, most in zip(after, before, strict=True)), (before, after, own_files())
    assert after[2] == 0, own_children()
    assert after[3] == 0


def test_runs_of_the_api_leave_nothing(place):
    check_api(place, 5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_of_the_command_leave_nothing(place):
    import os

    before = sessions()
    check_command(place, 3)
    own = {name for name in sessions() - before if name.endswith(f"_{os.getpid()}")}
    assert not own


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_fifty_runs_leave_nothing(place):
    check_api(place, 50)
    check_command(place, 50)
