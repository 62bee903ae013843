"""Time, peak memory and parity of `anomalydino evaluate` at full resolution, beside the official evaluation.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/pixel_metrics.py RUN [RUN ...] [--official CHECKOUT]

RUN: output folders of `anomalydino score` on bottle and screw (448 pixels, 1 shot, seed 0, masking auto), one category
each. CHECKOUT: the official code; its evaluation then reads the same maps from TIFF files. Prints a Markdown table.
Exits with 1 if a figure is missed: metrics within 0.2 points of the reference, and on screw 2 GB and a fifth of the time
of the reference.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from verdicts import Verdicts

ASSETS = Path(os.environ.get("ANOMALYDINO_ASSETS", "../shared")).resolve()
MAX_POINTS, MAX_GB, TIMES_FASTER = 0.2, 2.0, 5
NAMES = {"pixel_auroc": "pixel_auroc", "pixel_f1": "pixel_f1_max", "pro": "pro_30"}  # of the reference: ours


class Measured(NamedTuple):
    seconds: float
    peak_gb: float


def measured(command: list[str], **more: object) -> Measured:
    """Run a command; wall clock of all of it, start of Python included, and its largest resident memory."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, **more)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} ended with status {status}")
    return Measured(time.monotonic() - started, usage.ru_maxrss * 1024 / 1e9)


def ours(out: Path) -> tuple[str, Measured, dict[str, float]]:
    cost = measured([sys.executable, "-m", "jobs.cli", "evaluate", str(out)], cwd=Path(__file__).parents[2])
    ((category, row),) = json.loads((out / "metrics.json").read_text())["categories"].items()
    return category, cost, {name: row[own] for name, own in NAMES.items()}


def write_maps(out: Path, category: str, folder: Path) -> None:
    """Maps of a run as TIFF files, and the list of them and their masks."""
    import tifffile

    from jobs.scored_run import ScoredRun

    run = ScoredRun(str(out))
    images = {image.image_id: image for image in run.images[category]}
    listed = []
    for image_id, distances in run.distances(category):
        name = str(folder / image_id)
        tifffile.imwrite(f"{name}.tiff", run.anomaly_map(images[image_id], distances))
        listed.append((images[image_id].mask_uri, name))
    (folder / "listed.json").write_text(json.dumps(listed))


def official(out: Path, category: str, checkout: Path) -> tuple[Measured, dict[str, float]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_maps(out, category, folder)
        command = [sys.executable, str(Path(__file__).resolve()), "--evaluate-maps", str(folder)]
        cost = measured(command, cwd=checkout)
        return cost, json.loads((folder / "result.json").read_text())


def evaluate_maps(folder: Path) -> None:
    """In a process of its own, in the official checkout."""
    sys.path.insert(0, ".")
    from src.post_eval import eval_segmentation

    masks, maps = zip(*json.loads((folder / "listed.json").read_text()), strict=True)
    pro, auroc, f1 = eval_segmentation(masks, maps, delete_tiff_files=False)
    result = {"pixel_auroc": float(auroc), "pixel_f1": float(f1), "pro": float(pro)}
    (folder / "result.json").write_text(json.dumps(result))


def show(category: str, who: str, cost: Measured, metrics: dict[str, float]) -> None:
    cells = " | ".join(f"{100 * metrics[name]:.4f}" for name in NAMES)
    print(f"| {category} | {who} | {cost.seconds:.1f} | {cost.peak_gb:.2f} | {cells} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--official", type=Path)
    parser.add_argument("--evaluate-maps", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.evaluate_maps:
        evaluate_maps(options.evaluate_maps)
        return 0
    golden = json.loads((ASSETS / "golden" / "pixel_448_1shot_seed0.json").read_text())
    print("| category | evaluation | seconds | peak GB | pixel AUROC | pixel F1max | PRO 0.3 |\n" + "| --- " * 7 + "|")
    verdicts = Verdicts()
    found = []
    for out in (path.resolve() for path in options.runs):
        category, cost, metrics = ours(out)
        reference = golden[category]
        show(category, "ours", cost, metrics)
        show(category, "official, recorded", Measured(reference["seconds"], reference["peak_gb"]), reference)
        if options.official:
            show(category, "official, now", *official(out, category, options.official.resolve()))
        found.append((category, cost, metrics, reference))
    print()
    for category, cost, metrics, reference in found:
        for name in NAMES:
            verdicts.at_most(f"{category}, {name}: points off", 100 * abs(metrics[name] - reference[name]), MAX_POINTS)
        if category == "screw":
            verdicts.at_most("pixel metrics of screw, GB", cost.peak_gb, MAX_GB)
            verdicts.at_least(
                "pixel metrics of screw, times as fast", reference["seconds"] / cost.seconds, TIMES_FASTER
            )
    return verdicts.status


if __name__ == "__main__":
    sys.exit(main())
