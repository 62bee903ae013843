"""Every engine's features and scores against the official code's figures (golden/stages)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from anomalydino_plugin import FewShotModel, prepare_image, read_image
from anomalydino_plugin.engines.choice import load_engine

CASES = {
    "bottle_broken_large_000_672": "mvtec/bottle/test/broken_large/000.png",
    "cookie_nonsquare_448": "cookie_nonsquare/test/anomaly/anomaly-1.jpg",
    "screw_good_000_448": "mvtec/screw/test/good/000.png",
}
FEATURE_TOLERANCE = {"torch": 1e-4, "openvino": 1e-4, "openvino_bf16": 0.2, "torch_half": 0.2}


def relative(found: torch.Tensor, expected: np.ndarray) -> float:
    gap = np.linalg.norm(found.numpy().reshape(expected.shape) - expected, axis=-1)
    return float((gap / np.linalg.norm(expected, axis=-1)).max())


@pytest.mark.parametrize("engine", FEATURE_TOLERANCE)
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_features(assets: Path, dinov2, case, engine):
    if engine.startswith("openvino"):
        pytest.importorskip("openvino")
    golden = np.load(assets / "golden" / "stages" / f"{case}.npz")["patch_features"]
    prepared = prepare_image(read_image(assets / "data" / CASES[case]), int(case.rpartition("_")[2]), 14)
    found = load_engine(engine, dinov2)(prepared.reshape(1, *prepared.shape[-3:]))
    assert relative(found, golden) <= FEATURE_TOLERANCE[engine]


@pytest.mark.parametrize("engine", ["torch", "openvino"])
@pytest.mark.parametrize("kernel", ["torch", "auto"])
def test_scores_of_real_images(assets: Path, dinov2, engine, kernel):
    if engine == "openvino":
        pytest.importorskip("openvino")
    golden = json.loads((assets / "golden" / "fewshot_448_1shot.json").read_text())["screw"]["0"]["scores"]
    data = assets / "data" / "mvtec" / "screw"
    model = FewShotModel(dinov2, masking="on", engine=engine, kernel=kernel).fit([data / "train" / "good" / "000.png"])
    for name in list(golden)[:: len(golden) // 3]:
        assert model.score(data / "test" / name).score == pytest.approx(golden[name], rel=1e-4)
