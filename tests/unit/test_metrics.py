"""Metrics against scikit-learn, anomalib and a transcription of the definition of PRO."""

import numpy as np
import pytest
from scipy.ndimage import label
from scipy.stats import beta
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from anomalydino_plugin import (
    AnomalousLevels,
    ConfigError,
    InputError,
    PixelCounts,
    anomaly_map_metrics,
    error_rate,
    image_metrics,
)
from anomalydino_plugin.metrics.curves import region_overlap_area

EXACT = 1e-6


def pro_by_definition(maps, masks, limit):
    """Bergmann et al.: threshold by threshold, region by region."""
    regions = []
    for values, mask in zip(maps, masks, strict=True):
        labels, count = label(mask, np.ones((3, 3)))
        regions += [values[labels == number + 1] for number in range(count)]
    normal = np.concatenate([values[~mask] for values, mask in zip(maps, masks, strict=True)])
    rates, overlaps = [0.0], [0.0]
    for threshold in np.unique(np.concatenate([values.ravel() for values in maps]))[::-1]:
        rates.append(np.mean(normal >= threshold))
        overlaps.append(np.mean([np.mean(region >= threshold) for region in regions]))
    area = 0.0
    for left, right, low, high in zip(rates, rates[1:], overlaps, overlaps[1:], strict=False):
        if left < limit and right > left:
            end = min(right, limit)
            at_end = low + (high - low) * (end - left) / (right - left)
            area += (end - left) * (low + at_end) / 2
    return area / limit


