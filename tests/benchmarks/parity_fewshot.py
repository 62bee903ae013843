"""Few-shot parity with the official code's reference figures, three ways: Python API, anomalib's Engine, `anomalydino score`.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/parity_fewshot.py [--seeds 0 1 2] [--ways api engine cli]

Prints a Markdown table: largest relative difference of an image score from the reference, difference of AUROC in
points, and peak memory of the encoder process. Exits with 1 if a figure is missed.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score
from verdicts import Verdicts

ASSETS = Path(os.environ.get("ANOMALYDINO_ASSETS", "../shared")).resolve()
WEIGHTS = str(ASSETS / "weights" / "dinov2_vits14.safetensors")
CATEGORIES = ("bottle", "screw")
MAX_RELATIVE, MAX_POINTS, MAX_WAYS = 0.01, 0.1, 1e-5


def key(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


def by_api(category: str, seeds: list[int]) -> dict[int, dict[str, float]]:
    from anomalydino_plugin import FewShotModel, load_backbone, read_image

    model = FewShotModel(load_backbone(weights=WEIGHTS))
    root = ASSETS / "data" / "mvtec" / category
    references = sorted((root / "train" / "good").iterdir())
    features = {}
    for path in sorted(root.glob("test/*/*")):
        image = read_image(path)
        features[key(str(path))] = model.encode([model.prepare(image)])[0], model.plan(image)
    scores = {}
    for seed in seeds:
        model.fit(references[seed : seed + 1])
        scores[seed] = {name: model.score_features(own, plan).score for name, (own, plan) in features.items()}
    return scores


def by_engine(category: str, seed: int) -> dict[str, float]:
    from anomalib.data import Folder
    from anomalib.engine import Engine

    from anomalydino_plugin import AnomalyDINOFewShot

    root = ASSETS / "data" / "mvtec" / category
    defects = sorted(path.name for path in (root / "test").iterdir() if path.name != "good")
    datamodule = Folder(
        name=category,
        root=root,
        normal_dir="train/good",
        abnormal_dir=[f"test/{name}" for name in defects],
        normal_test_dir="test/good",
        num_workers=0,
        eval_batch_size=4,
        val_split_mode="none",
    )
    model = AnomalyDINOFewShot(weights=WEIGHTS, seed=seed, post_processor=False, evaluator=False, visualizer=False)
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(default_root_dir=folder, logger=False, accelerator="cpu", enable_progress_bar=False)
        engine.fit(model, datamodule=datamodule)
        batches = engine.predict(model, datamodule=datamodule)
    return {key(p): float(s) for b in batches for p, s in zip(b.image_path, b.pred_score, strict=True)}


def by_cli(category: str, seed: int) -> tuple[dict[str, float], float]:
    import pyarrow.dataset as ds

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, "-m", "jobs.cli", "score", "--images", str(ASSETS / "data" / "mvtec"), "--category"]
        subprocess.run(
            [*command, category, "--out", str(out), "--weights", WEIGHTS, "--seed", str(seed)],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=Path(__file__).parents[2],
        )
        rows = ds.dataset(out / "scores").to_table().to_pylist()
        peak = max(
            json.loads(path.read_text()).get("peak_bytes", 0)
            for path in (out / ".state" / "score" / "done").rglob("*.json")
        )
    return {key(row["uri"]): row["score"] for row in rows}, peak / 1e9


def compare(scores: dict[str, float], golden: dict) -> tuple[float, float]:
    if scores.keys() != golden["scores"].keys():
        raise SystemExit(f"images differ: {sorted(scores.keys() ^ golden['scores'].keys())[:4]}")
    relative = max(abs(scores[name] / value - 1) for name, value in golden["scores"].items())
    defect = [not name.startswith("good/") for name in scores]
    return relative, 100 * abs(roc_auc_score(defect, list(scores.values())) - golden["auroc"])


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", default=["api", "engine", "cli"])
    options = parser.parse_args()
    golden = json.loads((ASSETS / "golden" / "fewshot_448_1shot.json").read_text())
    verdicts = Verdicts()
    worst = {
        "relative difference of a score": 0.0,
        "points of AUROC off": 0.0,
        "difference between the three ways": 0.0,
    }
    print(
        "| category | seed | way | AUROC of reference | off by (points) | largest score difference | seconds | encoder peak GB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for category in CATEGORIES:
        started = time.perf_counter()
        api = by_api(category, options.seeds)
        api_seconds = (time.perf_counter() - started) / len(options.seeds)
        for seed in options.seeds:
            ways: dict[str, tuple[dict[str, float], float, float]] = {"api": (api[seed], api_seconds, 0.0)}
            if "engine" in options.ways:
                started = time.perf_counter()
                ways["engine"] = by_engine(category, seed), time.perf_counter() - started, 0.0
            if "cli" in options.ways:
                started = time.perf_counter()
                scores, peak = by_cli(category, seed)
                ways["cli"] = scores, time.perf_counter() - started, peak
            for way, (scores, seconds, peak) in ways.items():
                relative, points = compare(scores, golden[category][str(seed)])
                apart = max(abs(scores[name] - api[seed][name]) for name in scores)
                worst = {
                    name: max(old, new)
                    for (name, old), new in zip(worst.items(), (relative, points, apart), strict=True)
                }
                auroc = 100 * golden[category][str(seed)]["auroc"]
                shown = f"{peak:.2f}" if peak else "-"
                print(
                    f"| {category} | {seed} | {way} | {auroc:.2f} | {points:.4f} | {relative:.1e} (from API {apart:.1e}) | {seconds:.0f} | {shown} |",
                    flush=True,
                )
    print(f"\npeak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    for (name, value), aim in zip(worst.items(), (MAX_RELATIVE, MAX_POINTS, MAX_WAYS), strict=True):
        verdicts.at_most(f"few-shot, 448, 1 shot: {name}", value, aim)
    return verdicts.status


if __name__ == "__main__":
    np.set_printoptions(precision=4)
    sys.exit(main())
