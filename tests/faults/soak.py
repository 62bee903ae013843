"""Leave a stage running and see whether memory, open files, threads and processes stay flat.

    python tests/faults/soak.py repeat [--minutes 20]     # extract, score and match again and again, in one process
    python tests/faults/soak.py batched [--images 500]    # one long `anomalydino batched`, its stages apart

`repeat` calls what Ray would call, without Ray (`without_ray.py`), and is looked at after each round; `batched` is the
command with Ray's processes, looked at every few seconds and interrupted when the time is up. The first tenth of the
samples is start-up and left out. Rows are printed as a Markdown table: the mean of the first and of the last third of the
samples, and the slope of a straight line through all of them. Exits with 1 where one is not flat: memory of the last
third more than 5 % and 10 MB above the first one's, or files, threads or processes more than 2 above their maximum in the
first two thirds.

Memory is PSS: pages that processes share count once over all of them. Generated images, untrained weights.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from generated import TINY, save, textured
from process_state import Held, held_by

START_UP = 0.1  # of the samples
GROWTH, SLACK = 0.05, 10e6  # of memory; bytes
EVERY = 5.0  # seconds
FEWEST = 5  # samples in a third
MORE = 2  # files, threads or processes: one that is just being started or stopped
ROUND = "round done"


class Sample(NamedTuple):
    """One look: when, at what, what the driver holds and what all processes below it hold."""

    seconds: float
    phase: str
    driver: Held
    workers: Held


def repeat(root: Path, minutes: float) -> None:
    """The process that is looked at: rounds of three stages, until the time is up."""
    import without_ray

    from jobs.cli import main as command

    without_ray.install()

    for index in range(12):
        save(root / "train" / "good" / f"{index}.png", textured(100 + index))
        save(root / "test" / "good" / f"{index}.png", textured(index, spot=index % 3 == 0))
    encoding = ["--backbone", TINY, "--weights", "random:0", "--resolution", "160"]
    until, number = time.monotonic() + 60 * minutes, 0
    while time.monotonic() < until:
        with tempfile.TemporaryDirectory(dir=root) as place:
            stored, scored = f"{place}/stored", f"{place}/scored"
            rounds = [
                ["extract", "--images", str(root), *encoding, "--out", stored, "--shard-size", "4"],
                ["match", "--embeddings", stored, "--out", stored, "--masking", "off"],
                ["score", "--images", str(root), *encoding, "--out", scored, "--shots", "2", "--masking", "on"],
            ]
            for words in rounds:
                if status := command(words):
                    raise SystemExit(f"{words}: status {status}")
        number += 1
        print(ROUND, number, flush=True)


def start(root: Path, options: argparse.Namespace) -> subprocess.Popen:
    if options.work == "repeat":
        command = [sys.executable, __file__, "repeat", "--minutes", str(options.minutes), "--inside", str(root)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for index in range(options.images):
        save(root / "nut" / f"{index:04d}.png", textured(index, (448, 448), spot=index % 5 == 0))
    settings = ["--weights", "random:0", "--masking", "off", "--shard-size", "32"]
    words = ["batched", "--images", str(root / "nut"), "--out", str(root / "out"), *settings]
    return subprocess.Popen([sys.executable, "-m", "jobs.cli", *words], stdout=sys.stderr)


def phase_of(state: Path) -> str:
    """The stage at work; start-up until its first shard is finished."""
    stage = "match" if (state / "match" / "run.json").exists() else "extract"
    return stage if any((state / stage / "done").rglob("*.json")) else f"start of {stage}"


def look(process: psutil.Process, phase: str, started: float) -> Sample:
    return Sample(time.monotonic() - started, phase, held_by([process]), held_by(process.children(recursive=True)))


def samples(root: Path, options: argparse.Namespace) -> Iterator[Sample]:
    process = start(root, options)
    watched, started = psutil.Process(process.pid), time.monotonic()
    if options.work == "repeat":
        for line in process.stdout:
            if line.startswith(ROUND):
                yield look(watched, "rounds", started)
    else:
        while process.poll() is None:
            yield look(watched, phase_of(root / "out" / ".state"), started)
            time.sleep(EVERY)
            if time.monotonic() - started > 60 * options.minutes:
                process.send_signal(signal.SIGINT)
                process.wait()
                return
    if process.wait():
        raise SystemExit(f"ended with status {process.returncode}")


def rows(phase: str, found: list[Sample]) -> Iterator[tuple[str, bool]]:
    """A line of the table for each quantity, and whether it is flat."""
    kept = found[int(START_UP * len(found)) :]
    third = len(kept) // 3
    if third < FEWEST:
        return
    hours = np.array([sample.seconds for sample in kept]) / 3600
    for who in ("driver", "workers"):
        if not any(getattr(sample, who).processes for sample in kept):
            continue
        for name in Held._fields:
            if who == "driver" and name == "processes":
                continue
            values = np.array([getattr(getattr(sample, who), name) for sample in kept], float)
            first, last, slope = values[:third].mean(), values[-third:].mean(), np.polyfit(hours, values, 1)[0]
            if name == "memory":
                flat = last <= max(first * (1 + GROWTH), first + SLACK)
                first, last, slope = first / 1e6, last / 1e6, slope / 1e6
            else:
                flat = values[-third:].max() <= values[:-third].max() + MORE
            unit = ", MB" if name == "memory" else ""
            change = f"{100 * (last / first - 1):+.1f} %" if first else "-"
            yield (
                f"| {phase} | {who} | {name}{unit} | {first:.1f} | {last:.1f} | {change} | {slope:+.1f} | "
                f"{'flat' if flat else 'GROWS'} |",
                flat,
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", choices=("repeat", "batched"))
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        repeat(options.inside, options.minutes)
        return 0
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        found = []
        for sample in samples(Path(folder), options):
            found.append(sample)
            print(sample, file=sys.stderr, flush=True)
    good = len(found) >= 3 * FEWEST
    print("| phase | processes | quantity | first third | last third | change | slope per hour | verdict |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for phase in dict.fromkeys(sample.phase for sample in found if not sample.phase.startswith("start")):
        own = [sample for sample in found if sample.phase == phase]
        for line, flat in rows(phase, own):
            good &= flat
            print(line)
    print(f"\n{found[-1].seconds / 60:.1f} minutes, {len(found)} samples: {'flat' if good else 'NOT FLAT'}")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
