"""Kill what can be killed, at seeded moments of every stage, run the same command again, compare with an undisturbed run.

    python tests/faults/fault_matrix.py [--stages extract match] [--victims driver node] [--moments 2] [--seed 0]

A moment is a number of finished shards: the kill follows the completion record. Rows are printed as a Markdown table;
exits with 1 if one of them fails. Generated images, a tiny untrained backbone, a Ray cluster of three nodes on this
machine.
"""

import argparse
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))
from generated import TINY, save, textured

IMAGES, SHARD = 24, 3  # of each of two categories
LIMIT = 150.0  # seconds: a command that takes longer hangs
KINDS = ("images", "embeddings", "scores", "patch_scores", "failures")
TITLES = {  # what Ray calls the processes that do the work
    "worker": ("ray::_do", "ray::MapBatches", "ray::task_pool"),
    "actor": ("ray::MapWorker",),
}
VICTIMS = {
    "fit": ("worker", "node", "driver"),
    "extract": ("worker", "actor", "node", "driver"),
    "score": ("worker", "actor", "node", "driver"),
    "score embeddings": ("worker", "node", "driver"),
    "match": ("worker", "node", "driver"),
}


class Ground(NamedTuple):
    """What the rows of the table share."""

    root: Path
    cluster: Any
    commands: dict[str, list[str]]
    expected: dict[str, dict[str, list[dict]]]


class Outcome(NamedTuple):
    """One row."""

    stage: str
    victim: str
    moment: int
    first: str
    second: str
    verdict: str


def make_images(root: Path) -> None:
    for category in ("nut", "bolt"):
        for index in range(12):
            save(root / category / "train" / "good" / f"{index:02d}.png", textured(1000 + index))
        for index in range(IMAGES):
            save(root / category / "test" / "good" / f"{index:03d}.png", textured(index, spot=index % 3 == 0))
        (root / category / "test" / "good" / "poison.png").write_text("no image")


def command_of(stage: str, root: Path) -> list[str]:
    encoding = ["--backbone", TINY, "--weights", "random:0", "--resolution", "160"]
    images = ["--images", str(root / "images")]
    workers = ["--num-workers", "2", "--threads", "1"]
    stored = ["--embeddings", str(root / "stored"), "--shard-size", str(SHARD)]
    return {
        "fit": ["fit", *images, *encoding, "--shots", "12", "--masking", "off", *workers],
        "extract": ["extract", *images, *encoding, "--shard-size", str(SHARD), *workers],
        "score": ["score", *images, *encoding, "--banks", str(root / "banks"), "--shard-size", str(SHARD), *workers],
        "score embeddings": ["score", *stored, "--banks", str(root / "banks"), "--masking", "off", *workers],
        "match": ["match", *stored, "--masking", "off", *workers],
    }[stage]


def start(words: list[str], out: Path, address: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "jobs.cli", *words, "--out", str(out), "--ray-address", address]
    log = out.with_suffix(".log").open("a")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def finish(process: subprocess.Popen) -> str:
    """Exit status as text; a command that hangs is killed."""
    try:
        return f"exit {process.wait(LIMIT)}"
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return "HUNG"


def finished_shards(out: Path, stage: str) -> int:
    return len(list((out / ".state" / stage.split(maxsplit=1)[0] / "done").rglob("*.json")))


def wait_for(process: subprocess.Popen, out: Path, stage: str, moment: int) -> bool:
    """Whether the moment came before the command ended."""
    until = time.monotonic() + LIMIT
    while finished_shards(out, stage) < moment and time.monotonic() < until:
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    return process.poll() is None


def ray_processes(victim: str, session: str) -> Iterator[psutil.Process]:
    """Workers of our own cluster: another Ray may run on this machine."""
    for process in psutil.process_iter(["cmdline"]):
        line = (process.info["cmdline"] or [""])[0]
        with contextlib.suppress(psutil.Error):
            parent = process.parent()
            if line.startswith(TITLES[victim]) and parent and session in " ".join(parent.cmdline()):
                yield process


def strike(victim: str, process: subprocess.Popen, cluster: Any, chance: random.Random) -> str:
    """Kill -9; says what."""
    if victim == "driver":
        process.send_signal(signal.SIGKILL)
        return "driver"
    if victim == "node":
        cluster.remove_node(chance.choice(cluster.worker_nodes_now()), allow_graceful=False)
        return "node"
    found = list(ray_processes(victim, cluster.session))
    until = time.monotonic() + 60
    while not found and time.monotonic() < until:
        found = list(ray_processes(victim, cluster.session))
    if not found:
        return "nothing"
    chosen = chance.choice(found)
    title = chosen.info["cmdline"][0]
    chosen.kill()
    return title


