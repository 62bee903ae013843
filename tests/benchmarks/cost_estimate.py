"""What `match` says it will cost, and what it took, on sets of several sizes.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/cost_estimate.py [--stored OUT] [--rounds 3]

OUT is an output folder of `extract` or `batched` on bottle and screw; made if not given. The sets: bottle, screw, and
three sampled ones of screw.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from contest import ASSETS, WEIGHTS, circumstances
from verdicts import Verdicts

WITHIN = 1.5  # times the estimate, either way
SETS = [("bottle", None), ("screw", None), ("screw", 80), ("screw", 40), ("screw", 16)]


def anomalydino(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "jobs.cli", *words], check=True, stdout=sys.stderr)


def cost(stored: Path, category: str, references: int | None, out: Path) -> dict:
    more = [] if references is None else ["--max-references", str(references)]
    anomalydino("match", "--embeddings", str(stored), "--category", category, "--out", str(out), *more)
    return json.loads((out / "job.json").read_text())["stages"]["match"]["cost"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stored", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(circumstances(), "\n")
    print("| set | TFLOP | estimated, s | took, s | took / estimated, median |\n| --- | --- | --- | --- | --- |")
    verdicts, off = Verdicts(), []
    with tempfile.TemporaryDirectory() as folder:
        stored = options.stored or Path(folder) / "stored"
        if options.stored is None:
            images = str(ASSETS / "data" / "mvtec")
            anomalydino("extract", "--images", images, "--out", str(stored), "--weights", WEIGHTS)
        for category, references in SETS:
            found = [
                cost(stored, category, references, Path(folder) / f"{category}-{references}-{turn}")
                for turn in range(options.rounds)
            ]
            ratio = statistics.median(one["seconds"] / one["estimate"]["seconds"] for one in found)
            off.append((max(ratio, 1 / ratio), category, references))
            name = category if references is None else f"{category}, {references} references"
            estimated = ", ".join(f"{one['estimate']['seconds']:.1f}" for one in found)
            took = ", ".join(f"{one['seconds']:.1f}" for one in found)
            print(
                f"| {name} | {found[0]['estimate']['flop'] / 1e12:.2f} | {estimated} | {took} | {ratio:.2f} |",
                flush=True,
            )
    print()
    verdicts.at_most("estimate of matching, times off either way", max(off)[0], WITHIN)
    return verdicts.status


if __name__ == "__main__":
    sys.exit(main())
