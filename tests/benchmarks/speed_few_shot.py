"""One test image, decode to score, bank of 8 rotations of one reference: ours beside the official code.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/speed_few_shot.py --official DIR [--turns 12] [--json FILE]

DIR is a checkout of the official code (and faiss-cpu must be installed). bottle runs without masks, screw with them.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import official_code
from contest import ASSETS, WEIGHTS, Contender, Result, circumstances, compete, table, verdict, write_json

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
    good = True
    for category, masking, resolution, target in CASES:
        ways = {
            "ours, torch": ("torch", "torch"),
            "ours": ("auto", "auto"),
            "ours, bfloat16": ("openvino_bf16", "auto"),
        }
        contenders = [
            Contender("official", official_code.few_shot, (options.official, resolution, category, masking)),
            *(Contender(name, ours, (resolution, category, masking, *way)) for name, way in ways.items()),
        ]
        found = compete(contenders, options.turns)
        name = f"{category}, {resolution} pixels, {'with' if masking else 'without'} mask"
        everything[name] = found
        official, _, default, reduced = found
        off = abs(default.extra / official.extra - 1)
        print(f"## {name}\n\n{table(found, official)}\n")
        print(f"- {verdict('float32 against the official code', default.ratio(official), target)}")
        print(f"- {verdict('bfloat16 engine', reduced.ratio(official), BFLOAT16)}")
        print(f"- score of the last image differs by {off:.1e}\n", flush=True)
        good &= default.ratio(official) >= target and reduced.ratio(official) >= BFLOAT16 and off < 1e-3
    write_json(options.json, everything)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
