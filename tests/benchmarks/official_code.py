"""The official code (dammsi/AnomalyDINO) from a folder outside of the repository, on our weights.

Its backbone comes from torch's hub, which asks the network; here the hub hands out our own torch backbone, which is at
least as fast on a CPU (fused attention).
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from contest import ASSETS, WEIGHTS


def wrapper(folder: str, resolution: int) -> Any:
    """Its DINOv2Wrapper."""
    import torch

    from anomalydino_plugin import load_backbone

    sys.path.insert(0, folder)
    backbone = load_backbone("dinov2_vits14", WEIGHTS)

    class Hub(torch.nn.Module):
        patch_size = 14

        def get_intermediate_layers(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            return (backbone(images),)

    with patch("torch.hub.load", lambda *_: Hub()):
        from src.backbones import get_model

        return get_model("dinov2_vits14", "cpu", smaller_edge_size=resolution)


def few_shot(folder: str, resolution: int, category: str, masking: bool) -> Callable[[int], float]:
    """Scores one test image a turn, with its own functions in the order of its run_anomaly_detection."""
    import cv2
    import faiss
    import numpy as np
    import torch

    torch.set_num_threads(2)
    faiss.omp_set_num_threads(2)
    model = wrapper(folder, resolution)
    from src.post_eval import mean_top1p
    from src.utils import augment_image

    def read(path: Path) -> Any:
        return cv2.cvtColor(cv2.imread(str(path), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)

    data = ASSETS / "data" / "mvtec" / category
    views = augment_image(read(data / "train" / "good" / "000.png"))
    rows = np.concatenate([model.extract_features(model.prepare_image(view)[0]) for view in views]).astype("float32")
    index = faiss.IndexFlatL2(rows.shape[1])
    faiss.normalize_L2(rows)
    index.add(rows)
    tests = sorted((data / "test").rglob("*.png"))

    def score(turn: int) -> float:
        tensor, grid = model.prepare_image(read(tests[turn * 7 % len(tests)]))
        features = model.extract_features(tensor)
        kept = np.ones(len(features), bool)
        if masking:
            kept = model.compute_background_mask(features, grid, threshold=10, masking_type=True)
        features = features[kept]
        faiss.normalize_L2(features)
        distances, _ = index.search(features, k=1)
        whole = np.zeros_like(kept, dtype=float)
        whole[kept] = (distances / 2).squeeze()
        return float(mean_top1p(whole.flatten()))

    return score


def batched(folder: str, features: str) -> Callable[[int], Any]:
    """Matches one image a turn against all others."""
    import numpy as np
    import torch

    torch.set_num_threads(2)
    sys.path.insert(0, folder)
    # Its script parses arguments and needs plotting packages only below its main guard.
    from run_anomalydino_batched import calculate_cosine_distances

    stored = list(np.load(features))
    return lambda turn: calculate_cosine_distances(stored, turn * 7 % len(stored), device="cpu")
