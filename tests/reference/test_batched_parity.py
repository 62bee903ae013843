"""Batched zero-shot through anomalib's Engine against the official code's figures; screw runs in `make bench`."""

import json
from pathlib import Path

import pytest
import torch
from anomalib.engine import Engine
from sklearn.metrics import roc_auc_score

from anomalydino_plugin import AnomalyDINOBatched


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "accelerator",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_bottle(assets: Path, weights_file: Path, tmp_path, accelerator):
    golden = json.loads((assets / "golden" / "batched_448.json").read_text())["bottle"]
    model = AnomalyDINOBatched(weights=str(weights_file), visualizer=False)
    engine = Engine(default_root_dir=tmp_path, logger=False, accelerator=accelerator, enable_progress_bar=False)
    batches = engine.predict(model, data_path=assets / "data" / "mvtec" / "bottle" / "test")
    scores = {"/".join(Path(b.image_path[0]).parts[-2:]): float(b.pred_score[0]) for b in batches}
    assert scores.keys() == golden["scores"].keys()
    for name, expected in golden["scores"].items():
        assert scores[name] == pytest.approx(expected, rel=1e-4), name
    defect = [not name.startswith("good/") for name in scores]
    assert 100 * roc_auc_score(defect, list(scores.values())) == pytest.approx(100 * golden["auroc"], abs=0.1)
