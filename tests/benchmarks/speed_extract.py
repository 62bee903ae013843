"""`extract` beside encoding alone: the same images, the same engine, in turns.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/speed_extract.py [--rounds 3] [--images 83] [--shard-size 8]

Encoding alone is the time in the engine on images that are decoded and resized already, in batches as `extract` has
them. `extract` is its work from the first worker's readiness to the last completion record: read, decode, resize,
encode, masks, Parquet. Both begin with a loaded backbone, so that both hold the engine's first use. Bottle's test
images (83), then screw's (160), masks on as by default, in shards of a few: what fills one shard is decoded before its
first image is encoded.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from contest import ASSETS, WEIGHTS, circumstances, engine_missing
from verdicts import Verdicts

TARGET = 1.18


def sources(count: int) -> list[Path]:
    tests = (ASSETS / "data" / "mvtec" / category / "test" for category in ("bottle", "screw"))
    return [path for test in tests for path in sorted(test.rglob("*.png"))][:count]


def encode_alone(engine: str, count: int) -> float:
    import torch

    from anomalydino_plugin import PatchModel, load_backbone, read_image

    torch.set_num_threads(2)
    model = PatchModel(load_backbone("dinov2_vits14", WEIGHTS), engine=engine, batch_size=4)
    prepared = [model.prepare(read_image(path)) for path in sources(count)]
    started = time.perf_counter()
    for start in range(0, count, 4):
        model.encode(prepared[start : start + 4])
    return time.perf_counter() - started


def extract(engine: str, images: Path, out: Path, shard_size: int) -> float:
    words = ["extract", "--images", str(images), "--out", str(out), "--weights", WEIGHTS, "--engine", engine]
    words += ["--shard-size", str(shard_size)]
    subprocess.run([sys.executable, "-m", "jobs.cli", *words], check=True, stdout=sys.stderr)
    paths = sorted((out / ".state" / "extract" / "done").rglob("*.json"))
    records = [json.loads(path.read_text()) for path in paths]
    first = min(records, key=lambda record: record["worker_ready"])
    end = max(path.stat().st_mtime for path in paths)
    return end - first["worker_ready"] + first.get("decode_seconds", 0.0)


def in_process(engine: str, count: int) -> float:
    command = [sys.executable, __file__, "--one", engine, "--images", str(count)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=83)
    parser.add_argument("--shard-size", type=int, default=8)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(encode_alone(options.one, options.images))
        return 0
    print(circumstances(), "\n")
    print("| engine | encoding alone, s | extract, s | ratio, median |\n| --- | --- | --- | --- |")
    reached = 0.0
    engines = [name for name in ("openvino", "openvino_bf16") if not engine_missing(name)]
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        for number, path in enumerate(sources(options.images)):
            shutil.copy(path, images / f"{number:03d}.png")
        for engine in engines:
            found = []
            for turn in range(options.rounds):
                alone = in_process(engine, options.images)
                whole = extract(engine, images, Path(folder) / f"{engine}-{turn}", options.shard_size)
                found.append((alone, whole))
            ratio = statistics.median(whole / alone for alone, whole in found)
            reached = reached or ratio
            alone, whole = (", ".join(f"{pair[side]:.1f}" for pair in found) for side in (0, 1))
            print(f"| {engine} | {alone} | {whole} | {ratio:.3f} |", flush=True)
    print()
    verdicts = Verdicts()
    verdicts.at_most("extract over encoding alone, float32", reached, TARGET)
    if "openvino_bf16" not in engines:
        verdicts.not_measured("extract over encoding alone, bfloat16", "the processor has no bfloat16")
    return verdicts.status


if __name__ == "__main__":
    sys.exit(main())