def rows(out: Path) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for kind in KINDS:
        read = [row for path in sorted((out / kind).rglob("*.parquet")) for row in pq.read_table(path).to_pylist()]
        found[kind] = sorted(read, key=lambda r: (r["image_id"], r.get("patch_row", 0), r.get("patch_col", 0)))
    return found


def verify(out: Path) -> bool:
    done = subprocess.run([sys.executable, "-m", "jobs.cli", "verify", str(out)], capture_output=True, check=False)
    return done.returncode == 0


class Nodes:
    """A head and two nodes that come back after they were killed."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self.complete()

    @property
    def address(self) -> str:
        return self.cluster.address

    @property
    def session(self) -> str:
        return Path(self.cluster.head_node.get_session_dir_path()).name

    def worker_nodes_now(self) -> list:
        return list(self.cluster.worker_nodes)

    def remove_node(self, node: Any, allow_graceful: bool) -> None:
        self.cluster.remove_node(node, allow_graceful=allow_graceful)

    def complete(self) -> None:
        while len(self.cluster.worker_nodes) < 2:
            self.cluster.add_node(num_cpus=1)

    def stop(self) -> None:
        self.cluster.shutdown()


def one(ground: Ground, stage: str, victim: str, moment: int, chance: random.Random) -> Outcome:
    ground.cluster.complete()
    out = ground.root / f"{stage.replace(' ', '_')}-{victim}-{moment}"
    process = start(ground.commands[stage], out, ground.cluster.address)
    came = wait_for(process, out, stage, moment)
    struck = strike(victim, process, ground.cluster, chance) if came else "too late"
    first = finish(process)
    at = finished_shards(out, stage)
    second = finish(start(ground.commands[stage], out, ground.cluster.address))
    equal = rows(out) == ground.expected[stage]
    clean = verify(out)
    good = equal and clean and second == "exit 0" and first != "HUNG" and came and struck != "nothing"
    note = "" if came else " (ended before the kill)"
    verdict = f"{'pass' if good else 'FAIL'}: {'equal' if equal else 'DIFFERENT'} rows, verify {'clean' if clean else 'NOT CLEAN'}"
    return Outcome(stage, f"{victim} ({struck})", moment, f"{first}, {at} shards{note}", second, verdict)


def prepare(root: Path, cluster: Any, stages: list[str]) -> Ground:
    """Images, banks and embeddings that later stages need, and undisturbed runs."""
    make_images(root / "images")
    commands = {stage: command_of(stage, root) for stage in VICTIMS}
    for stage, name in (("fit", "banks"), ("extract", "stored")):
        status = finish(start(commands[stage], root / name, cluster.address))
        if status != "exit 0":
            raise SystemExit(f"{stage}: {status}\n{(root / name).with_suffix('.log').read_text()}")
    expected = {}
    for stage in stages:
        out = root / f"undisturbed-{stage.replace(' ', '_')}"
        status = finish(start(commands[stage], out, cluster.address))
        if status != "exit 0" or not verify(out):
            raise SystemExit(f"undisturbed {stage}: {status}\n{out.with_suffix('.log').read_text()}")
        expected[stage] = rows(out)
    return Ground(root, cluster, commands, expected)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", default=list(VICTIMS), choices=list(VICTIMS))
    parser.add_argument("--victims", nargs="+", default=["worker", "actor", "node", "driver"])
    parser.add_argument("--moments", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="work here and keep everything")
    options = parser.parse_args()
    chance = random.Random(options.seed)  # noqa: S311
    nodes = Nodes()
    good = True
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        root = options.keep or Path(folder)
        try:
            ground = prepare(root, nodes, options.stages)
            print("| stage | killed | after shards | first run | the same command again | verdict |")
            print("| --- | --- | --- | --- | --- | --- |", flush=True)
            for stage in options.stages:
                last = 2 if stage == "fit" else 2 * (-(-(IMAGES + 1) // SHARD))
                for victim in [victim for victim in VICTIMS[stage] if victim in options.victims]:
                    for moment in sorted(chance.sample(range(max(last - 3, 2)), options.moments)):
                        found = one(ground, stage, victim, moment, chance)
                        good &= found.verdict.startswith("pass")
                        print(f"| {' | '.join(map(str, found))} |", flush=True)
        finally:
            nodes.stop()
    print(json.dumps({"seed": options.seed, "all": "pass" if good else "FAIL"}))
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
