import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from torchmetrics.classification import BinaryAUROC

from anomalydino_plugin import ConfigError
from anomalydino_plugin.pixel_metrics import PixelAUROC
from anomalydino_plugin.post_processor import AnomalyDINOPostProcessor


def processor(**options) -> AnomalyDINOPostProcessor:
    made = AnomalyDINOPostProcessor(**options)
    made.set_thresholds(0.2, 0.4)
    return made


def predictions() -> InferenceBatch:
    return InferenceBatch(pred_score=torch.tensor([0.1, 0.2, 0.6]), anomaly_map=torch.full((3, 1, 2, 2), 0.4))


def test_half_means_the_threshold():
    done = processor()(predictions())
    assert done.pred_score.tolist() == pytest.approx([1 / 3, 0.5, 0.75])
    assert done.pred_label.tolist() == [False, False, True]
    assert done.anomaly_map.unique().tolist() == [0.5]
    assert not done.pred_mask.any()


def test_batch_and_forward_agree():
    raw = predictions()
    batch = ImageBatch(image=torch.zeros(3, 3, 2, 2), pred_score=raw.pred_score, anomaly_map=raw.anomaly_map[:, 0])
    processor().post_process_batch(batch)
    done = processor()(raw)
    assert torch.equal(batch.pred_score, done.pred_score)
    assert torch.equal(batch.pred_label, done.pred_label)


def test_sensitivity_keeps_anomalibs_meaning():
    assert processor(image_sensitivity=0.7)(predictions()).pred_label.tolist() == [True, True, True]


def test_without_thresholds_scores_stay_raw_and_unlabelled():
    done = AnomalyDINOPostProcessor()(predictions())
    assert torch.equal(done.pred_score, predictions().pred_score)
    assert done.pred_label is None


def test_thresholds_survive_a_state_dict():
    again = AnomalyDINOPostProcessor()
    again.load_state_dict(processor().state_dict())
    assert (float(again.image_threshold), float(again.pixel_threshold)) == pytest.approx((0.2, 0.4))
    with pytest.raises(ConfigError, match="positive"):
        again.set_thresholds(0.0, 0.1)


@pytest.mark.parametrize("values", ["spread", "ties", "raw"])
def test_pixel_auroc_equals_the_exact_one(values):
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(4, 50, 50, generator=generator) < 0.1
    preds = torch.rand(4, 50, 50, generator=generator) * 0.8 + 0.15 * target
    if values == "ties":
        preds = (preds * 4).round() / 4
    if values == "raw":
        preds = preds * 2
    metric = PixelAUROC()
    for part in range(4):
        metric.update(
            ImageBatch(image=torch.zeros(1, 3, 50, 50), anomaly_map=preds[part][None], gt_mask=target[part][None])
        )
    exact = BinaryAUROC()(
        preds.flatten().clamp(0, 1) if values != "raw" else preds.flatten() / 2, target.flatten().int()
    )
    assert metric.compute().item() == pytest.approx(exact.item(), abs=1e-4)
    assert metric.name == "pixel_AUROC"
    assert sum(state.numel() for state in (metric.positive, metric.negative)) == 2 * (1 << 17)  # whatever the pixels


def test_nothing_given_stays_nothing():
    assert AnomalyDINOPostProcessor._normalize(None, torch.tensor(0.0), torch.tensor(1.0), torch.tensor(0.5)) is None
    assert AnomalyDINOPostProcessor._apply_threshold(None, torch.tensor(0.5)) is None
