"""What cost grows with, against the written cost model (docs/scale.md): resolution, shots, images, workers.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/scaling.py [--parts resolution shots images workers]

Each part measures several sizes; the model, with its rate taken from one of them, foretells the others. Real images and
features of screw; two threads.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contest import ASSETS, WEIGHTS, circumstances
from verdicts import Verdicts

WITHIN = 1.5  # times what the model foretells, either way
LAYERS, WIDTH = 12, 384
SCREW = ASSETS / "data" / "mvtec" / "screw"


def encode_flop(patches: int) -> float:
    """docs/scale.md: 2 x layers x (12 t d^2 + 2 t^2 d), t = P + 1."""
    tokens = patches + 1
    return 2.0 * LAYERS * (12 * tokens * WIDTH**2 + 2 * tokens**2 * WIDTH)


def match_flop(queries: int, references: int) -> float:
    return 2.0 * WIDTH * queries * references


def median_seconds(work: Callable[[], Any], turns: int) -> float:
    work()
    found = []
    for _ in range(turns):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def show(title: str, rows: list[tuple[str, float, float]], base: int, verdicts: Verdicts) -> None:
    """Size, FLOP and seconds; the rate of row ``base`` foretells the others."""
    rate = rows[base][1] / rows[base][2]
    print(f"\n## {title}\n\n| size | GFLOP | seconds | foretold | GFLOP/s |\n| --- | --- | --- | --- | --- |")
    worst = 1.0
    for size, flop, seconds in rows:
        foretold = flop / rate
        worst = max(worst, seconds / foretold, foretold / seconds)
        print(f"| {size} | {flop / 1e9:.1f} | {seconds:.4g} | {foretold:.4g} | {flop / seconds / 1e9:.0f} |")
    print()
    verdicts.at_most(f"{title.lower()}: times off the cost model, either way", worst, WITHIN)


def resolution(verdicts: Verdicts) -> None:
    from anomalydino_plugin import PatchModel, load_backbone, read_image

    backbone = load_backbone("dinov2_vits14", WEIGHTS)
    image = read_image(SCREW / "train" / "good" / "000.png")
    rows = []
    for size in (224, 448, 672, 896):
        model = PatchModel(backbone, resolution=size)
        prepared = model.prepare(image)
        patches = (size // 14) ** 2
        seconds = median_seconds(lambda m=model, p=prepared: m.encode([p]), 3)
        rows.append((f"{size} pixels, {patches} patches", encode_flop(patches), seconds))
    show("Resolution: encoding an image", rows, 1, verdicts)


def shots(verdicts: Verdicts) -> None:
    import torch

    from anomalydino_plugin import FewShotModel, load_backbone, nearest, read_image, search_rows

    model = FewShotModel(load_backbone("dinov2_vits14", WEIGHTS), masking="off")
    model.fit(sorted((SCREW / "train" / "good").iterdir())[:8])
    test = model.prepare(read_image(SCREW / "test" / "good" / "000.png"))
    queries = torch.nn.functional.normalize(model.encode([test])[0], dim=1)
    rows = []
    for count in (1, 2, 4, 8):
        bank = search_rows(model.bank.rows[: count * 8192])
        seconds = median_seconds(lambda b=bank: nearest(queries, b), 7)
        rows.append((f"{count} shots, {count * 8192} rows", match_flop(len(queries), count * 8192), seconds))
    show("Shots: matching an image", rows, 1, verdicts)


def images(verdicts: Verdicts) -> None:
    import torch

    from anomalydino_plugin import PatchModel, load_backbone, match_set, read_image

    model = PatchModel(load_backbone("dinov2_vits14", WEIGHTS))
    paths = sorted((SCREW / "test").rglob("*.png"))
    stored = [
        torch.nn.functional.normalize(model.encode([model.prepare(read_image(path))])[0], dim=1) for path in paths
    ]
    rows = []
    for count in (40, 80, 160):
        chosen = stored[:: len(stored) // count][:count]
        started = time.perf_counter()
        with torch.inference_mode():
            match_set(chosen)
        seconds = time.perf_counter() - started
        rows.append((f"{count} images", match_flop(1024 * count, 1024 * (count - 1)), seconds))
    show("Images: batched zero-shot, all at once", rows, 1, verdicts)


def workers(verdicts: Verdicts) -> None:
    del verdicts  # two cores are shared by all workers: nothing to gain here, only a cost to know
    print("\n## Workers: extract of 24 images\n\n| workers | threads of each | seconds of work |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        chosen = Path(folder) / "images"
        chosen.mkdir()
        for path in sorted((SCREW / "test" / "good").iterdir())[:24]:
            (chosen / path.name).symlink_to(path)
        for count, threads in ((1, 2), (2, 1), (1, 1)):
            out = Path(folder) / f"{count}-{threads}"
            words = ["extract", "--images", str(chosen), "--out", str(out), "--weights", WEIGHTS, "--shard-size", "6"]
            words += ["--num-workers", str(count), "--threads", str(threads)]
            subprocess.run([sys.executable, "-m", "jobs.cli", *words], check=True, stdout=sys.stderr)
            records = sorted((out / ".state" / "extract" / "done").rglob("*.json"))
            ready = min(json.loads(path.read_text())["worker_ready"] for path in records)
            seconds = max(path.stat().st_mtime for path in records) - ready
            print(f"| {count} | {threads} | {seconds:.1f} |", flush=True)


PARTS = {"resolution": resolution, "shots": shots, "images": images, "workers": workers}


def main() -> int:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    torch.set_num_threads(2)
    print(circumstances())
    verdicts = Verdicts()
    for name in options.parts:
        PARTS[name](verdicts)
    return verdicts.status


if __name__ == "__main__":
    sys.exit(main())
