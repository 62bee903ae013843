import numpy as np
import pytest
import torch
from scipy.stats import gumbel_r

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


@pytest.mark.parametrize("scores", [[0.4], [0.1, 0.5, 0.2], [0.3, 0.3, 0.3]])
@pytest.mark.parametrize("alarm", [0.05, 0.2])
def test_few_scores_are_extrapolated_with_a_gumbel_distribution_of_their_moments(scores, alarm):
    mean = np.mean(scores)
    deviation = max(np.std(scores, ddof=1) if len(scores) > 1 else 0.0, 0.15 * mean)
    scale = deviation * np.sqrt(6) / np.pi
    expected = gumbel_r.ppf(1 - alarm, loc=mean - np.euler_gamma * scale, scale=scale)
    assert threshold_from_normals(scores, false_alarm=alarm) == pytest.approx(max(expected, *scores), rel=1e-12)


def test_the_extrapolation_never_falls_below_the_largest_score():
    scores = [0.0] * 8 + [1.0]  # the fit's 80 % quantile is 0.32
    assert threshold_from_normals(scores, false_alarm=0.09) == 1.0


def test_the_largest_rank_is_still_one_of_the_scores():
    """n = 1 / a - 1 scores are just enough; one less is extrapolated."""
    scores = np.arange(1.0, 20.0)
    assert threshold_from_normals(scores) == 19.0
    assert threshold_from_normals(scores[:18]) > 18.0
    assert threshold_from_normals([5.0], false_alarm=0.5) == 5.0
    assert threshold_from_normals([3.0, 1.0, 2.0], false_alarm=0.75) == 1.0


def test_the_default_target_is_five_per_cent():
    scores = np.arange(1.0, 101.0)
    assert threshold_from_normals(scores) == threshold_from_normals(scores, false_alarm=0.05) == 96.0


def test_threshold_and_normalised_numbers_are_plain_floats():
    assert type(threshold_from_normals(np.arange(1.0, 101.0))) is float
    assert type(threshold_from_normals(np.arange(1.0, 3.0))) is float
    assert normalise_score(3.0, 1.0) == 0.75


def test_normalised_tensors():
    values = normalise_score(torch.tensor([1.0, 3.0]), torch.tensor(1.0))
    assert values.tolist() == [0.5, 0.75]


def test_arrays_that_are_all_zero_are_not_left_unset():
    found = normalise_score(np.zeros(1000, np.float32), 0.0)
    assert found.tolist() == [0.5] * 1000
    assert found.dtype == np.float32


def test_scores_in_single_precision_are_counted_in_double():
    scores = np.array([0.1, 0.25, 0.7], np.float32)
    assert threshold_from_normals(scores) == threshold_from_normals([float(score) for score in scores])
