import numpy as np
import pytest
from sklearn.decomposition import PCA

from anomalydino_plugin import ConfigError, first_principal_component, foreground_mask, masking_test
from anomalydino_plugin.masking import judge_mask


@pytest.mark.parametrize("shape", [(200, 16), (10, 40)])
def test_component_equals_exact_pca(shape):
    features = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    features[: shape[0] // 3] += 5
    expected = PCA(1, svd_solver="full").fit_transform(features.astype(np.float64))[:, 0]
    assert np.abs(first_principal_component(features) - expected).max() < 1e-4  # sign included: scikit-learn's rule


def square(grid, inner, value=50.0):
    component = np.full(grid, -value)
    component[inner] = value
    return component.reshape(-1)


CENTRE = (slice(8, 24), slice(8, 24))


@pytest.mark.parametrize("sign", [1, -1])
def test_sign_that_fills_the_centre_is_chosen(sign):
    mask = foreground_mask(sign * square((32, 32), CENTRE), (32, 32), morphology="grid").reshape(32, 32)
    assert mask[16, 16]
    assert not mask[0, 0]


def test_official_morphology_runs_along_the_flattened_order_and_wraps_over_row_ends():
    component = square((10, 10), (slice(2, 8), slice(0, 7)))
    official = foreground_mask(component, (10, 10)).reshape(10, 10)
    assert official[1, 9]  # the patch before row 2 column 0: a wrap
    assert not official[1, 0]  # no vertical growth
    grid = foreground_mask(component, (10, 10), morphology="grid").reshape(10, 10)
    assert grid[1, 0]
    assert not grid[1, 9]


def test_grid_that_does_not_fit():
    with pytest.raises(ConfigError, match="one for each patch"):
        foreground_mask(np.zeros(10), (3, 4))
    with pytest.raises(ConfigError, match="morphology"):
        foreground_mask(np.zeros(12), (3, 4), morphology="round")


def test_judgements():
    disc = np.hypot(*(np.indices((32, 32)) - 15.5)) < 9
    assert judge_mask(disc.reshape(-1), disc.reshape(-1), (32, 32)).use_mask
    large = np.hypot(*(np.indices((32, 32)) - 15.5)) < 14
    decision = judge_mask(large.reshape(-1), large.reshape(-1), (32, 32))
    assert not decision.use_mask
    assert "foreground" in decision.reason
    noise = np.random.default_rng(0).random(1024) < 0.3
    assert not judge_mask(noise, noise, (32, 32)).use_mask
    empty = np.zeros(1024, bool)
    assert not judge_mask(empty, empty, (32, 32)).use_mask


def test_flat_features_get_no_mask():
    assert not masking_test(np.ones((64, 8), np.float32), (8, 8)).use_mask