def generated(seed, *, ties=False, sizes=((40, 50), (31, 40), (25, 25))):
    """Maps that partly find the regions of their masks; the last image is normal."""
    rng = np.random.default_rng(seed)
    maps, masks = [], []
    for number, size in enumerate(sizes):
        mask = np.zeros(size, bool)
        if number < len(sizes) - 1:
            for _ in range(3):
                row, column = rng.integers(0, size[0] - 6), rng.integers(0, size[1] - 6)
                mask[row : row + rng.integers(1, 7), column : column + rng.integers(1, 7)] = True
            mask[0, 0] = mask[1, 1] = True  # one region, as corners touch
        values = rng.gamma(2.0, 0.1, size).astype(np.float32) + 0.15 * mask * rng.random(size, dtype=np.float32)
        values[: size[0] // 4] *= mask[: size[0] // 4] & (rng.random((size[0] // 4, size[1])) < 0.5)  # masked patches
        maps.append(np.round(values, 1 if ties else 9).astype(np.float32))
        masks.append(mask)
    return maps, masks


def flat(maps, masks):
    return np.concatenate([mask.ravel() for mask in masks]), np.concatenate([values.ravel() for values in maps])


def assert_equals_the_trusted(found, maps, masks):
    truth, values = flat(maps, masks)
    precision, recall, thresholds = precision_recall_curve(truth, values)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    assert found.auroc == pytest.approx(roc_auc_score(truth, values), abs=EXACT)
    assert found.average_precision == pytest.approx(average_precision_score(truth, values), abs=EXACT)
    assert found.f1_max == pytest.approx(f1.max(), abs=EXACT)
    chosen = 2 * (truth & (values >= found.f1_threshold)).sum() / (truth.sum() + (values >= found.f1_threshold).sum())
    assert chosen == pytest.approx(f1.max(), abs=EXACT)
    assert found.f1_threshold == thresholds[np.flatnonzero(f1[:-1] > f1.max() - 1e-12)[-1]]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_pixels_equal_scikit_learn_and_the_definition(seed, ties):
    maps, masks = generated(seed, ties=ties)
    found = anomaly_map_metrics(maps, masks)
    assert_equals_the_trusted(found, maps, masks)
    for limit, area in ((0.3, found.pro_30), (0.05, found.pro_05)):
        assert area == pytest.approx(pro_by_definition(maps, masks, limit), abs=EXACT)
    assert found.regions == sum(label(mask, np.ones((3, 3)))[1] for mask in masks)
    assert (found.pixels, found.anomalous) == (sum(map(np.size, maps)), sum(map(np.sum, masks)))
    assert found.dropped_bits == 0


@pytest.mark.parametrize("limit", [0.3, 0.05])
def test_pro_equals_anomalib(limit):
    import torch
    from anomalib.metrics.aupro import _AUPRO

    maps, masks = generated(5, sizes=((48, 48),) * 6)
    trusted = _AUPRO(fpr_limit=limit)
    trusted.update(torch.from_numpy(np.stack(maps)), torch.from_numpy(np.stack(masks)).int())
    found = anomaly_map_metrics(maps, masks)
    assert (found.pro_30 if limit == 0.3 else found.pro_05) == pytest.approx(float(trusted.compute()), abs=EXACT)


def test_the_size_of_buffers_changes_nothing():
    maps, masks = generated(7)
    expected = anomaly_map_metrics(maps, masks)
    for buffer_pixels in (1, 999):
        levels = AnomalousLevels()
        for values, mask in zip(maps[:-1], masks[:-1], strict=True):  # the last one is normal
            levels.add(values, mask)
        counts = PixelCounts(levels, buffer_pixels)
        for values in reversed(maps):
            counts.add(values)
        assert counts.metrics() == expected


def test_too_many_distinct_values_cost_bits_and_little_else():
    maps, masks = generated(8, sizes=((200, 200),) * 5)
    levels = AnomalousLevels(max_levels=60)
    for values, mask in zip(maps, masks, strict=True):
        levels.add(values, mask)
    kept, positives, overlap = levels.finished()
    truth, values = flat(maps, masks)
    assert len(kept) <= 60 < len(np.unique(values[truth]))
    assert positives.sum() == sum(map(np.sum, masks))
    assert overlap.sum() == pytest.approx(levels.regions)
    counts = PixelCounts(levels)
    for values in maps:
        counts.add(values)
    found, exact = counts.metrics(), anomaly_map_metrics(maps, masks)
    assert found.dropped_bits > 0
    rounded = [(v.view(np.int32) >> found.dropped_bits << found.dropped_bits).view(np.float32) for v in maps]
    assert_equals_the_trusted(found, rounded, masks)
    assert found[3:9] == pytest.approx(exact[3:9], abs=0.02)
    assert found.pro_30 == pytest.approx(pro_by_definition(rounded, masks, 0.3), abs=EXACT)


def test_perfect_and_worst_maps():
    mask = np.zeros((8, 8), bool)
    mask[2:4, 2:4] = True
    best = anomaly_map_metrics([mask.astype(np.float32)], [mask])
    assert (best.auroc, best.average_precision, best.f1_max, best.f1_threshold) == (1, 1, 1, 1)
    assert (best.pro_30, best.pro_05) == (pytest.approx(1), pytest.approx(1))
    worst = anomaly_map_metrics([(~mask).astype(np.float32)], [mask])
    assert (worst.auroc, worst.pro_30, worst.f1_threshold) == (0, 0, 0)
    constant = anomaly_map_metrics([np.ones((8, 8), np.float32)], [mask])
    assert constant.auroc == 0.5
    assert constant.pro_30 == pytest.approx(0.15)  # the straight line from (0, 0) to (1, 1)


def test_what_cannot_be_measured_is_refused():
    mask, values = np.eye(4, dtype=bool), np.ones((4, 4), np.float32)
    with pytest.raises(InputError, match="no anomalous pixel"):
        anomaly_map_metrics([values], [np.zeros((4, 4), bool)])
    with pytest.raises(InputError, match="expected normal ones"):
        anomaly_map_metrics([values], [np.ones((4, 4), bool)])
    with pytest.raises(InputError, match=r"map of \(4, 4\) and mask of \(2, 2\)"):
        anomaly_map_metrics([values], [mask[:2, :2]])
    with pytest.raises(InputError, match="not finite"):
        anomaly_map_metrics([np.full((4, 4), np.nan, np.float32)], [mask])
    with pytest.raises(InputError, match="2 maps and 1 masks"):
        anomaly_map_metrics([values, values], [mask])
    levels = AnomalousLevels()
    levels.add(values, mask)
    with pytest.raises(InputError, match="not finite"):
        PixelCounts(levels).add(np.full((4, 4), np.inf, np.float32))
    with pytest.raises(ConfigError, match="limit=0"):
        region_overlap_area(None, 0)


@pytest.mark.parametrize("seed", range(3))
def test_image_metrics_equal_torchmetrics(seed):
    import torch
    from torchmetrics.functional import auroc
    from torchmetrics.functional import average_precision as average_precision_of

    rng = np.random.default_rng(seed)
    truth = rng.random(60) < 0.4
    scores = np.round(rng.random(60) + 0.3 * truth, 2)
    found = image_metrics(scores, truth)
    tensors = torch.from_numpy(scores), torch.from_numpy(truth).int()
    assert found.auroc == pytest.approx(float(auroc(*tensors, task="binary")), abs=EXACT)
    assert found.average_precision == pytest.approx(float(average_precision_of(*tensors, task="binary")), abs=EXACT)
    f1 = {t: 2 * (truth & (scores >= t)).sum() / (truth.sum() + (scores >= t).sum()) for t in scores}
    assert found.f1_max == pytest.approx(max(f1.values()), abs=EXACT)
    assert found.f1_threshold == max(t for t, value in f1.items() if value > max(f1.values()) - 1e-12)


def test_image_metrics_need_both_classes_and_finite_scores():
    assert image_metrics(np.array([1.0, 2.0]), np.array([True, True])) == (None,) * 4
    with pytest.raises(InputError, match="one finite score"):
        image_metrics(np.array([1.0, np.nan]), np.array([True, False]))
    with pytest.raises(InputError, match="one label"):
        image_metrics(np.array([1.0]), np.array([True, False]))


@pytest.mark.parametrize(("errors", "images"), [(0, 20), (3, 20), (20, 20), (1, 1)])
def test_error_rates_have_clopper_pearson_intervals(errors, images):
    found = error_rate(np.arange(images) < errors)
    assert (found.errors, found.images, found.share) == (errors, images, errors / images)
    low = beta.ppf(0.025, errors, images - errors + 1) if errors else 0
    high = beta.ppf(0.975, errors + 1, images - errors) if errors < images else 1
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_no_verdict_has_no_rate():
    assert error_rate(np.zeros(0, bool)) is None
