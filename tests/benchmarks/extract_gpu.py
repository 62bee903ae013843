"""`extract` on one GPU: images a second once it runs, and seconds for all.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/extract_gpu.py [--images 1500] [--workers 1 2]

Copies of bottle's test images, masks on as by default, through the command. The rate is that of the images committed
after the first shard, so that the start of Ray and of the workers is not in it. ViT-B and L have untrained weights.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from contest import ASSETS, WEIGHTS, circumstances

SHARD = 64
BACKBONES = ("dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14")


def copies(folder: Path, count: int) -> Path:
    images = folder / "images"
    images.mkdir()
    sources = sorted((ASSETS / "data" / "mvtec" / "bottle" / "test").rglob("*.png"))
    for number in range(count):
        shutil.copy(sources[number % len(sources)], images / f"{number:05d}.png")
    return images


def extract(images: Path, out: Path, backbone: str, resolution: int, workers: int) -> tuple[float, float]:
    """Images a second after the first shard, and seconds of the command."""
    words = ["extract", "--images", str(images), "--out", str(out), "--engine", "torch_half", "--backbone", backbone]
    words += ["--weights", WEIGHTS if backbone == "dinov2_vits14" else "random:0", "--resolution", str(resolution)]
    words += ["--shard-size", str(SHARD), "--num-workers", str(workers), "--gpus-per-worker", str(1 / workers)]
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "jobs.cli", *words], check=True, stdout=sys.stderr)
    took = time.perf_counter() - started
    ends = sorted(path.stat().st_mtime for path in (out / ".state" / "extract" / "done").rglob("*.json"))
    return (len(ends) - 1) * SHARD / (ends[-1] - ends[0]), took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--backbones", nargs="+", default=BACKBONES)
    options = parser.parse_args()
    print(circumstances(), "\n")
    print("| backbone | pixels | workers on the GPU | images/s | s for all |\n" + "| --- " * 5 + "|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = copies(folder, options.images // SHARD * SHARD)  # whole shards
        for backbone in options.backbones:
            for resolution in (448, 672):
                for workers in options.workers:
                    out = folder / f"{backbone}-{resolution}-{workers}"
                    rate, took = extract(images, out, backbone, resolution, workers)
                    shutil.rmtree(out)
                    print(f"| {backbone} | {resolution} | {workers} | {rate:.0f} | {took:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
