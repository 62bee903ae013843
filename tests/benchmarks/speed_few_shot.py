"""One test image, decode to score, bank of 8 rotations of one reference: ours beside the official code and the built-in model.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/speed_few_shot.py --official DIR [--turns 12] [--json FILE]

DIR is a checkout of the official code (and faiss-cpu must be installed). bottle runs without masks, screw with them.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import builtin_model
import official_code
from contest import ASSETS, WEIGHTS, Contender, Result, circumstances, compete, engine_missing, table, write_json
from verdicts import Verdicts

CASES = [("bottle", False, 448, 2.0), ("screw", True, 448, 2.5), ("bottle", False, 672, 2.0), ("screw", True, 672, 2.5)]
BFLOAT16 = 3.0


def ours(resolution: int, category: str, masking: bool, engine: str, kernel: str) -> Callable[[int], float]:
    import torch

    from anomalydino_plugin import FewShotModel, load_backbone

    torch.set_num_threads(2)
    data = ASSETS / "data" / "mvtec" / category
    backbone = load_backbone("dinov2_vits14", WEIGHTS)
    model = FewShotModel(
        backbone, resolution=resolution, masking="on" if masking else "off", engine=engine, kernel=kernel
    )
    model.fit([data / "train" / "good" / "000.png"])
    tests = sorted((data / "test").rglob("*.png"))
    return lambda turn: model.score(tests[turn * 7 % len(tests)]).score


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", required=True)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(circumstances(), "\n")
    everything: dict[str, list[Result]] = {}
    verdicts = Verdicts()
    ways = {"ours, torch": ("torch", "torch"), "ours": ("auto", "auto")}
    if not (missing := engine_missing("openvino_bf16")):
        ways["ours, bfloat16"] = ("openvino_bf16", "auto")
    for category, masking, resolution, aim in CASES:
        contenders = [
            Contender("official", official_code.few_shot, (options.official, resolution, category, masking)),
            Contender("built-in", builtin_model.few_shot, (resolution, category)),
            *(Contender(name, ours, (resolution, category, masking, *way)) for name, way in ways.items()),
        ]
        found = {result.name: result for result in compete(contenders, options.turns)}
        name = f"{category}, {resolution} pixels, {'with' if masking else 'without'} mask"
        everything[name] = list(found.values())
        official = found["official"]
        print(f"## {name}\n\n{table(everything[name], official)}\n")
        verdicts.at_least(f"{name}: against the official code", found["ours"].ratio(official), aim)
        verdicts.at_least(f"{name}: against the built-in model", found["ours"].ratio(found["built-in"]), 1.0)
        if "ours, bfloat16" in found:
            verdicts.at_least(f"{name}: bfloat16 engine", found["ours, bfloat16"].ratio(official), BFLOAT16)
        else:
            verdicts.not_measured(f"{name}: bfloat16 engine", missing)
        verdicts.at_most(f"{name}: score off", abs(found["ours"].extra / official.extra - 1), 1e-3)
        print()
    write_json(options.json, everything)
    return verdicts.status


if __name__ == "__main__":
    sys.exit(main())
