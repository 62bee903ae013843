"""Ways to match patches, for `speed_matching.py`: each sets itself up in its own process and takes turns."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from contest import ASSETS, WEIGHTS

QUERIES, ROWS = 1024, 8192


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
    return torch.nn.functional.normalize(torch.from_numpy(rows.astype(np.float32, copy=False)), dim=-1)


def one_image(features: str) -> tuple[Any, Any]:
    """Queries of one image and a bank of 8 others."""
    stored = np.load(features, mmap_mode="c")
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
    if precision == "int8":
        left, right = ((127 * torch.nn.functional.normalize(part)).char() for part in (left, right))
        right = right.T
        return lambda _: torch._int_mm(left, right).shape and None  # into 32 bits
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

    stored = [unit(image) for image in np.load(features, mmap_mode="c")]

    def match(turn: int) -> Any:
        own = turn * 7 % len(stored)
        others = torch.cat([image for place, image in enumerate(stored) if place != own])
        count = max(1, int(0.001 * len(others)) - 1)
        best = torch.full((len(stored[own]), count), -2.0)
        for block in torch.split(others, 8192):
            best = torch.cat([best, stored[own] @ block.T], dim=1).topk(count, dim=1).values
        return (1 - best).mean(dim=1).numpy()

    return match


def exact_batched(features: str, turn: int) -> np.ndarray:
    """What a turn's image should come out at, summed in float64."""
    import torch

    from anomalydino_plugin import lowest_count

    stored = unit(np.load(features))
    own = turn * 7 % len(stored)
    others = torch.cat([image for place, image in enumerate(stored) if place != own])
    count = lowest_count("official", len(stored) - 1, len(others))
    parts = [(1 - (part.double() @ others.double().T).topk(count, dim=1).values) for part in stored[own].split(128)]
    return torch.cat(parts).mean(dim=1).numpy()


SHARD = 16  # images that are matched in one pass over the references


def our_batched(features: str, kernel: str, mode: str = "official") -> Callable[[int], Any]:
    """Some images against all others, a block at a time from the disk, as `anomalydino match` does it.

    Reading and laying out the blocks is part of the turn. Returns the distances of the shard's first image.
    """
    import torch

    from anomalydino_plugin import RunningLowest, block_rows, lowest_count, search_rows

    images, patches, width = np.load(features, mmap_mode="c").shape
    count = lowest_count(mode, images - 1, (images - 1) * patches)
    step = block_rows(kernel) // patches

    def read(first: int, number: int) -> Any:
        """Not through a map of the file, whose pages would count as this process's memory."""
        with Path(features).open("rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            file.seek(4 * first * patches * width, 1)
            return unit(np.fromfile(file, np.float32, number * patches * width).reshape(-1, width))

    @torch.inference_mode()
    def match(turn: int) -> Any:
        shard = [(turn * 7 + place) % images for place in range(SHARD)]
        running = [RunningLowest(read(own, 1), count, mode) for own in shard]
        for first in range(0, images, step):
            number = min(step, images - first)
            rows = search_rows(read(first, number), [patches] * number, kernel)
            for own, lowest in zip(shard, running, strict=True):
                inside = own - first if first <= own < first + number else None
                lowest.update(rows, rows.lengths, first * patches, inside)
            del rows  # as `jobs.matcher` does, before the next block
        return running[0].result().distances.numpy()

    return match


def our_set(features: str, kernel: str) -> Callable[[int], Any]:
    """The whole set at once, as `BatchedModel` does it; returns the turn's image."""
    import torch

    from anomalydino_plugin import match_set

    stored = unit(np.load(features))

    @torch.inference_mode()
    def match(turn: int) -> Any:
        return match_set(stored, kernel=kernel)[turn * 7 % len(stored)].distances.numpy()

    return match


def musc(folder: str, features: str) -> Callable[[int], Any]:
    """MuSc's mutual scoring (its faster form) of one image against all others, from a checkout outside of here."""
    path = Path(folder) / "models" / "modules" / "_MSM.py"
    spec = importlib.util.spec_from_file_location("msm", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stored = unit(np.load(features))
    # Its distances are Euclidean: of unit rows, sqrt(2 - 2 cosine).
    return lambda turn: module.compute_scores_fast(stored, turn * 7 % len(stored), "cpu").numpy()
