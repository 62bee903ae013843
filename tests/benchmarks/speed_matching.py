"""Matching alone: the nearest of 8192 rows for 1024 patches, and batched zero-shot on bottle, each beside its peers.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/speed_matching.py --official DIR [--turns 9] [--json FILE]

Features are bottle's, encoded once; batched zero-shot matches one image a turn against the 82 others. Operations are
2 Q M D. The rate of a kernel is compared with the best plain matrix product found here in the precision it searches in.
"""

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import official_code
from contest import ASSETS, WEIGHTS, Contender, Result, circumstances, compete, table, verdict, write_json

QUERIES, ROWS = 1024, 8192
NEAREST_TARGETS, BATCHED_TARGETS = (3.0, 4.0), (8.0, 15.0, 2.0)
SHARES = {"nearest": 0.60, "batched": 0.35}
MAX_ERROR = 1e-5


def encode_bottle(path: Path) -> None:
    """(83, 1024, 384) float32, not normalised."""
    import torch

    from anomalydino_plugin import PatchModel, load_backbone, read_image

    torch.set_num_threads(2)
    model = PatchModel(load_backbone("dinov2_vits14", WEIGHTS))
    images = sorted((ASSETS / "data" / "mvtec" / "bottle" / "test").rglob("*.png"))
    np.save(path, np.stack([model.encode([model.prepare(read_image(image))])[0].numpy() for image in images]))


def unit(rows: np.ndarray) -> Any:
    import torch

    torch.set_num_threads(2)
    return torch.nn.functional.normalize(torch.from_numpy(rows.astype(np.float32)), dim=-1)


def one_image(features: str) -> tuple[Any, Any]:
    """Queries of one image and a bank of 8 others."""
    stored = np.load(features, mmap_mode="r")
    return unit(stored[20]), unit(stored[:8].reshape(-1, stored.shape[2]))


# The nearest row


def faiss_search(features: str) -> Callable[[int], Any]:
    import faiss

    faiss.omp_set_num_threads(2)
    queries, bank = one_image(features)
    index = faiss.IndexFlatL2(bank.shape[1])
    index.add(bank.numpy())
    return lambda _: index.search(queries.numpy(), k=1)[0][:, 0] / 2


def our_search(features: str, kernel: str) -> Callable[[int], Any]:
    from anomalydino_plugin import nearest, search_rows

    queries, bank = one_image(features)
    rows = search_rows(bank, kernel=kernel)
    return lambda _: nearest(queries, rows).distances[:, 0].numpy()


def product(precision: str, library: str) -> Callable[[int], None]:
    """A plain matrix product of the same size."""
    import torch

    torch.set_num_threads(2)
    left, right = torch.randn(QUERIES, 384), torch.randn(ROWS, 384)
    if library == "torch":
        kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
        left, right = left.to(kind), right.to(kind).T
        return lambda _: (left @ right).shape and None
    import openvino
    from openvino import opset13

    a, b = (opset13.parameter(list(part.shape), np.float32) for part in (left, right))
    hint = {"float32": "f32", "bfloat16": "bf16"}[precision]
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": 2, "NUM_STREAMS": 1}
    maxima = opset13.reduce_max(opset13.matmul(a, b, False, True), np.array([1]), False)
    request = openvino.Core().compile_model(openvino.Model([maxima], [a, b]), "CPU", settings).create_infer_request()
    inputs = [left.numpy(), right.numpy()]
    return lambda _: request.infer(inputs, share_inputs=True) and None


# Batched zero-shot


def blocked_products(features: str) -> Callable[[int], Any]:
    """What one would write first: float32 blocks, and the lowest of each joined by topk."""
    import torch

    stored = [unit(image) for image in np.load(features)]

    def match(turn: int) -> Any:
        own = turn * 7 % len(stored)
        others = torch.cat([image for place, image in enumerate(stored) if place != own])
        count = max(1, int(0.001 * len(others)) - 1)
        best = torch.full((len(stored[own]), count), -2.0)
        for block in torch.split(others, 8192):
            best = torch.cat([best, stored[own] @ block.T], dim=1).topk(count, dim=1).values
        return (1 - best).mean(dim=1).numpy()

    return match


