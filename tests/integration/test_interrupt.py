"""Ctrl-C and kill -9 of the console script in the middle of a run; the same command goes on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from generated import TINY, save, textured

LIMIT = 180
# A shell's background jobs ignore SIGINT, and so would a program that such a job starts.
PROGRAM = """
import signal, sys
from jobs.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main())
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("images") / "nut"
    for index in range(64):
        save(root / f"{index:02d}.png", textured(index))
    encoding = ["--backbone", TINY, "--weights", "random:0", "--resolution", "320", "--batch-size", "1"]
    return [sys.executable, "-c", PROGRAM, "extract", "--images", str(root), *encoding, "--shard-size", "2"]


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    subprocess.run([*command, "--out", str(out)], check=True, timeout=LIMIT)
    return out


def records(out: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((out / ".state").rglob("done/*/*.json"))]


def stopped_after(command: list[str], out: Path, shards: int, number: int) -> tuple[int, str]:
    """Send a signal once so many shards are finished; exit status and what was said."""
    process = subprocess.Popen(
        [*command, "--out", str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    until = time.monotonic() + LIMIT
    while len(list((out / ".state").rglob("done/*/*.json"))) < shards and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(number)
    said = process.communicate(timeout=LIMIT)[1]
    return process.returncode, said


def assert_equal_to(out: Path, undisturbed: Path) -> None:
    for path in sorted(undisturbed.rglob("*.parquet")):
        assert pq.read_table(out / path.relative_to(undisturbed)) == pq.read_table(path)
    assert len(list(out.rglob("*.parquet"))) == len(list(undisturbed.rglob("*.parquet")))


@pytest.mark.slow
@pytest.mark.timeout(3 * LIMIT)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_whole_files_and_says_how_to_go_on(command, undisturbed, tmp_path, number):
    out = tmp_path / "out"
    status, said = stopped_after(command, out, 3, number)
    assert status == 130, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("anomalydino extract: interrupted; committed under")
    assert "Repeat the command to go on." in last
    kept = records(out)
    assert 3 <= len(kept) < 32
    assert f"{len(kept)} shard(s), {2 * len(kept)} image(s)" in last
    listed = {file["file"] for record in kept for file in record["files"]}
    listed |= {part for record in kept for part in record["parts"].values()}
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.parquet")} == listed
    assert not list(out.rglob("*.tmp"))
    subprocess.run([*command, "--out", str(out)], check=True, timeout=LIMIT)
    assert_equal_to(out, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(3 * LIMIT)
def test_a_killed_driver_loses_nothing(command, undisturbed, tmp_path):
    out = tmp_path / "out"
    status, _ = stopped_after(command, out, 2, signal.SIGKILL)
    assert status == -signal.SIGKILL
    subprocess.run([*command, "--out", str(out)], check=True, timeout=LIMIT)
    assert_equal_to(out, undisturbed)
