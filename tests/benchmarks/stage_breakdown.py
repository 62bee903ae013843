"""Where the time of a few-shot run goes: seconds an image of each step, on real images.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/stage_breakdown.py [--images 16] [--resolutions 448 672]

One reference with 8 rotations, two threads, one process, nothing overlapped. Medians over images; the write is that of
one shard of all of them, the second time, divided by their number.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contest import ASSETS, WEIGHTS, circumstances
from verdicts import Verdicts

STEPS = ("decode", "resize", "encode", "mask", "match", "score", "map", "write")


def timed(seconds: dict[str, list[float]], step: str, work: Callable[..., Any], *arguments: Any) -> Any:
    started = time.perf_counter()
    result = work(*arguments)
    seconds.setdefault(step, []).append(time.perf_counter() - started)
    return result


def write(detections: list, records: list, bank: Any, folder: Path) -> float:
    """Seconds of committing one shard as `score` does."""
    from jobs import tables
    from jobs.store import Store

    source = tables.bank_source(bank)
    store = Store(folder, "score")
    store.claim("breakdown", ("scores", "patch_scores"), {})
    started = time.perf_counter()
    scored = [tables.Scored(record, one) for record, one in zip(records, detections, strict=True)]
    found = {
        "scores": tables.scores_table(scored, None, "mean_top:0.01", True),
        "patch_scores": tables.patch_scores_table(scored, source),
    }
    store.commit("screw", "000000", found, {"done": len(scored), "failed": 0})
    return time.perf_counter() - started


def breakdown(category: str, resolution: int, count: int) -> dict[str, float]:
    import torch

    from anomalydino_plugin import (
        FewShotModel,
        detect,
        foreground_and_test,
        image_score,
        nearest,
        read_image,
        rotate_image,
        search_rows,
    )
    from anomalydino_plugin import load_backbone as load
    from jobs.records import ImageRecord

    torch.set_num_threads(2)
    model = FewShotModel(load("dinov2_vits14", WEIGHTS), resolution=resolution, masking="on")
    data = ASSETS / "data" / "mvtec" / category
    reference = data / "train" / "good" / "000.png"
    seconds: dict[str, list[float]] = {}
    image = read_image(reference)
    for angle in range(0, 360, 45):
        timed(seconds, "rotate (a view of a reference)", rotate_image, image, angle)
    model.fit([reference])
    bank = search_rows(model.bank.rows)
    detections, records = [], []
    tests = sorted((data / "test").rglob("*.png"))
    for number, path in enumerate(tests[:: max(1, len(tests) // (count + 2))][: count + 2]):
        own: dict[str, list[float]] = seconds if number > 1 else {}  # two to warm up
        pixels = timed(own, "decode", read_image, path)
        prepared = timed(own, "resize", model.prepare, pixels)
        features = timed(own, "encode", lambda p=prepared: model.encode([p])[0])
        plan = model.plan(pixels)
        kept, _ = timed(own, "mask", foreground_and_test, features.numpy(), plan.grid)
        rows = torch.nn.functional.normalize(features, dim=1)
        match = timed(own, "match", nearest, rows, bank)
        distances = match.distances[:, 0] * torch.from_numpy(kept.reshape(-1))
        timed(own, "score", image_score, distances)
        detection = detect(distances, match.rows[:, 0], kept.reshape(plan.grid), plan, "mean_top:0.01")
        timed(own, "map", model.anomaly_map, detection)
        if number > 1:
            detections.append(detection)
            records.append(ImageRecord(path.name, str(path), category, "test", None, None))
    found = {step: statistics.median(values) for step, values in seconds.items()}
    with tempfile.TemporaryDirectory() as folder:
        for turn in "warm up", "write":
            found["write"] = write(detections, records, model.bank, Path(folder) / turn) / len(detections)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--category", default="screw")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[448, 672])
    options = parser.parse_args()
    print(circumstances(), "\n")
    found = {size: breakdown(options.category, size, options.images) for size in options.resolutions}
    print("| step | " + " | ".join(f"{size}, ms | share" for size in found) + " |")
    print("| --- " * (1 + 2 * len(found)) + "|")
    totals = {size: sum(steps[step] for step in STEPS) for size, steps in found.items()}
    for step in STEPS:
        cells = [f"{1e3 * steps[step]:.1f} | {steps[step] / totals[size]:.0%}" for size, steps in found.items()]
        print(f"| {step} | {' | '.join(cells)} |")
    print("| an image | " + " | ".join(f"{1e3 * total:.1f} | 100%" for total in totals.values()) + " |")
    rotate = "rotate (a view of a reference)"
    print(f"| {rotate} | " + " | ".join(f"{1e3 * steps[rotate]:.1f} | -" for steps in found.values()) + " |\n")
    verdicts = Verdicts()
    for size, steps in found.items():
        verdicts.report(f"seconds of an image at {size}", totals[size])
        verdicts.report(
            f"share of it in encoding and matching, {size}", (steps["encode"] + steps["match"]) / totals[size]
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
