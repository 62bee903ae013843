"""Run every stage under memory ceilings: it completes, or ends with a line that names the limit and the remedy.

    python tests/faults/memory_ceilings.py [--how plain group] [--stages extract match] [--shares 0.8 0.5 0.2]

`plain`: the stage in one process without Ray (`without_ray.py`) under RLIMIT_AS, what `ulimit -v` sets; the ceiling is
a share of the address space that the stage took beyond its loaded modules when nothing limited it. `group`: the command
as it is, Ray and its workers included, in a control group of its own (needs root); the ceiling is in MB.

After each limited run the same command runs again without a limit: it must complete with the rows of an undisturbed
run (scores within 1e-6), and `verify` must find nothing. Rows are printed as a Markdown table; exits with 1 where one fails.
"""

import argparse
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from fault_matrix import rows
from generated import TINY, save, textured

HERE = Path(__file__).parent
IMAGES, LIMIT = 12, 900.0  # of the set; seconds
CLOSE = 1e-6  # of scores and distances: where the compiled search cannot be loaded, torch's rounds otherwise
GROUPS = (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"), (Path("/sys/fs/cgroup"), "memory.max")
STAGES = ("extract", "fit", "score", "match", "batched", "evaluate", "report")
READ_ONLY_STAGES = ("evaluate", "report")  # they work in the folder of a finished run


class Ended(NamedTuple):
    """How a command ended, in words, and whether that is allowed."""

    words: str
    allowed: bool


def make_images(root: Path) -> None:
    for index in range(3):
        save(root / "nut" / "train" / "good" / f"{index}.png", textured(1000 + index, (640, 640)))
    for index in range(IMAGES):
        kind = "spot" if index % 3 == 0 else "good"
        save(root / "nut" / "test" / kind / f"{index:03d}.png", textured(index, (640, 640), spot=kind == "spot"))


def words(stage: str, root: Path) -> list[str]:
    images = ["--images", str(root / "images")]
    encoding = ["--backbone", TINY, "--weights", "random:0", "--resolution", "320", "--threads", "1"]
    return {
        "extract": ["extract", *images, *encoding, "--shard-size", "4", "--masking", "off"],
        "fit": ["fit", *images, *encoding, "--shots", "3", "--masking", "on"],
        "score": ["score", *images, *encoding, "--shard-size", "4", "--masking", "on", "--shots", "1"],
        "match": [
            "match",
            "--embeddings",
            str(root / "stored"),
            "--masking",
            "off",
            "--shard-size",
            "4",
            "--threads",
            "1",
        ],
        "batched": ["batched", *images, *encoding, "--shard-size", "4", "--masking", "off"],
        "evaluate": ["evaluate"],
        "report": ["report"],
    }[stage]


def command(stage: str, root: Path, out: Path, plain: bool) -> list[str]:
    program = [sys.executable, str(HERE / "without_ray.py")] if plain else [sys.executable, "-m", "jobs.cli"]
    target = [str(out)] if stage in READ_ONLY_STAGES else ["--out", str(out)]
    return [*program, *words(stage, root), *target]


def prepare(root: Path, stages: list[str]) -> None:
    """Images, and the output of earlier stages that some of these begin with."""
    make_images(root / "images")
    for needed, name, users in (("extract", "stored", {"match"}), ("score", "finished", set(READ_ONLY_STAGES))):
        if users & set(stages):
            status, said = run(command(needed, root, root / name, True))
            if status:
                raise SystemExit(f"{needed}: {status}\n{said}")


def group() -> tuple[Path, str]:
    """A control group for the runs; its file of processes, and the name of its limit."""
    for base, name in GROUPS:
        place = base / "anomalydino-ceiling"
        if (base / name).exists() or base.name == "memory":
            place.mkdir(exist_ok=True)
            if (place / name).exists():
                return place, name
    raise SystemExit("no memory control group here: leave 'group' out")


def run(line: list[str], env: dict[str, str] | None = None, into: Path | None = None) -> tuple[int, str]:
    """Exit status and what was said on standard error."""

    def enter() -> None:
        if into is not None:
            (into / "cgroup.procs").write_text(str(os.getpid()))

    process = subprocess.Popen(
        line,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
        preexec_fn=enter,  # noqa: PLW1509  # this script has one thread
        start_new_session=True,
    )
    try:
        said = process.communicate(timeout=LIMIT)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return -9999, ""
    return process.returncode, said


def judged(status: int, said: str, stage: str) -> Ended:
    lines = [line for line in said.strip().splitlines() if line]
    ours = [line for line in lines if line.startswith(f"anomalydino {stage}:")]
    if status == 0:
        return Ended("completes", True)
    if status == -9999:
        return Ended("HANGS", False)
    if status < 0:
        return Ended(f"ended by {signal.Signals(-status).name}", False)
    if ours and any(word in ours[-1] for word in ("memory", "limits")):
        return Ended(ours[-1].replace("|", "/")[:330], "Traceback" not in said)
    return Ended(f"status {status}: {' '.join(lines[-1:])[:200]}", False)


def difference(left: dict[str, list[dict]], right: dict[str, list[dict]]) -> float:
    """Largest difference of two numbers in the same place; infinite where the rest is not equal.

    Which of two equally near patches is named may differ.
    """
    if {kind: len(found) for kind, found in left.items()} != {kind: len(found) for kind, found in right.items()}:
        return math.inf
    pairs = [pair for kind in left for pair in zip(left[kind], right[kind], strict=True)]
    values = [apart(ours[name], theirs.get(name)) for ours, theirs in pairs for name in ours if "match_" not in name]
    return max(values, default=0.0)


def apart(ours: object, theirs: object) -> float:
    if ours == theirs:
        return 0.0
    return abs(ours - theirs) if isinstance(ours, float) and isinstance(theirs, float) else math.inf


def committed(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob(".state/*/done/*/*.json")}


def limited(stage: str, root: Path, expected: dict, how: str, ceiling: int) -> Iterator[str]:
    out = root / f"{stage}-{how}-{ceiling}"
    if stage in READ_ONLY_STAGES:
        shutil.copytree(root / "finished", out)
    line = command(stage, root, out, how == "plain")
    if how == "plain":
        ended = judged(*run(line, {"CEILING": str(ceiling)}), stage)
    else:
        place, name = group()
        (place / name).write_text(str(ceiling))
        ended = judged(*run(line, into=place), stage)
    before = committed(out)
    again, said = run(command(stage, root, out, True))
    kept = before <= committed(out)
    clean = run([sys.executable, "-m", "jobs.cli", "verify", str(out)])[0] == 0
    apart_by = difference(expected, rows(out))
    good = ended.allowed and not again and clean and apart_by <= CLOSE and kept
    same = "equal rows" if not apart_by else f"rows differ by {apart_by:.0e}"
    after = f"{same}, verify {'clean' if clean else 'NOT CLEAN'}"
    told = "" if not again else f" (status {again}: {said.strip().splitlines()[-1:]})"
    yield (
        f"| {stage} | {how} | {ceiling / 1e6:.0f} MB | {ended.words} | {len(before)} | {after}{told} | "
        f"{'pass' if good else 'FAIL'} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--how", nargs="+", default=["plain"], choices=("plain", "group"))
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.1, 0.02])
    parser.add_argument("--megabytes", nargs="+", type=int, default=[1500, 700])
    options = parser.parse_args()
    good = True
    print("| stage | how | ceiling | outcome | shards kept | the same command again, unlimited | verdict |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="ceilings-") as folder:
        root = Path(folder)
        prepare(root, options.stages)
        for stage in options.stages:
            out, peak = root / f"undisturbed-{stage}", root / f"peak-{stage}"
            if stage in READ_ONLY_STAGES:
                shutil.copytree(root / "finished", out)
            status, said = run(command(stage, root, out, True), {"PEAK": str(peak)})
            if status:
                raise SystemExit(f"{stage}: {status}\n{said}")
            expected, most = rows(out), int(peak.read_text())
            ceilings = [("plain", int(share * most)) for share in options.shares if "plain" in options.how]
            ceilings += [("group", 10**6 * count) for count in options.megabytes if "group" in options.how]
            for how, ceiling in ceilings:
                for line in limited(stage, root, expected, how, ceiling):
                    good &= line.endswith("| pass |")
                    print(line, flush=True)
    print(f"\n{'all pass' if good else 'FAIL'}")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
