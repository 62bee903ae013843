"""Invariants of image scores, maps and normalisation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from anomalydino_plugin import anomaly_map, image_score, normalise_score

distances = arrays(np.float32, st.integers(1, 400), elements=st.floats(0, 2, width=32))


@settings(deadline=None)
@given(values=distances)
def test_default_score_is_the_mean_of_the_top_per_cent(values):
    top = max(1, int(len(values) * 0.01))
    expected = np.sort(values.astype(np.float64))[::-1][:top].mean()
    assert image_score(torch.from_numpy(values)).item() == pytest.approx(expected, rel=1e-6, abs=1e-7)


@settings(deadline=None)
@given(values=distances, seed=st.integers(0, 99))
def test_score_ignores_the_order_of_patches(values, seed):
    shuffled = np.random.default_rng(seed).permutation(values)
    assert image_score(torch.from_numpy(values)) == image_score(torch.from_numpy(shuffled))


@settings(deadline=None, max_examples=40)
@given(
    grid=arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.floats(0, 2, width=32)),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    coverage=st.tuples(st.floats(0.5, 1), st.floats(0.5, 1)),
)
def test_map_stays_within_the_range_of_the_distances(grid, size, coverage):
    values = anomaly_map(torch.from_numpy(grid), size, coverage=coverage)
    assert values.shape == size
    assert values.min() >= grid.min() - 1e-5
    assert values.max() <= grid.max() + 1e-5


@settings(deadline=None)
@given(scores=st.lists(st.floats(0, 2), min_size=2, max_size=50), threshold=st.floats(1e-3, 2))
def test_normalisation_keeps_order_and_puts_the_threshold_at_a_half(scores, threshold):
    ordered = sorted(scores)
    normalised = [normalise_score(score, threshold) for score in ordered]
    assert normalised == sorted(normalised)
    assert all(0 <= value < 1 for value in normalised)
    assert normalise_score(threshold, threshold) == 0.5
    assert all(
        (value > 0.5) == (score > threshold)
        for value, score in zip(normalised, ordered, strict=True)
        if abs(score - threshold) > 1e-12
    )
