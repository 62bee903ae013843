"""`anomalydino batched` on bottle and screw against the official code's figures, and `match` with sampled references.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/parity_batched_job.py [--out DIR] [--fractions 0.1 0.25 0.5]

Prints two Markdown tables. Exits with 1 where scores differ by more than 1 % or AUROC by more than 0.1 point.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
from sklearn.metrics import roc_auc_score
from verdicts import Verdicts

ASSETS = Path(os.environ.get("ANOMALYDINO_ASSETS", "../shared")).resolve()
CATEGORIES = ("bottle", "screw")
SEEDS = (0, 1, 2)
MAX_RELATIVE, MAX_POINTS = 0.01, 0.1


def anomalydino(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "jobs.cli", *words], check=True, stdout=sys.stderr)


def scores(out: Path, category: str) -> dict[str, float]:
    """Raw scores by ``LABEL/FILE``."""
    table = [row for path in sorted((out / "scores" / category).iterdir()) for row in pq.read_table(path).to_pylist()]
    return {"/".join(row["uri"].split("/")[-2:]): row["score"] for row in table}


def auroc(found: dict[str, float]) -> float:
    return 100 * roc_auc_score([not name.startswith("good/") for name in found], list(found.values()))


def matching(out: Path) -> dict:
    return json.loads((out / "job.json").read_text())["stages"]["match"]


def parity(out: Path) -> Verdicts:
    golden = json.loads((ASSETS / "golden" / "batched_448.json").read_text())
    job = json.loads((out / "job.json").read_text())["stages"]
    print(
        "| category | images | AUROC of reference | ours | largest score difference |\n| --- | --- | --- | --- | --- |"
    )
    off = []
    for category in CATEGORIES:
        ours, reference = scores(out, category), golden[category]
        if ours.keys() != reference["scores"].keys():
            raise SystemExit(f"images differ: {sorted(ours.keys() ^ reference['scores'].keys())[:4]}")
        relative = max(abs(ours[name] / value - 1) for name, value in reference["scores"].items())
        off.append((category, relative, abs(auroc(ours) - 100 * reference["auroc"])))
        print(f"| {category} | {len(ours)} | {100 * reference['auroc']:.2f} | {auroc(ours):.2f} | {relative:.1e} |")
    cost = job["match"]["cost"]
    print(
        f"\nextract {job['extract']['seconds']['total']:.0f} s; match {cost['seconds']:.0f} s, estimated "
        f"{cost['estimate']['seconds']:.0f} s ({cost['estimate']['flop'] / 1e12:.1f} TFLOP)\n",
        flush=True,
    )
    verdicts = Verdicts()
    for category, relative, points in off:
        verdicts.at_most(f"anomalydino batched, {category}: relative difference of a score", relative, MAX_RELATIVE)
        verdicts.at_most(f"anomalydino batched, {category}: points of AUROC off", points, MAX_POINTS)
    return verdicts


def sampled(out: Path, fractions: list[float], folder: Path) -> None:
    full = {category: auroc(scores(out, category)) for category in CATEGORIES}
    print("| references | seed | bottle AUROC | screw AUROC | seconds of matching |\n| --- | --- | --- | --- | --- |")
    print(
        f"| all | - | {full['bottle']:.2f} | {full['screw']:.2f} | {matching(out)['cost']['seconds']:.0f} |", flush=True
    )
    for fraction in fractions:
        for seed in SEEDS:
            target = folder / f"{fraction}-{seed}"
            words = ["--embeddings", str(out), "--reference-fraction", str(fraction), "--seed", str(seed)]
            anomalydino("match", *words, "--out", str(target))
            found = [f"{auroc(scores(target, category)):.2f}" for category in CATEGORIES]
            print(
                f"| {fraction:.0%} | {seed} | {' | '.join(found)} | {matching(target)['cost']['seconds']:.0f} |",
                flush=True,
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="keep the run here")
    parser.add_argument("--fractions", nargs="*", type=float, default=[0.1, 0.25, 0.5])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or Path(folder) / "batched"
        weights = str(ASSETS / "weights" / "dinov2_vits14.safetensors")
        anomalydino("batched", "--images", str(ASSETS / "data" / "mvtec"), "--out", str(out), "--weights", weights)
        verdicts = parity(out)
        sampled(out, options.fractions, Path(folder))
    return verdicts.status


if __name__ == "__main__":
    sys.exit(main())
