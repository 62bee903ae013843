"""Memory, disk, files and the clock run out or jump in the middle of a run: one line, and nothing committed is lost."""

import errno
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from generated import TINY, save, textured

from anomalydino_plugin import ImageError, MemoryBank, ResourceError, read_image
from jobs import resources
from jobs.bank_builder import write_bank
from jobs.cli import main
from jobs.decode import decode
from jobs.filesystem import Folder
from jobs.inputs import ImageRecord
from jobs.store import Store

WITHOUT_RAY = str(Path(__file__).parents[1] / "faults" / "without_ray.py")


@pytest.fixture
def images(tmp_path) -> Path:
    for index in range(2):
        save(tmp_path / "images" / "train" / "good" / f"{index}.png", textured(100 + index))
    for index in range(6):
        save(tmp_path / "images" / "test" / "good" / f"{index}.png", textured(index))
    return tmp_path / "images"


def plain(images: Path, out: Path, **env: str) -> subprocess.CompletedProcess:
    """`score` in one process of its own, without Ray."""
    encoding = ["--backbone", TINY, "--weights", "random:0", "--resolution", "160", "--masking", "off"]
    words = ["score", "--images", str(images), "--out", str(out), "--shard-size", "2", *encoding]
    return subprocess.run(
        [sys.executable, WITHOUT_RAY, *words], capture_output=True, text=True, env={**os.environ, **env}, check=False
    )


def rows(out: Path) -> list[dict]:
    return pq.read_table(next((out / "scores").rglob("*.parquet"))).sort_by("image_id").to_pylist()


@pytest.mark.thorough
def test_a_ceiling_of_memory_is_named_and_the_run_goes_on_without(images, tmp_path):
    limited = plain(images, tmp_path / "out", CEILING=str(20_000_000))
    assert limited.returncode == 1, limited.stderr
    last = limited.stderr.strip().splitlines()[-1]
    assert last.startswith("anomalydino score: ")
    assert "memory ran out" in last
    assert "of address space (`ulimit -v`)" in last
    assert "Repeat the command to go on." in last
    assert "Traceback" not in limited.stderr
    assert plain(images, tmp_path / "out").returncode == 0
    assert plain(images, tmp_path / "undisturbed").returncode == 0
    assert rows(tmp_path / "out") == rows(tmp_path / "undisturbed")
    assert main(["verify", str(tmp_path / "out")]) == 0


def table(count: int) -> pa.Table:
    from jobs import schema

    random = os.urandom(count).hex()
    row = {"image_id": random, "uri": "a", "category": "nut", "stage": "decode", "error_type": "e", "message": "m"}
    return pa.Table.from_pylist([row], schema=schema.FAILURES)


