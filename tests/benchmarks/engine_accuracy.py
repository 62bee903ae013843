"""What each engine does to scores and AUROC: `anomalydino score` on bottle and screw, 1 shot, 448 pixels, seed 0.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/engine_accuracy.py [--engines torch openvino ...]

Beside the official code's scores (golden/fewshot_448_1shot.json); masks for screw, none for bottle, as there.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
from contest import ASSETS, WEIGHTS, circumstances, engine_missing
from sklearn.metrics import roc_auc_score
from verdicts import Verdicts

MASKING = {"bottle": "off", "screw": "on"}
MAX_POINTS = 0.1
REDUCED = ("openvino_bf16", "torch_half")  # the latter rounds to bfloat16 on any CPU, slowly where it has none


def score(engine: str, category: str, out: Path) -> dict[str, float]:
    words = ["score", "--images", str(ASSETS / "data" / "mvtec"), "--category", category, "--out", str(out)]
    words += ["--weights", WEIGHTS, "--engine", engine, "--masking", MASKING[category], "--shots", "1"]
    subprocess.run([sys.executable, "-m", "jobs.cli", *words], check=True, stdout=sys.stderr)
    files = sorted((out / "scores" / category).iterdir())
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return {"/".join(row["uri"].split("/")[-2:]): row["score"] for row in rows}


def auroc(scores: dict[str, float]) -> float:
    return 100 * roc_auc_score([not name.startswith("good/") for name in scores], list(scores.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", default=["torch", "openvino", *REDUCED])
    options = parser.parse_args()
    print(circumstances(), "\n")
    print("| category | engine | AUROC of reference | ours | largest score difference | seconds in the encoder |")
    print("| --- | --- | --- | --- | --- | --- |")
    verdicts, off, moved = Verdicts(), [], []
    absent = {engine: reason for engine in options.engines if (reason := engine_missing(engine))}
    golden = json.loads((ASSETS / "golden" / "fewshot_448_1shot.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        for category in MASKING:
            reference = golden[category]["0"]
            for engine in (name for name in options.engines if name not in absent):
                out = Path(folder) / f"{category}-{engine}"
                found = score(engine, category, out)
                gap = max(abs(found[name] / value - 1) for name, value in reference["scores"].items())
                records = [json.loads(path.read_text()) for path in (out / ".state/score/done").rglob("*.json")]
                seconds = sum(record["seconds"] for record in records)
                points = abs(auroc(found) - 100 * reference["auroc"])
                (moved if engine in REDUCED else off).append((category, engine, gap, points))
                print(
                    f"| {category} | {engine} | {100 * reference['auroc']:.2f} | {auroc(found):.2f} | {gap:.1e} | "
                    f"{seconds:.0f} |",
                    flush=True,
                )
    print()
    for category, engine, gap, points in off:
        verdicts.at_most(f"engine {engine}, {category}: relative difference of a score", gap, 1e-4)
        verdicts.at_most(f"engine {engine}, {category}: points of AUROC off", points, MAX_POINTS)
    for category, engine, gap, points in moved:
        verdicts.report(f"engine {engine}, {category}: relative difference of a score", gap)
        verdicts.report(f"engine {engine}, {category}: points of AUROC off", points)
    for engine, reason in absent.items():
        verdicts.not_measured(f"engine {engine}", reason)
    return verdicts.status


if __name__ == "__main__":
    sys.exit(main())
