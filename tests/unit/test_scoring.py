import cv2
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from anomalydino_plugin import ConfigError, anomaly_map, image_score


@pytest.mark.parametrize("size", [(100, 140), (64, 64), (333, 70)])
def test_map_equals_resize_then_gaussian(size):
    grid = np.random.default_rng(0).random((8, 11)).astype(np.float32)
    expected = gaussian_filter(cv2.resize(grid.astype(np.float64), size[::-1], interpolation=cv2.INTER_LINEAR), 4)
    assert np.abs(anomaly_map(torch.from_numpy(grid), size).numpy() - expected).max() < 1e-6


def test_map_of_a_cropped_grid_lies_on_the_cropped_area():
    grid = torch.zeros(4, 4)
    grid[:, 3] = 1.0
    cropped = anomaly_map(grid, (80, 100), sigma=0, coverage=(1.0, 0.8))
    assert cropped[0, 75] == pytest.approx(1.0)  # centre of the last column at 70 of 80 covered pixels
    assert cropped[0, 99] == pytest.approx(1.0)  # the rest repeats the edge
    stretched = anomaly_map(grid, (80, 100), sigma=0)
    assert stretched[0, 75] < 1.0


def test_batches_of_maps():
    grids = torch.rand(3, 1, 5, 6)
    maps = anomaly_map(grids, (40, 50))
    assert maps.shape == (3, 1, 40, 50)
    assert torch.allclose(maps[1, 0], anomaly_map(grids[1, 0], (40, 50)), atol=1e-6)


@pytest.mark.parametrize(
    ("statistic", "expected"), [("max", 99.0), ("mean_top:0.01", 99.0), ("mean_top:0.05", 97.0), ("quantile:0.5", 49.5)]
)
def test_statistics(statistic, expected):
    assert image_score(torch.arange(100.0), statistic).item() == pytest.approx(expected)


@pytest.mark.parametrize("statistic", ["mean", "mean_top", "mean_top:0", "mean_top:1.5", "quantile:x", "max:1"])
def test_unknown_statistics(statistic):
    with pytest.raises(ConfigError, match="expected 'max'"):
        image_score(torch.ones(4), statistic)