def our_batched(features: str, kernel: str) -> Callable[[int], Any]:
    import torch

    from anomalydino_plugin import RunningLowest, block_rows, lowest_count, search_rows

    stored = unit(np.load(features))
    patches = stored.shape[1]
    count = lowest_count("official", len(stored) - 1, (len(stored) - 1) * patches)
    step = block_rows(kernel) // patches
    blocks = [
        (first, search_rows(part.reshape(-1, part.shape[2]), [patches] * len(part), kernel))
        for first, part in ((start, stored[start : start + step]) for start in range(0, len(stored), step))
    ]

    @torch.inference_mode()
    def match(turn: int) -> Any:
        own = turn * 7 % len(stored)
        lowest = RunningLowest(stored[own], count)
        for first, rows in blocks:
            inside = own - first if first <= own < first + len(rows.lengths) else None
            lowest.update(rows, rows.lengths, first * patches, inside)
        return lowest.result().distances.numpy()

    return match


def rates(results: list[Result], flop: float) -> str:
    return ", ".join(f"{result.name} {flop / result.median / 1e9:.0f}" for result in results) + " GFLOP/s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", required=True)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(circumstances(), "\n")
    reached = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bottle.npy"
        # In a process of its own: on Linux the peak memory of a child starts at its parent's.
        encoder = multiprocessing.get_context("spawn").Process(target=encode_bottle, args=(path,))
        encoder.start()
        encoder.join()
        features = str(path)
        ceilings = compete(
            [
                Contender(f"{precision}, {library}", product, (precision, library))
                for precision in ("float32", "bfloat16")
                for library in ("torch", "openvino")
            ],
            options.turns,
        )
        flop = 2.0 * QUERIES * ROWS * 384
        ceiling = {
            precision: max(flop / result.median for result in ceilings if result.name.startswith(precision))
            for precision in ("float32", "bfloat16")
        }
        print(f"Matrix products of {QUERIES} x {ROWS} x 384: {rates(ceilings, flop)}\n")
        near = compete(
            [
                Contender("faiss IndexFlatL2", faiss_search, (features,)),
                *(Contender(name, our_search, (features, name)) for name in ("torch", "tiles_f32", "tiles_bf16")),
            ],
            3 * options.turns,
        )
        queries, bank = one_image(features)
        exact = (1 - queries.double() @ bank.double().T).min(dim=1).values.clamp(0, 2).numpy()
        print(f"## {QUERIES} queries, {ROWS} rows, the nearest\n\n{table(near, near[0], 'ms', 1e3)}\n")
        for result in near:
            print(f"- {result.name}: distances within {np.abs(result.extra - exact).max():.1e} of float64")
        print(f"- rates: {rates(near, flop)}")
        for target in NEAREST_TARGETS:
            print(f"- {verdict('tiles_bf16 against faiss', near[3].ratio(near[0]), target)}")
        share = flop / near[3].median / ceiling["bfloat16"]
        print(f"- {verdict('share of the bfloat16 matrix product', share, SHARES['nearest'])}\n", flush=True)
        reached += [near[3].ratio(near[0]) >= NEAREST_TARGETS[0], share >= SHARES["nearest"]]
        reached.append(np.abs(near[3].extra - exact).max() <= MAX_ERROR)

        many = compete(
            [
                Contender("official", official_code.batched, (options.official, features)),
                Contender("blocked float32 products", blocked_products, (features,)),
                *(Contender(name, our_batched, (features, name)) for name in ("torch", "tiles_f32", "tiles_bf16")),
            ],
            options.turns,
        )
        official, blocked, ours = many[0], many[1], many[4]
        flop = 2.0 * 1024 * 82 * 1024 * 384
        print(f"## Batched zero-shot, bottle: one image against 82\n\n{table(many, official)}\n")
        for result in many[1:]:
            print(
                f"- {result.name}: distances within {np.abs(result.extra - official.extra).max():.1e} of the official"
            )
        print(f"- rates: {rates(many, flop)}")
        share = flop / ours.median / ceiling["bfloat16"]
        print(f"- {verdict('tiles_bf16 against the official code', ours.ratio(official), BATCHED_TARGETS[0])}")
        print(f"- {verdict('where reduced distances would do', ours.ratio(official), BATCHED_TARGETS[1])}")
        print(f"- {verdict('against blocked products', ours.ratio(blocked), BATCHED_TARGETS[2])}")
        print(f"- {verdict('share of the bfloat16 matrix product', share, SHARES['batched'])}")
        memory = official.peak_bytes / ours.peak_bytes
        print(f"- {verdict('peak memory of the official code over ours', memory, 3.0)}")
        reached += [ours.ratio(official) >= BATCHED_TARGETS[0], ours.ratio(blocked) >= BATCHED_TARGETS[2]]
        reached += [share >= SHARES["batched"], memory >= 3.0]
        write_json(options.json, {"products": ceilings, "nearest": near, "batched": many})
    return int(not all(reached))


if __name__ == "__main__":
    sys.exit(main())
