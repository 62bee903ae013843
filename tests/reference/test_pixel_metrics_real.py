"""Pixel metrics of real maps at full resolution equal scikit-learn's and anomalib's."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from anomalydino_plugin import FewShotModel, anomaly_map_metrics, read_image
from jobs.truth import read_mask

EXACT = 1e-6


@pytest.fixture(scope="module")
def bottle(assets, dinov2):
    """Maps and masks of six test images, 900 x 900."""
    root = assets / "data" / "mvtec" / "bottle"
    model = FewShotModel(dinov2, resolution=224, rotations="informed", masking="off")
    model.fit([root / "train" / "good" / "000.png"])
    maps, masks = [], []
    for label in ("good", "broken_large", "contamination"):
        for path in sorted((root / "test" / label).iterdir())[:2]:
            maps.append(model.anomaly_map(model.score(path)))
            truth = root / "ground_truth" / label / f"{path.stem}_mask.png"
            size = read_image(path).shape[:2]
            masks.append(read_mask(str(truth), size) if label != "good" else np.zeros(size, bool))
    return maps, masks


def test_pixels_equal_scikit_learn(bottle):
    maps, masks = bottle
    found = anomaly_map_metrics(maps, masks)
    truth, values = np.stack(masks).ravel(), np.stack(maps).ravel()
    precision, recall, _ = precision_recall_curve(truth, values)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    assert found.auroc == pytest.approx(roc_auc_score(truth, values), abs=EXACT)
    assert found.average_precision == pytest.approx(average_precision_score(truth, values), abs=EXACT)
    assert found.f1_max == pytest.approx(f1.max(), abs=EXACT)
    assert 0.5 < found.pro_05 < found.pro_30 < 1  # maps that mean something


@pytest.mark.parametrize("limit", [0.3, 0.05])
def test_pro_equals_anomalib(bottle, limit):
    from anomalib.metrics.aupro import _AUPRO

    maps, masks = bottle
    trusted = _AUPRO(fpr_limit=limit)
    trusted.update(torch.from_numpy(np.stack(maps)), torch.from_numpy(np.stack(masks)).int())
    found = anomaly_map_metrics(maps, masks)
    ours = found.pro_30 if limit == 0.3 else found.pro_05
    assert ours == pytest.approx(float(trusted.compute()), abs=5e-5)  # anomalib sums millions of values in float32
