"""A finished `anomalydino reproduce` beside the official code's reference figures, where both have the setting.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/reproduction_parity.py OUT

Prints a Markdown table: image AUROC, F1-max and AP at 448 with 1 shot (three seeds) and 4 shots, at 672 with 1 shot, and
batched; pixel AUROC, F1-max and PRO at 448 with 1 shot, seed 0. Exits with 1 if a difference is above its target, 0.1
point for images and 0.2 for pixels; settings that the reproduction lacks are named.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from sklearn.metrics import average_precision_score, precision_recall_curve

GOLDEN = Path(os.environ.get("ANOMALYDINO_ASSETS", "../shared")).resolve() / "golden"
FEW_SHOT = {"fewshot_448_1shot": (448, 1), "fewshot_448_4shot": (448, 4), "fewshot_672_1shot": (672, 1)}
IMAGE, PIXEL = 0.1, 0.2  # points
DEFAULTS = {"rotations": "auto", "masking": "auto", "statistic": "mean_top:0.01", "k": 1, "method": "anomalydino"}
Key = tuple[str, int | None, int | None, int]


def figures() -> Iterator[tuple[Key, str, float, float]]:
    """Category, shots, seed and resolution; metric; the official figure; the target."""
    for name, (resolution, shots) in FEW_SHOT.items():
        for category, seeds in json.loads((GOLDEN / f"{name}.json").read_text()).items():
            for seed, figure in seeds.items():
                key = (category, shots, int(seed), resolution)
                yield key, "auroc", figure["auroc"], IMAGE
                yield key, "f1_max", figure["f1"], IMAGE
                yield key, "average_precision", figure["ap"], IMAGE
    for category, figure in json.loads((GOLDEN / "batched_448.json").read_text()).items():
        key = (category, None, None, 448)
        defect = [not image.startswith("good/") for image in figure["scores"]]
        scores = list(figure["scores"].values())
        precision, recall, _ = precision_recall_curve(defect, scores)
        yield key, "auroc", figure["auroc"], IMAGE
        yield key, "f1_max", max(2 * precision * recall / (precision + recall + 1e-12)), IMAGE
        yield key, "average_precision", average_precision_score(defect, scores), IMAGE
    for category, figure in json.loads((GOLDEN / "pixel_448_1shot_seed0.json").read_text()).items():
        key = (category, 1, 0, 448)
        yield key, "pixel_auroc", figure["pixel_auroc"], PIXEL
        yield key, "pixel_f1_max", figure["pixel_f1"], PIXEL
        yield key, "pro_30", figure["pro"], PIXEL


def measured(out: Path) -> dict[Key, dict]:
    rows = json.loads((out / "results.json").read_text())["rows"]
    return {
        (row["category"], row["shots"], row["seed"], row["resolution"]): row
        for row in rows
        if all(row[name] == value for name, value in DEFAULTS.items()) and row["preprocess"] in {"agnostic", "none"}
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    rows = measured(parser.parse_args().out)
    failed, lacking = False, {}
    print("| category | setting | seed | metric | official code | ours | difference, points | target | verdict |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for key, metric, official, target in figures():
        category, shots, seed, resolution = key
        setting = f"{'batched' if shots is None else f'{shots} shot'}, {resolution}"
        ours = rows.get(key, {}).get(metric)
        if ours is None:
            lacking[f"{category}, {setting}, seed {seed}, {metric}"] = None
            continue
        points = 100 * (ours - official)
        failed |= abs(points) > target
        cells = [category, setting, "-" if seed is None else str(seed), metric]
        cells += [f"{100 * official:.3f}", f"{100 * ours:.3f}", f"{points:+.3f}", f"{target}"]
        print(f"| {' | '.join(cells)} | {'MISSED' if abs(points) > target else 'reached'} |")
    for name in lacking:
        print(f"not measured: {name}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
