"""How far scores and patch distances move when nothing but the way of computing them changes.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/reproducibility.py [--images 6]

Each way is a process of its own: bottle (no masks) and screw (masks), one reference image, not rotated, 448
pixels, S/14. Compared with the engine `torch`, the kernel `torch`, 2 threads and batches of 4. The table gives the
largest difference of a patch distance, and of a score relative to itself, over all images.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from contest import ASSETS, WEIGHTS, circumstances

MASKING = {"bottle": "off", "screw": "on"}
BASE = {"engine": "torch", "kernel": "torch", "threads": 2, "batch": 4}
WAYS = {
    "the same again, a fresh process": {},
    "1 thread": {"threads": 1},
    "batches of 1": {"batch": 1},
    "batches of 3": {"batch": 3},
    "kernel tiles_f32": {"kernel": "tiles_f32"},
    "kernel tiles_bf16 (searches low, reports float32)": {"kernel": "tiles_bf16"},
    "kernel tiles_int8 (the same)": {"kernel": "tiles_int8"},
    "engine openvino": {"engine": "openvino"},
    "engine openvino, the same again": {"engine": "openvino", "against": "engine openvino"},
    "engine openvino, 1 thread": {"engine": "openvino", "threads": 1, "against": "engine openvino"},
    "exported ONNX, ONNX Runtime": {"onnx": True},
}


def files(category: str, images: int) -> tuple[Path, list[Path]]:
    """The reference image, and images to score, evenly over the sorted ones."""
    root = ASSETS / "data" / "mvtec" / category
    found = sorted((root / "test").rglob("*.png"))
    places = np.linspace(0, len(found) - 1, images).astype(int)
    return sorted((root / "train" / "good").glob("*.png"))[0], [found[place] for place in places]


def one(way: dict, images: int, out: Path) -> None:
    """Score in this process; patch distances and scores go into a file."""
    from anomalydino_plugin import FewShotModel, load_backbone, read_image

    torch.set_num_threads(way["threads"])
    backbone, found = load_backbone("dinov2_vits14", WEIGHTS), {}
    for category, masking in MASKING.items():
        reference, paths = files(category, images)
        model = FewShotModel(
            backbone,
            rotations="informed",
            masking=masking,
            engine=way["engine"],
            kernel=way["kernel"],
            batch_size=way["batch"],
        )
        model.fit([reference])
        pixels = [read_image(path) for path in paths]
        if way.get("onnx"):
            found |= by_graph(model, category, pixels)
            continue
        features = model.encode([model.prepare(image) for image in pixels])
        for place, own in enumerate(features):
            detection = model.score_features(own, model.plan(pixels[place]))
            found[f"{category}/{place}/distances"] = detection.distances
            found[f"{category}/{place}/score"] = np.array(detection.score)
    np.savez(out, **found)


class WithDistances(torch.nn.Module):
    """What the exported graph computes, and the patch distances beside it."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images):
        from anomalydino_plugin.graph.scores import nearest_distance

        features, foreground, sizes = self.model.traced_patches(images)
        queries = torch.nn.functional.normalize(features, dim=2)
        distances = nearest_distance(queries, self.model.memory.rows, self.model.k) * foreground
        return distances, self.model.traced_prediction(distances, sizes).pred_score


def by_graph(model, category: str, pixels: list) -> dict[str, np.ndarray]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        example = torch.from_numpy(pixels[0]).permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode():
            torch.onnx.export(
                WithDistances(model).eval(), (example,), path, dynamo=True, opset_version=18, verbose=False
            )
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = {}
        for place, image in enumerate(pixels):
            feed = (image.transpose(2, 0, 1)[None] / np.float32(255)).astype(np.float32)
            distances, score = session.run(None, {session.get_inputs()[0].name: feed})
            found[f"{category}/{place}/distances"] = distances.reshape(model.plan(image).grid)
            found[f"{category}/{place}/score"] = score[0]
        return found


def differences(ours: dict, theirs: dict) -> tuple[float, float, bool]:
    """Largest of a patch distance, largest of a score relative to itself, and whether all bits are equal."""
    patch = max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours if name.endswith("distances"))
    score = max(float(abs(ours[name] - theirs[name]) / abs(theirs[name])) for name in ours if name.endswith("score"))
    return patch, score, all(np.array_equal(ours[name], theirs[name]) for name in ours)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(json.loads(options.one[0]), options.images, Path(options.one[1]))
        return 0
    print(circumstances())
    print(f"\n{options.images} images each of bottle and screw.\n")
    print("| way | against | largest difference of a patch distance | of a score, relative | equal bits |")
    print("| --- | --- | --- | --- | --- |")
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, way in {"base": {}, **WAYS}.items():
            out = Path(folder) / "found.npz"
            settings = json.dumps({**BASE, **way})
            line = [sys.executable, __file__, "--images", str(options.images), "--one", settings, str(out)]
            done = subprocess.run(line, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"| {name} | - | {done.stderr.strip().splitlines()[-1][:160]} | | |", flush=True)
                continue
            results[name] = dict(np.load(out))
            if name == "base":
                continue
            against = way.get("against", "base")
            patch, score, equal = differences(results[name], results[against])
            print(f"| {name} | {against} | {patch:.1e} | {score:.1e} | {'yes' if equal else 'no'} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