@pytest.fixture
def small_files():
    """No file may grow beyond 64 kB; Python ignores the signal, so that the write fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_for_a_file_is_one_line_and_leaves_nothing_half(tmp_path, small_files):
    store = Store(tmp_path / "out", "score")
    store.claim("s", ["failures"], {})
    record = {"done": 0, "failed": 1, "seconds": 0.0}
    store.commit("nut", "000000", {"failures": table(100)}, record)
    with pytest.raises(ResourceError, match=r"cannot write to '.*out': .*[Ff]ile too large.*Repeat the command"):
        store.commit("nut", "000001", {"failures": table(400_000)}, record)
    assert store.done_shards() == {("nut", "000000")}
    assert not [name for name in store.folder.files() if name.endswith(".tmp")]


def test_no_room_for_a_bank(tmp_path, small_files):
    import torch

    rows_ = torch.nn.functional.normalize(torch.ones(4000, 64), dim=1)
    sources, kept = torch.zeros(4000, 4, dtype=torch.int32), torch.ones(4000, dtype=torch.bool)
    bank = MemoryBank(rows_, sources, kept, ("a",), (0.0,), ((64, 64),), {})
    with pytest.raises(ResourceError, match=r"cannot write memory bank '.*bank.safetensors'.*Free space"):
        bank.save(tmp_path / "bank.safetensors")
    assert not list(tmp_path.iterdir())
    told = r"cannot write to '.*out': memory bank 'banks/nut.safetensors': .*ile too large.*Repeat the command"
    with pytest.raises(ResourceError, match=told):
        write_bank(Store(tmp_path / "out", "fit"), "nut", bank)
    assert not list((tmp_path / "out").rglob("*.*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give its rights away")
def test_an_output_that_became_read_only(tmp_path):
    store = Store(tmp_path / "out", "score")
    store.claim("s", ["failures"], {})
    for parent in [tmp_path, *tmp_path.parents][:3]:
        parent.chmod(0o755)
    os.seteuid(65_534)
    try:
        with pytest.raises(ResourceError, match="Permission denied. Make it writable"):
            store.commit("nut", "000000", {"failures": table(10)}, {"done": 0, "failed": 1, "seconds": 0.0})
        with pytest.raises(ResourceError, match="Permission denied. Make it writable"), store.exclusive():
            pass
    finally:
        os.seteuid(0)
    assert not store.done_shards()


@pytest.mark.thorough
def test_a_second_run_on_the_same_output_refuses(images, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["fit", "--images", str(images), "--out", str(out), "--backbone", TINY, "--weights", "random:0"]
    first = subprocess.run([sys.executable, WITHOUT_RAY, *words], capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    banks = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    with Store(out, "fit").exclusive():
        second = subprocess.run([sys.executable, WITHOUT_RAY, *words], capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert "another run works on output folder" in second.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == banks != {}


def test_too_many_open_files_are_no_fault_of_an_image(tmp_path, monkeypatch):
    def full(self):
        raise OSError(errno.EMFILE, "Too many open files")

    save(tmp_path / "a.png", textured(1))
    monkeypatch.setattr(Path, "read_bytes", full)
    with pytest.raises(ResourceError, match="Too many open files"):
        decode([ImageRecord("1", str(tmp_path / "a.png"), "nut")], 64, 16)


def test_memory_that_runs_out_while_decoding_is_no_fault_of_an_image(tmp_path, monkeypatch):
    from PIL import ImageOps

    def full(image):
        raise MemoryError

    save(tmp_path / "a.png", textured(1))
    monkeypatch.setattr(ImageOps, "exif_transpose", full)
    with pytest.raises(MemoryError):
        decode([ImageRecord("1", str(tmp_path / "a.png"), "nut")], 64, 16)
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda image: 1 / 0)
    with pytest.raises(ImageError):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "memory ran out .MemoryError"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "memory ran out"),
        (RuntimeError("can't start new thread"), "memory ran out"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory ran out"),
        (ImportError("libx.so: failed to map segment: Cannot allocate memory"), "memory ran out"),
        (ImportError("libgomp.so.1: failed to map segment from shared object"), "memory ran out"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device. Free space"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files, the limit is"),
    ],
)
def test_what_ran_out_is_told_with_a_remedy(error, says):
    with pytest.raises(ResourceError, match=says) as found, resources.stated("scoring", "Lower it."):
        raise error
    assert str(found.value).startswith("scoring: ")
    assert str(found.value).endswith(resources.GO_ON)


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_memory_that_is_missing_for_the_message_too(monkeypatch, error):
    def fails():
        raise error

    monkeypatch.setattr(resources, "group_limit", fails)
    found = resources.as_resource_error(MemoryError(), "scoring")
    assert str(found) == (
        f"scoring: memory ran out (MemoryError). Too little is left to tell how much there was. {resources.GO_ON}"
    )


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="a bug"), resources.stated("scoring"):
        raise RuntimeError("a bug")
    with pytest.raises(ImportError), resources.stated("scoring"):  # a folder mounted noexec
        raise ImportError("libgomp.so.1: failed to map segment from shared object: Operation not permitted")
    with pytest.raises(FileNotFoundError), resources.stated("scoring"):
        raise FileNotFoundError(errno.ENOENT, "No such file")
    assert resources.cannot_write(FileNotFoundError(errno.ENOENT, "No such file"), "out") is None


def test_limits_of_control_groups(tmp_path, monkeypatch):
    inner = tmp_path / "memory" / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "memory.limit_in_bytes").write_text(str(1 << 62))
    (tmp_path / "memory" / "a" / "memory.limit_in_bytes").write_text("2000000000\n")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "own").write_text("9:cpu:/x\n4:memory:/a/b\n0::/\n")
    monkeypatch.setattr(resources, "_CGROUPS", tmp_path)
    monkeypatch.setattr(resources, "_OWN_GROUPS", tmp_path / "own")
    assert resources.group_limit() == 2_000_000_000
    assert "2.00 GB of its control group" in resources.memory_state()
    (tmp_path / "memory" / "a" / "memory.limit_in_bytes").write_text(str(1 << 62))
    assert resources.group_limit() is None


def test_the_clock_decides_nothing(tmp_path, monkeypatch):
    """Files from the future and a clock that went back: what is finished stays finished, what is not is swept."""
    store = Store(tmp_path / "out", "score")
    monkeypatch.setattr(time, "time", lambda: 4e9)
    store.claim("s", ["failures"], {})
    store.commit("nut", "000000", {"failures": table(10)}, {"done": 0, "failed": 1, "seconds": 0.0})
    monkeypatch.setattr(time, "time", lambda: 1e6)
    for path in (tmp_path / "out").rglob("*"):
        os.utime(path, (5e9, 5e9))
    again = Store(tmp_path / "out", "score")
    again.claim("s", ["failures"], {})
    assert again.done_shards() == {("nut", "000000")}
    left = tmp_path / "out" / "failures" / "score-nut-000007.parquet"
    left.write_bytes(b"left")
    os.utime(left, (6e9, 6e9))
    assert again.sweep() == ["failures/score-nut-000007.parquet"]
    assert Folder(tmp_path / "out").has("failures/score-nut-000000.parquet")


def test_workers_that_ray_lost_are_told_in_one_line():
    from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError

    for error in (WorkerCrashedError(), OutOfMemoryError("killed")):
        found = resources.lost_workers(error, "matching", "Fewer workers.")
        assert re.match(r"matching: worker processes ended .*want of memory.*Fewer workers\. What is", str(found))
    failed = RayTaskError("work", "Traceback ...", MemoryError("no"))
    assert "memory ran out (MemoryError: no)" in str(resources.lost_workers(failed, "matching"))
    assert resources.lost_workers(RayTaskError("work", "Traceback ...", KeyError("a bug")), "matching") is None
    assert resources.lost_workers(KeyError("a bug"), "matching") is None


def test_ray_that_does_not_start_is_told_in_one_line(monkeypatch):
    import ray

    from jobs import cluster

    def late(**options):
        raise Exception("The current node timed out during startup.\nMore.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", late)
    says = r"Ray did not start: .*timed out during startup.*Repeat the command"
    with pytest.raises(ResourceError, match=says), cluster.connect(None):
        pass


def test_the_command_tells_what_ran_out(monkeypatch, capsys, tmp_path):
    from jobs import verify

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(verify, "main", full)
    assert main(["verify", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"anomalydino verify: stopped: No space left on device. Free space there. {resources.GO_ON}\n"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="ceilings of address space hold on Linux")
@pytest.mark.parametrize("work", ["read_rows(pq.ParquetFile(path))", "write_tables(path.with_name('b'), [table])"])
def test_parquet_is_not_touched_where_arrow_would_end_the_process(tmp_path, work):
    """Arrow aborts, or crashes, where a thread or memory is refused; in `evaluate` at 127 and 139 MB it did."""
    code = f"""
import re, resource
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq
from jobs.parquet import read_rows, write_tables
path, table = Path({str(tmp_path / "a")!r}), pa.table({{"image_id": ["a"], "x": [1.0]}})
write_tables(path, [table])
used = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 30 * 1024**2,) * 2)
{work}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "MemoryError: 67 MB of working memory are refused" in done.stderr
