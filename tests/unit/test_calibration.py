import numpy as np
import pytest
import torch

from anomalydino_plugin import ConfigError, InputError, normalise_score, threshold_from_normals


def test_conformal_rank():
    scores = np.arange(1.0, 101.0)
    assert threshold_from_normals(scores, false_alarm=0.05) == 96.0  # ceil(101 * 0.95) = 96th smallest
    assert threshold_from_normals(scores[::-1], false_alarm=0.10) == 91.0


def test_false_alarms_stay_below_the_target():
    rng = np.random.default_rng(0)
    alarms = [
        (rng.gumbel(1, 0.1, 200) > threshold_from_normals(rng.gumbel(1, 0.1, 60), false_alarm=0.1)).mean()
        for _ in range(200)
    ]
    assert np.mean(alarms) <= 0.105


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_few_scores_are_extrapolated_never_below_the_largest(count):
    scores = np.linspace(0.1, 0.2, count)
    threshold = threshold_from_normals(scores)
    assert threshold > scores.max()
    assert threshold_from_normals(scores, false_alarm=0.01) > threshold


@pytest.mark.parametrize("scores", [[], [np.nan], [0.1, np.inf]])
def test_unusable_scores(scores):
    with pytest.raises(InputError, match="finite"):
        threshold_from_normals(scores)


@pytest.mark.parametrize("target", [0.0, 1.0, -1])
def test_unusable_target(target):
    with pytest.raises(ConfigError, match="probability"):
        threshold_from_normals([0.1], false_alarm=target)


def test_a_threshold_of_zero_normalises_to_numbers():
    scores = torch.tensor([0.0, 0.0, 1e-30, 0.3])
    assert normalise_score(scores, 0.0).tolist() == [0.5, 0.5, 1.0, 1.0]
    assert (normalise_score(0.0, 0.0), normalise_score(0.3, 0.0)) == (0.5, 1.0)


def test_arrays_are_normalised_as_numbers_are():
    values = np.array([0.0, 0.5, 2.0], dtype=np.float32)
    np.testing.assert_allclose(normalise_score(values, 0.5), [0.0, 0.5, 0.8])
    np.testing.assert_allclose(normalise_score(values, 0.0), [0.5, 1.0, 1.0])
