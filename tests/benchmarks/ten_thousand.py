"""10,000 generated images, 50 of them poisoned, through `extract` and `score`; undisturbed, and with three kills.

    python tests/benchmarks/ten_thousand.py [--images 10000] [--poisoned 50] [--kills 3]

Expected: 9,950 images scored, 50 in failures, `verify` clean, the same rows after kills. A tiny untrained backbone.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from generated import TINY, save, textured
from verdicts import Verdicts

POISON = (b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\x00" * 64)


def make_images(root: Path, count: int, poisoned: int) -> None:
    """Small ones, every one different; poisoned ones spread over them."""
    random_state = np.random.default_rng(0)
    for index in range(4):
        save(root / "nut" / "train" / "good" / f"{index}.png", textured(index))
    folder = root / "nut" / "test" / "good"
    folder.mkdir(parents=True)
    bad = set(random_state.choice(count, poisoned, replace=False).tolist())
    for index in range(count):
        path = folder / f"{index:05d}.png"
        if index in bad:
            path.write_bytes(POISON[index % len(POISON)])
        else:
            Image.fromarray(random_state.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path, compress_level=1)


def command(words: list[str]) -> list[str]:
    return [sys.executable, "-m", "jobs.cli", *words]


def killed_run(words: list[str], out: Path, kills: int) -> int:
    """Kill -9 the command after a random number of further shards, then run it again; until it has ended by itself."""
    chance = random.Random(0)  # noqa: S311
    for _ in range(kills):
        process = subprocess.Popen(command(words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        target = done_shards(out) + chance.randint(1, 4)
        while process.poll() is None and done_shards(out) < target:
            time.sleep(0.02)
        if process.poll() is not None:
            return kills
        process.send_signal(signal.SIGKILL)
        process.wait()
    return subprocess.run(command(words), check=True, stdout=subprocess.DEVNULL).returncode


def done_shards(out: Path) -> int:
    return sum(len(list(path.rglob("*.json"))) for path in out.glob(".state/*/done"))


def rows(out: Path, kind: str) -> list[dict]:
    found = ds.dataset([str(path) for path in sorted((out / kind).rglob("*.parquet"))]).to_table()
    keys = [(name, "ascending") for name in ("image_id", "patch_row", "patch_col") if name in found.column_names]
    return found.sort_by(keys).to_pylist()


def verify(out: Path) -> bool:
    return subprocess.run(command(["verify", str(out)]), check=False, stdout=sys.stderr).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--poisoned", type=int, default=50)
    parser.add_argument("--kills", type=int, default=3)
    options = parser.parse_args()
    verdicts = Verdicts()
    counts = []
    with tempfile.TemporaryDirectory(prefix="ten-thousand-") as folder:
        root = Path(folder)
        make_images(root / "images", options.images, options.poisoned)
        words = ["score", "--images", str(root / "images"), "--backbone", TINY, "--weights", "random:0"]
        words += ["--resolution", "32", "--masking", "off", "--shots", "4", "--shard-size", "256", "--write-embeddings"]
        found = {}
        print("| run | scored | failures | files | seconds | verify |\n| --- | --- | --- | --- | --- | --- |")
        for name, kills in (("undisturbed", 0), (f"{options.kills} kills", options.kills)):
            out = root / name.replace(" ", "_")
            started = time.perf_counter()
            killed_run([*words, "--out", str(out)], out, kills)
            seconds = time.perf_counter() - started
            found[name] = {
                kind: rows(out, kind) for kind in ("images", "scores", "patch_scores", "failures", "embeddings")
            }
            scored, failures = len(found[name]["scores"]), len(found[name]["failures"])
            clean = verify(out)
            files = len(list(out.rglob("*.parquet")))
            counts.append((name, scored, failures, clean))
            verdict = "clean" if clean else "NOT CLEAN"
            print(f"| {name} | {scored} | {failures} | {files} | {seconds:.0f} | {verdict} |", flush=True)
        first, second = found.values()
        equal = first == second
        print(f"\nrows after kills: {'equal' if equal else 'DIFFERENT'}; {os.cpu_count()} CPUs")
    for name, scored, failures, clean in counts:
        verdicts.at_least(f"{name}: images scored", scored, options.images - options.poisoned)
        verdicts.at_most(f"{name}: failures", failures, options.poisoned)
        verdicts.at_least(f"{name}: verify clean", clean, 1)
    verdicts.at_least("rows after kills equal", equal, 1)
    return verdicts.status


if __name__ == "__main__":
    sys.exit(main())
