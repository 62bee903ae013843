"""Figures of one GPU: encoding, few-shot latency, matching against the measured half-precision product.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/speed_gpu.py [--parts encoding latency matching set] [--small]

Without a GPU every figure is listed as not measured. ``--small`` runs all of it on the CPU at small sizes, the GPU kernel
under Triton's interpreter: that shows that the script works, its figures mean nothing and are held against nothing.

ViT-B and L have untrained weights: their speed does not depend on them. Features to match are random unit rows: so
much work does not exist in the images at hand, and how many rows lie within the search's reach is measured on real ones.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from contest import ASSETS, WEIGHTS, circumstances
from verdicts import Verdicts

ENCODE_AIM, NEAREST_AIM, BATCHED_AIM = 0.40, 0.60, 0.35  # of the measured half-precision product
SET_SECONDS = 60.0  # 1,000 images of 672 pixels against each other
BACKBONES = {"dinov2_vits14": (12, 384), "dinov2_vitb14": (12, 768), "dinov2_vitl14": (24, 1024)}


class Sizes(NamedTuple):
    """How much work."""

    product: int
    backbones: tuple[str, ...]
    resolutions: tuple[int, ...]
    batches: tuple[int, ...]
    encoded: int
    bank_rows: int
    set_images: int
    set_patches: int
    turns: int


FULL = Sizes(8192, tuple(BACKBONES), (448, 672), (16, 32, 64), 512, 131_072, 1000, 2304, 10)
SMALL = Sizes(128, ("dinov2_vits14",), (112,), (1,), 2, 64, 2, 32, 1)


def seconds(work: Callable[[], Any], device: str, turns: int) -> float:
    """Of one turn, the device waited for."""
    import torch

    work()
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(turns):
        work()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / turns


def product_rate(sizes: Sizes, device: str) -> float:
    """FLOP/s of a square half-precision product."""
    import torch

    kind = torch.float16 if device == "cuda" else torch.bfloat16
    left, right = (torch.randn(sizes.product, sizes.product, device=device, dtype=kind) for _ in range(2))
    rate = 2.0 * sizes.product**3 / seconds(lambda: left @ right, device, sizes.turns)
    print(f"Half-precision product of {sizes.product} x {sizes.product}: {rate / 1e12:.2f} TFLOP/s\n")
    return rate


def encode_flop(name: str, resolution: int) -> float:
    layers, width = BACKBONES[name]
    tokens = (resolution // 14) ** 2 + 1
    return 2.0 * layers * (12 * tokens * width**2 + 2 * tokens**2 * width)


def encoding(sizes: Sizes, device: str, ceiling: float, verdicts: Verdicts | None) -> None:
    import torch

    from anomalydino_plugin import PatchModel, load_backbone

    print("## Encoding\n\n| backbone | pixels | best batch | images/s | share of the product |\n" + "| --- " * 5 + "|")
    shares = {}
    for name in sizes.backbones:
        backbone = load_backbone(name, WEIGHTS if name == "dinov2_vits14" else "random:0").to(device)
        for resolution in sizes.resolutions:
            found = {}
            for batch in sizes.batches:
                model = PatchModel(backbone, resolution=resolution, engine="torch_half", batch_size=batch)
                images = [np.zeros((resolution, resolution, 3), np.uint8) for _ in range(sizes.encoded)]
                with contextlib.suppress(torch.OutOfMemoryError):
                    took = seconds(lambda m=model, i=images: m.encode(i), device, max(1, sizes.turns // 2))
                    found[batch] = len(images) / took
            best = max(found, key=lambda size: found[size])
            shares[name, resolution] = found[best] * encode_flop(name, resolution) / ceiling
            share = shares[name, resolution]
            print(f"| {name} | {resolution} | {best} | {found[best]:.1f} | {share:.2f} |", flush=True)
    print()
    for (name, resolution), share in shares.items() if verdicts else []:
        verdicts.at_least(f"encode, {name}, {resolution}: share of the half-precision product", share, ENCODE_AIM)


def latency(sizes: Sizes, device: str, *_: object) -> None:
    """One image, decode to score."""
    from anomalydino_plugin import FewShotModel, load_backbone

    data = ASSETS / "data" / "mvtec" / "bottle"
    print("## Few-shot, batch 1, decode to score\n\n| pixels | engine | ms |\n| --- | --- | --- |")
    for resolution in sizes.resolutions:
        for engine in ("torch", "torch_half"):
            backbone = load_backbone("dinov2_vits14", WEIGHTS).to(device)
            model = FewShotModel(backbone, resolution=resolution, engine=engine, masking="off")
            model.fit([data / "train" / "good" / "000.png"])
            test = data / "test" / "good" / "000.png"
            took = seconds(lambda m=model, t=test: m.score(t), device, sizes.turns)
            print(f"| {resolution} | {engine} | {1e3 * took:.1f} |", flush=True)
    print()


def unit(count: int, device: str, width: int = 384) -> Any:
    import torch

    return torch.nn.functional.normalize(torch.randn(count, width, device=device), dim=1)


def matching(sizes: Sizes, device: str, ceiling: float, verdicts: Verdicts | None) -> None:
    from anomalydino_plugin import nearest, search_rows

    print("## Few-shot matching\n\n| kernel | queries x rows | TFLOP/s | share of the product |\n" + "| --- " * 4 + "|")
    bank = unit(sizes.bank_rows, device)
    shares = {}
    for kernel in ("torch", "triton"):
        rows = search_rows(bank, kernel=kernel)
        for images in (1, 2, 8):
            queries = unit(min(1024 * images, sizes.bank_rows), device)
            took = seconds(lambda r=rows, q=queries: nearest(q, r), device, sizes.turns)
            rate = 2.0 * 384 * len(queries) * len(bank) / took
            shares[kernel] = rate / ceiling
            print(f"| {kernel} | {len(queries)} x {len(bank)} | {rate / 1e12:.3f} | {shares[kernel]:.2f} |", flush=True)
    apart = (nearest(queries, search_rows(bank, kernel="triton")).distances - nearest(queries, bank).distances).abs()
    print(f"\nLargest difference between kernels: {float(apart.max()):.1e}\n")
    if verdicts:
        verdicts.at_least("nearest row, fused: share of the half-precision product", shares["triton"], NEAREST_AIM)
        verdicts.at_most("nearest row, fused: distances off float32", float(apart.max()), 1e-5)


def whole_set(sizes: Sizes, device: str, ceiling: float, verdicts: Verdicts | None) -> None:
    """One image of the set is timed against all; the set takes as many times that."""
    import torch

    from anomalydino_plugin import RunningLowest, block_rows, lowest_count, search_rows

    images, patches = sizes.set_images, sizes.set_patches
    rows, width = images * patches, 384
    count = lowest_count("official", images - 1, rows - patches)
    stored = unit(rows, device).view(images, patches, width)
    print("## Batched zero-shot\n\n| kernel | set | seconds | TFLOP/s |\n| --- | --- | --- | --- |")
    for kernel in ("torch", "triton"):
        step = max(1, block_rows(kernel, device, width) // patches)
        started = time.perf_counter()
        blocks = [
            search_rows(part.reshape(-1, width), [patches] * len(part), kernel) for part in torch.split(stored, step)
        ]
        if device == "cuda":
            torch.cuda.synchronize()
        laid_out = time.perf_counter() - started

        def one(blocks: list = blocks, step: int = step) -> Any:
            lowest = RunningLowest(stored[0], count)
            for number, block in enumerate(blocks):
                lowest.update(block, block.lengths, number * step * patches, 0 if number == 0 else None)
            return lowest.result()

        took = laid_out + seconds(one, device, sizes.turns) * images
        rate = 2.0 * width * patches * rows / (took / images)
        print(f"| {kernel} | {images} x {patches} patches | {took:.1f} | {rate / 1e12:.2f} |", flush=True)
    print()
    if verdicts:
        verdicts.at_most("1,000 images of 672 pixels against each other, s", took, SET_SECONDS)
        verdicts.at_least("batched, fused: share of the half-precision product", rate / ceiling, BATCHED_AIM)


PARTS = {"encoding": encoding, "latency": latency, "matching": matching, "set": whole_set}


def nothing_measured(verdicts: Verdicts) -> None:
    reason = "no GPU at hand"
    for name in BACKBONES:
        for resolution in FULL.resolutions:
            verdicts.not_measured(f"encode, {name}, {resolution}: share of the half-precision product", reason)
    verdicts.not_measured("few-shot latency at batch 1", reason)
    verdicts.not_measured("nearest row, fused: share of the half-precision product", reason)
    verdicts.not_measured("1,000 images of 672 pixels against each other, s", reason)
    verdicts.not_measured("batched, fused: share of the half-precision product", reason)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if options.small:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    print(circumstances(), "\n")
    verdicts = Verdicts()
    if not options.small and not torch.cuda.is_available():
        nothing_measured(verdicts)
        return 0
    device, sizes = ("cpu", SMALL) if options.small else ("cuda", FULL)
    held = None if options.small else verdicts
    with torch.inference_mode():
        ceiling = product_rate(sizes, device)
        for part in options.parts:
            PARTS[part](sizes, device, ceiling, held)
    return verdicts.status


if __name__ == "__main__":
    sys.exit(main())
