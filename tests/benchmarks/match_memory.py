"""Peak memory of matching one query shard against N and 4 N images, each in its own process.

    python tests/benchmarks/match_memory.py [--images 240] [--queries 8]

Random features of the size of S/14 at 448 pixels: memory does not depend on what they say. Fewer than 240 images do not
fill what the budget allows in blocks and row groups, so that a set of 120 takes less.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from verdicts import Verdicts

MAX_GROWTH = 0.10
GRID, WIDTH, SHARD = (32, 32), 384, 120


def write_embeddings(out: Path, images: int) -> None:
    """As `extract` leaves them."""
    from anomalydino_plugin import Geometry
    from jobs import tables
    from jobs.inputs import ImageRecord
    from jobs.stage import write_job
    from jobs.store import Store

    store = Store(out, "extract")
    store.claim("generated", ("images", "embeddings"), {})
    random = np.random.default_rng(0)
    plan = Geometry((448, 448), (448, 448), GRID, (1.0, 1.0))
    for start in range(0, images, SHARD):
        items = [
            tables.Extracted(
                ImageRecord(f"{number:06d}", f"{number}.png", "c"),
                plan,
                random.standard_normal((GRID[0] * GRID[1], WIDTH), np.float32),
                np.ones(GRID, bool),
                False,
            )
            for number in range(start, min(start + SHARD, images))
        ]
        rows = {
            "images": tables.extracted_images(items, []),
            "embeddings": tables.embeddings_table(items, WIDTH, "float32"),
        }
        record = {"done": len(items), "failed": 0, "seconds": 0.0, "fingerprint": {"weights": "none"}}
        store.commit("c", f"{start // SHARD:06d}", rows, record)
    write_job(store, {})


def one(stored: Path, out: Path, queries: int) -> int:
    """Peak bytes of this process after matching some images against all."""
    import torch

    from jobs.config import MatchConfig
    from jobs.embeddings import StoredRun
    from jobs.matcher import CategoryPlan, Matcher
    from jobs.shards import Shard
    from jobs.store import Store

    torch.set_num_threads(2)
    run = StoredRun.read(str(stored))
    plans = {"c": CategoryPlan(run.sets["c"], run.of("c"), None, False)}
    config = MatchConfig(embeddings=str(stored), out=str(out), masking="off")
    matcher = Matcher(config, plans, Store(out, "match"), True, "cpu")
    records = tuple(image.record for image in run.images[:queries])
    return matcher.run(Shard("c", "000000", records))["peak_bytes"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=240)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--one", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(one(*options.one, options.queries))
        return 0
    peaks = []
    print("| images in the set | peak memory, MB |\n| --- | --- |")
    for count in (options.images, 4 * options.images):
        with tempfile.TemporaryDirectory() as folder:
            stored, out = Path(folder) / "stored", Path(folder) / "out"
            write_embeddings(stored, count)
            command = [sys.executable, __file__, "--one", str(stored), str(out), "--queries", str(options.queries)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            peaks.append(int(done.stdout.split()[-1]))
        print(f"| {count} | {peaks[-1] / 1e6:.0f} |", flush=True)
    print()
    verdicts = Verdicts()
    verdicts.at_most("peak memory of match for 4 times as many images", peaks[1] / peaks[0], 1 + MAX_GROWTH)
    return verdicts.status


if __name__ == "__main__":
    sys.exit(main())
