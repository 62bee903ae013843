"""Set the clock back and forth between and inside runs: results, resume and `verify` must not depend on it.

    python tests/faults/clock.py --library .../libfaketime.so.1 [--stages extract score match]

libfaketime (`pip install libfaketime` brings it) shifts the time that a command sees, run without Ray
(`without_ray.py`); the monotonic clock stays. Each stage starts 400 days in the past, is killed after two shards, goes
on 400 days in the future with the clock jumping back ten years while it works, and is read back by `verify` in the past.
Its rows must be those of an undisturbed run. Rows are printed as a Markdown table; exits with 1 where one fails.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from fault_matrix import rows
from memory_ceilings import committed, make_images, words

WITHOUT_RAY = Path(__file__).parent / "without_ray.py"
PAST, FUTURE, LONG_AGO = "-400d", "+400d", "-3650d"
LIMIT = 300


def start(line: list[str], clock: Path, library: Path) -> subprocess.Popen:
    env = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    return subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def command(stage: str, root: Path, out: Path) -> list[str]:
    return [sys.executable, str(WITHOUT_RAY), *words(stage, root), "--out", str(out)]


def wait_for(process: subprocess.Popen, out: Path, shards: int) -> bool:
    until = time.monotonic() + LIMIT
    while len(committed(out)) < shards and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    return process.poll() is None


def one(stage: str, root: Path, library: Path) -> tuple[str, bool]:
    plain, out, clock = root / f"undisturbed-{stage}", root / f"shifted-{stage}", root / "clock"
    subprocess.run(command(stage, root, plain), check=True, stdout=subprocess.DEVNULL)
    clock.write_text(PAST)
    first = start(command(stage, root, out), clock, library)
    came = wait_for(first, out, 2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = len(committed(out))
    clock.write_text(FUTURE)
    second = start(command(stage, root, out), clock, library)
    jumped = wait_for(second, out, kept + 1)
    clock.write_text(LONG_AGO)
    said = second.communicate(timeout=LIMIT)[1]
    check = start([sys.executable, "-m", "jobs.cli", "verify", str(out)], clock, library)
    check.communicate(timeout=LIMIT)
    equal, clean = rows(out) == rows(plain), check.returncode == 0
    good = came and jumped and equal and clean and second.returncode == 0
    last = "" if second.returncode == 0 else f" ({said.strip().splitlines()[-1:]})"
    return (
        f"| {stage} | {kept} | status {second.returncode}{last} | {'equal' if equal else 'DIFFERENT'} | "
        f"{'clean' if clean else 'NOT CLEAN'} | {'pass' if good else 'FAIL'} |"
    ), good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", default=["extract", "score", "match"])
    options = parser.parse_args()
    good = True
    print("| stage | shards before the kill | second run, in the future | rows | verify, ten years ago | verdict |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="clock-") as folder:
        root = Path(folder)
        make_images(root / "images")
        if "match" in options.stages:
            subprocess.run(command("extract", root, root / "stored"), check=True, stdout=subprocess.DEVNULL)
        for stage in options.stages:
            line, passed = one(stage, root, options.library)
            good &= passed
            print(line, flush=True)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
