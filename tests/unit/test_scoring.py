import cv2
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from anomalydino_plugin import ConfigError, anomaly_map, image_score
from anomalydino_plugin.scoring import _axis_matrix, parse_statistic


@pytest.fixture(autouse=True)
def _no_kept_matrices():
    """Mutation testing forks from a process that has run these tests: matrices kept from then would hide mutants."""
    _axis_matrix.cache_clear()


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
    ("statistic", "expected"),
    [
        ("max", 99.0),
        ("mean_top:0.01", 99.0),
        ("mean_top:0.05", 97.0),
        ("mean_top:0.29", 85.0),  # 0.29 * 100 is 28.999... in floating point
        ("mean_top:0.001", 99.0),  # at least one
        ("mean_top:1", 49.5),
        ("quantile:0.5", 49.5),
        ("quantile:1", 99.0),
    ],
)
def test_statistics(statistic, expected):
    distances = torch.arange(100.0)
    assert image_score(distances, statistic).item() == pytest.approx(expected)
    batch = image_score(torch.stack([distances, distances + 1, distances + 2])[None], statistic)
    assert batch[0].tolist() == pytest.approx([expected, expected + 1, expected + 2])


@pytest.mark.parametrize(
    "statistic", ["mean", "mean_top", "mean_top:0", "mean_top:1.5", "quantile:x", "max:1", "mean:0.5"]
)
def test_unknown_statistics(statistic):
    with pytest.raises(ConfigError, match="expected 'max'"):
        image_score(torch.ones(4), statistic)


def test_statistics_are_read_as_written():
    assert parse_statistic("max") == ("max", 1.0)
    assert parse_statistic("mean_top:0.25") == ("mean_top", 0.25)
    assert parse_statistic("quantile:1") == ("quantile", 1.0)


def test_default_score_of_a_hundred_and_of_a_thousand_patches():
    assert image_score(torch.arange(199.0)).item() == 198.0
    assert image_score(torch.arange(1000.0)).item() == pytest.approx(994.5)


@pytest.mark.parametrize("patches", [1, 2])
def test_maps_of_one_or_two_patches_without_smoothing(patches):
    grid = torch.tensor([[1.0, 3.0][:patches]])
    expected = {1: [1.0] * 4, 2: [1.0, 1.5, 2.5, 3.0]}[patches]  # pixel centres at 0.25, 0.75, ... of two patches
    assert anomaly_map(grid, (1, 4), sigma=0)[0].tolist() == pytest.approx(expected)
    assert anomaly_map(grid.T, (4, 1), sigma=0)[:, 0].tolist() == pytest.approx(expected)


def test_maps_are_smoothed_with_sigma_four_unless_told():
    grid = torch.rand(6, 7, generator=torch.Generator().manual_seed(0))
    plain = anomaly_map(grid, (60, 70), sigma=0).double().numpy()
    assert np.abs(anomaly_map(grid, (60, 70)).numpy() - gaussian_filter(plain, 4)).max() < 1e-6
    assert np.abs(anomaly_map(grid, (60, 70), sigma=0.5).numpy() - gaussian_filter(plain, 0.5)).max() < 1e-6


def test_coverage_moves_the_grid_along_its_own_axis():
    grid = torch.tensor([[1.0, 3.0]])
    assert anomaly_map(grid, (1, 8), sigma=0, coverage=(1.0, 0.5))[0].tolist() == [
        1.0,
        1.5,
        2.5,
        3.0,
        3.0,
        3.0,
        3.0,
        3.0,
    ]
    assert anomaly_map(grid.T, (8, 1), sigma=0, coverage=(0.5, 1.0))[:4, 0].tolist() == [1.0, 1.5, 2.5, 3.0]


def test_maps_are_float32_whatever_the_distances():
    found = anomaly_map(torch.ones(2, 2, dtype=torch.float16), (4, 4))
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.ones(4, 4))


@pytest.mark.parametrize(
    ("grid", "size", "options"),
    [
        (torch.ones(0, 2), (4, 4), {}),
        (torch.ones(2, 0), (4, 4), {}),
        (torch.ones(2, 2), (0, 4), {}),
        (torch.ones(2, 2), (4, 0), {}),
        (torch.ones(2, 2), (4, 4), {"sigma": -0.1}),
        (torch.ones(2, 2), (4, 4), {"coverage": (0.0, 1.0)}),
        (torch.ones(2, 2), (4, 4), {"coverage": (1.0, 1.001)}),
    ],
)
def test_maps_that_cannot_be(grid, size, options):
    with pytest.raises(ConfigError, match="expected positive sizes"):
        anomaly_map(grid, size, **options)


@pytest.mark.parametrize(("size", "coverage"), [((4,), (1.0, 1.0)), ((4, 4), (1.0,))])
def test_a_size_or_coverage_of_one_axis_is_refused(size, coverage):
    with pytest.raises(ValueError, match="zip"):
        anomaly_map(torch.ones(2, 2), size, coverage=coverage)
