"""Exported models beside torch: how far scores, maps and labels move, how long an image takes, how large the files are.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/export_figures.py [--images 20] [--categories bottle screw]

Prints a Markdown table for docs. Differences are on raw values (before ``s / (s + t)``), against torch in eager mode.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from verdicts import Verdicts

ASSETS = Path(os.environ.get("ANOMALYDINO_ASSETS", "../shared")).resolve()
WEIGHTS = str(ASSETS / "weights" / "dinov2_vits14.safetensors")
SCORE_TOLERANCE, MAP_TOLERANCE = 1e-3, 1e-2  # relative; of the map's range
MASKING = {"screw": "on", "bottle": "off"}
Arrays = dict[str, np.ndarray]
Runner = Callable[[np.ndarray], Arrays]


class Outcome(NamedTuple):
    """One way over all images: raw scores, raw maps, labels, seconds of each image."""

    scores: list[float]
    maps: list[np.ndarray]
    labels: list[bool]
    seconds: list[float]


def spread(paths: list[Path], count: int) -> list[Path]:
    """So many of the sorted paths, evenly spaced."""
    paths = sorted(paths)
    return [paths[index] for index in np.linspace(0, len(paths) - 1, min(count, len(paths))).round().astype(int)]


def choose(root: Path, count: int) -> tuple[list[Path], list[bool]]:
    """Half good images, half with defects, and which have them."""
    good = spread(list(root.glob("test/good/*.png")), count // 2)
    bad = spread([path for path in root.glob("test/*/*.png") if path.parent.name != "good"], count - count // 2)
    return good + bad, [False] * len(good) + [True] * len(bad)


def fitted(category: str) -> Any:
    """One reference image; thresholds from the references, as in ``Engine.fit``."""
    from anomalydino_plugin import AnomalyDINOFewShot, calibrate

    model = AnomalyDINOFewShot(weights=WEIGHTS, masking=MASKING[category])
    model.model.fit([sorted((ASSETS / "data" / "mvtec" / category / "train" / "good").iterdir())[0]])
    calibration = calibrate(model.model, false_alarm=model.false_alarm)
    model.post_processor.calibrate(calibration.scores, calibration.peaks, model.false_alarm)
    return model.eval()


def eager(model: Any) -> Runner:
    def run(images: np.ndarray) -> Arrays:
        with torch.inference_mode():
            return {name: value.numpy() for name, value in model(torch.from_numpy(images))._asdict().items()}

    return run


def onnxruntime_runner(path: Path) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(None, {"input": images}), strict=True))


def openvino_runner(path: Path, hint: str | None) -> tuple[Runner, str]:
    """A runner, and the precision that it computes in."""
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": hint} if hint else {})
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    return lambda images: {
        next(iter(key.names)): value for key, value in compiled({"input": images}).items()
    }, precision


def raw(normalised: np.ndarray, threshold: float) -> np.ndarray:
    """Inverse of ``s / (s + t)``."""
    values = normalised.astype(np.float64)
    return threshold * values / (1 - values)


def measure(run: Runner, paths: list[Path], thresholds: tuple[float, float]) -> Outcome:
    from anomalydino_plugin import read_image

    outcome = Outcome([], [], [], [])
    for index, path in enumerate([paths[0], *paths]):  # the first one warms up
        images = read_image(path).transpose(2, 0, 1)[None].astype(np.float32) / 255
        started = time.perf_counter()
        arrays = run(images)
        seconds = time.perf_counter() - started
        if index:
            outcome.seconds.append(seconds)
            outcome.scores.append(float(raw(arrays["pred_score"].reshape(-1), thresholds[0])[0]))
            outcome.maps.append(raw(arrays["anomaly_map"].squeeze(), thresholds[1]).astype(np.float32))
            outcome.labels.append(bool(arrays["pred_label"].reshape(-1)[0]))
    return outcome


def row(category: str, way: str, found: Outcome, expected: Outcome, defects: list[bool], size: int) -> int:
    """Prints it; returns how many images are beyond tolerance."""
    scores = [abs(one / other - 1) for one, other in zip(found.scores, expected.scores, strict=True)]
    areas = [
        float(np.abs(one - other).max() / np.ptp(other)) for one, other in zip(found.maps, expected.maps, strict=True)
    ]
    beyond = sum(one > SCORE_TOLERANCE or other > MAP_TOLERANCE for one, other in zip(scores, areas, strict=True))
    labels = sum(one != other for one, other in zip(found.labels, expected.labels, strict=True))
    auroc = 100 * roc_auc_score(defects, found.scores)
    same = found is expected
    print(
        f"| {category} | {way} | {'-' if same else f'{max(scores):.1e}'} | {'-' if same else f'{max(areas):.1e}'} | "
        f"{'-' if same else beyond} | {'-' if same else labels} | {auroc:.2f} | {statistics.median(found.seconds):.2f} | {size / 1e6:.0f} |",
        flush=True,
    )
    return beyond


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def report(category: str, count: int) -> int:
    """Rows of a category; returns how many images are beyond tolerance where the graph runs in float32."""
    paths, defects = choose(ASSETS / "data" / "mvtec" / category, count)
    model = fitted(category)
    thresholds = (float(model.post_processor.image_threshold), float(model.post_processor.pixel_threshold))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        files = {name: getattr(model, f"to_{name}")(root) for name in ("torch", "onnx", "openvino")}
        sizes = {name: bytes_of(path.parent) for name, path in files.items()}
        expected = measure(eager(model), paths, thresholds)
        row(category, "torch, eager", expected, expected, defects, sizes["torch"])
        found = measure(onnxruntime_runner(files["onnx"]), paths, thresholds)
        beyond = row(category, "ONNX Runtime", found, expected, defects, sizes["onnx"])
        for hint in ("f32", None):
            run, precision = openvino_runner(files["openvino"], hint)
            found = measure(run, paths, thresholds)
            way = f"OpenVINO {precision}" if hint else f"OpenVINO default ({precision})"
            own = row(category, way, found, expected, defects, sizes["openvino"])
            beyond += own if hint else 0
    return beyond


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=20, help="of each category; half good, half with defects")
    parser.add_argument("--categories", nargs="+", default=["screw", "bottle"], choices=sorted(MASKING))
    options = parser.parse_args()
    if options.images < 2:
        parser.error("--images: expected at least 2, one good and one with a defect")
    print(
        f"{options.images} images of each category, {os.cpu_count()} CPUs, {platform.processor() or platform.machine()}\n"
    )
    print(
        "| category | way | largest score difference | largest map difference | images beyond tolerance | labels that "
        "differ | AUROC | s / image | MB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    beyond = [report(category, options.images) for category in options.categories]
    print()
    verdicts = Verdicts()
    verdicts.at_most("exported to ONNX and OpenVINO, float32: images beyond tolerance", sum(beyond), 0)
    return verdicts.status


if __name__ == "__main__":
    sys.exit(main())
