"""Batched zero-shot parity with the official code's reference figures, through anomalib's Engine.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/parity_batched.py [--categories bottle screw] [--mode official]

Prints a Markdown table: largest relative difference of an image score from the reference, difference of AUROC in
points, seconds and peak memory beside those of the reference run. ``--mode musc`` prints the same without judging.
Exits with 1 if a figure is missed.
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

from sklearn.metrics import roc_auc_score
from verdicts import Verdicts

ASSETS = Path(os.environ.get("ANOMALYDINO_ASSETS", "../shared")).resolve()
WEIGHTS = str(ASSETS / "weights" / "dinov2_vits14.safetensors")
MAX_RELATIVE, MAX_POINTS = 0.01, 0.1


def run(category: str, mode: str) -> dict:
    """Raw scores by Engine.predict, metrics by Engine.test; one process for each category, for its peak memory."""
    from anomalib.data import Folder
    from anomalib.engine import Engine

    from anomalydino_plugin import AnomalyDINOBatched

    root = ASSETS / "data" / "mvtec" / category
    defects = sorted(path.name for path in (root / "test").iterdir() if path.name != "good")
    datamodule = Folder(
        name=category,
        root=root,
        normal_dir="train/good",
        abnormal_dir=[f"test/{name}" for name in defects],
        mask_dir=[f"ground_truth/{name}" for name in defects],
        normal_test_dir="test/good",
        num_workers=0,
        eval_batch_size=4,
        val_split_mode="same_as_test",
    )
    scores: dict[str, float] = {}
    model = AnomalyDINOBatched(weights=WEIGHTS, mode=mode, visualizer=False)
    scored = model._scored

    def noted(batch):
        prediction = scored(batch)
        names = ("/".join(Path(path).parts[-2:]) for path in batch.image_path)
        scores.update(zip(names, prediction.pred_score.tolist(), strict=True))
        return prediction

    model._scored = noted
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(default_root_dir=folder, logger=False, accelerator="cpu", enable_progress_bar=False)
        started = time.perf_counter()
        (metrics,) = engine.test(model, datamodule=datamodule, verbose=False)
    return {
        "scores": scores,
        "metrics": metrics,
        "seconds": time.perf_counter() - started,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--categories", nargs="+", default=["bottle", "screw"])
    parser.add_argument("--mode", default="official")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(options.one, options.mode)))
        return 0
    golden = json.loads((ASSETS / "golden" / "batched_448.json").read_text())
    print(f"mode {options.mode}, 448 pixels, masking auto\n")
    print(
        "| category | AUROC of reference | ours | largest score difference | pixel AUROC | seconds (reference) | GB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    verdicts = Verdicts()
    shown = []
    for category in options.categories:
        command = [sys.executable, __file__, "--one", category, "--mode", options.mode]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        ours, reference = json.loads(done.stdout.splitlines()[-1]), golden[category]
        if ours["scores"].keys() != reference["scores"].keys():
            raise SystemExit(f"images differ: {sorted(ours['scores'].keys() ^ reference['scores'].keys())[:4]}")
        defect = [not name.startswith("good/") for name in ours["scores"]]
        auroc = 100 * roc_auc_score(defect, list(ours["scores"].values()))
        relative = max(abs(ours["scores"][name] / value - 1) for name, value in reference["scores"].items())
        points = abs(auroc - 100 * reference["auroc"])
        shown.append((category, relative, points))
        print(
            f"| {category} | {100 * reference['auroc']:.2f} | {auroc:.2f} | {relative:.1e} "
            f"| {100 * ours['metrics']['pixel_AUROC']:.2f} | {ours['seconds']:.0f} ({reference['seconds']:.0f}) "
            f"| {ours['peak_gb']:.2f} ({reference['peak_gb']:.2f}) |",
            flush=True,
        )
    print()
    for category, relative, points in shown if options.mode == "official" else []:
        verdicts.at_most(
            f"Engine, batched zero-shot, {category}: relative difference of a score", relative, MAX_RELATIVE
        )
        verdicts.at_most(f"Engine, batched zero-shot, {category}: points of AUROC off", points, MAX_POINTS)
    return verdicts.status


if __name__ == "__main__":
    sys.exit(main())
