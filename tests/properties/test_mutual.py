"""Mutual scoring against a float64 oracle: any cut into blocks, any mode, ties and duplicates."""

import itertools
from contextlib import nullcontext
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalydino_plugin import ConfigError, InputError, kernel_for, lowest_count, match_set, search_rows
from anomalydino_plugin.batched import whole_set
from anomalydino_plugin.mutual import RunningLowest


def unit_rows(rng: np.random.Generator, count: int, width: int = 8) -> torch.Tensor:
    rows = torch.from_numpy(rng.standard_normal((count, width)).astype(np.float32))
    return torch.nn.functional.normalize(rows, dim=1)


def kernel_or_torch(name: str) -> str:
    try:
        return kernel_for(name)
    except ConfigError:
        return "torch"


def oracle(queries: torch.Tensor, images: list[torch.Tensor], count: int, mode: str) -> np.ndarray:
    distances = [1.0 - queries.double() @ image.double().T for image in images]
    if mode == "musc":
        values = torch.stack([part.amin(dim=1) for part in distances], dim=1)
    else:
        values = torch.cat(distances, dim=1)
    return values.sort(dim=1).values[:, :count].mean(dim=1).clamp(0, 2).numpy()


KERNELS = [name for name in ("torch", "tiles_f32", "tiles_bf16", "tiles_int8") if name == kernel_or_torch(name)]
sets = st.lists(st.integers(1, 300), min_size=1, max_size=6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_image_left_out_of_a_tiny_set_does_not_count(kernel):
    """Its tiles are not looked at, even while fewer distances are known than are kept."""
    images = torch.eye(8)[:3, None]  # one patch each, all at a right angle
    lowest = RunningLowest(images[0], 2)
    lowest.update(search_rows(images.flatten(0, 1), [1, 1, 1], kernel), [1, 1, 1], 0, 0)
    match = lowest.result()
    assert match.distances.tolist() == [1.0]
    assert match.rows.tolist() == [1]


@settings(max_examples=60, deadline=None)
@given(
    sizes=sets,
    count=st.integers(1, 40),
    mode=st.sampled_from(["official", "musc"]),
    seed=st.integers(0, 99),
    left_out=st.none() | st.integers(0, 5),
    kernels=st.lists(st.sampled_from(KERNELS), min_size=4, max_size=4),
    at_once=st.sampled_from([50, 400, 8192]),
)
def test_equals_the_oracle_whatever_blocks_and_kernels(sizes, count, mode, seed, left_out, kernels, at_once):
    rng = np.random.default_rng(seed)
    images = [unit_rows(rng, size) for size in sizes]
    if len(images) > 1:
        images[-1] = images[0].clone()  # a duplicate
    queries = torch.cat([unit_rows(rng, 5), images[0][:1]])
    lowest = RunningLowest(queries, count, mode)
    cuts = sorted({0, len(images), *rng.integers(0, len(images) + 1, 2).tolist()})
    row = 0
    left_out = left_out if left_out is not None and left_out < len(images) > 1 else None
    for kernel, (start, stop) in zip(kernels, itertools.pairwise(cuts), strict=False):
        block, lengths = torch.cat(images[start:stop]), [len(image) for image in images[start:stop]]
        own = left_out - start if left_out is not None and start <= left_out < stop else None
        with patch("anomalydino_plugin.mutual._ROWS_AT_ONCE", at_once):
            lowest.update(search_rows(block, lengths, kernel), lengths, row, own)
        row += len(block)
    match = lowest.result()
    everything = torch.cat(images)
    kept = torch.cat([torch.full((len(image),), place != left_out) for place, image in enumerate(images)])
    images = [image for place, image in enumerate(images) if place != left_out]
    available = len(images) if mode == "musc" else sum(map(len, images))
    expected = oracle(queries, images, min(count, available), mode)
    np.testing.assert_allclose(match.distances.numpy(), expected, atol=2e-6)
    assert (match.distances >= 0).all()
    assert kept[match.rows].all()
    nearest = (queries.double() @ everything[kept].double().T).max(dim=1).values
    found = (queries.double() * everything[match.rows].double()).sum(dim=1)
    np.testing.assert_allclose(found.numpy(), nearest.numpy(), atol=1e-6)


def test_more_other_images_never_raise_the_single_nearest_distance():
    rng = np.random.default_rng(3)
    queries, images = unit_rows(rng, 20), [unit_rows(rng, 30) for _ in range(5)]
    before = None
    lowest = RunningLowest(queries, 1)
    for position, image in enumerate(images):
        lowest.update(image, [30], 30 * position)
        now = lowest.result().distances
        assert before is None or (now <= before).all()
        before = now


@pytest.mark.parametrize(
    ("mode", "images", "patches", "share", "expected"),
    [
        ("official", 82, 82 * 1024, None, 82),  # floor(83.97) = 83, of which all but the 83rd itself
        ("official", 1, 1024, None, 1),  # floor(1.02) - 1 would be none
        ("official", 1, 10, None, 1),
        ("musc", 82, 82 * 1024, None, 24),
        ("musc", 1, 1024, None, 1),
        ("musc", 10, 1, 1.0, 10),
    ],
)
def test_how_many_are_averaged(mode, images, patches, share, expected):
    assert lowest_count(mode, images, patches, share) == expected


def test_what_cannot_be_averaged():
    with pytest.raises(InputError, match="at least two, found one"):
        lowest_count("official", 0, 0)
    with pytest.raises(ConfigError, match="expected one of 'official', 'musc'"):
        lowest_count("median", 3, 30)
    with pytest.raises(ConfigError, match=r"share=1\.5"):
        lowest_count("musc", 3, 30, 1.5)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 700), min_size=2, max_size=6),
    share=st.sampled_from([0.001, 0.01, 0.3]),
    mode=st.sampled_from(["official", "musc"]),
    seed=st.integers(0, 99),
    kernel=st.sampled_from(KERNELS),
    block=st.sampled_from([1, 300, 1000, 8192]),
    room=st.sampled_from([1 / 16, 1 / 2000, 0]),
)
def test_a_whole_set_at_once_equals_image_by_image(sizes, share, mode, seed, kernel, block, room):
    """Bit for bit, in distances and rows, whatever the blocks and the room for what one block finds for another.

    Duplicates and zero vectors included.
    """
    rng = np.random.default_rng(seed)
    images = [unit_rows(rng, size, 16) for size in sizes]
    images[-1] = images[0].clone()
    images[0][0] = 0.0
    small = nullcontext() if kernel == "torch" else patch("anomalydino_plugin.kernels.pairs._ROOM", room)
    with small, patch.object(whole_set, "BLOCK_ROWS", block):
        together = match_set(images, mode=mode, share=share, kernel=kernel)
    lengths = [len(image) for image in images]
    everything = search_rows(torch.cat(images), lengths, kernel)
    for place, (image, match) in enumerate(zip(images, together, strict=True)):
        others = sum(lengths) - len(image)
        alone = RunningLowest(image, lowest_count(mode, len(images) - 1, others, share), mode)
        alone.update(everything, lengths, 0, place)
        expected = alone.result()
        np.testing.assert_allclose(match.distances, expected.distances, atol=2e-6 if kernel == "torch" else 0)
        rows = torch.cat(images)
        similarity = [(image.double() * rows[found.rows].double()).sum(dim=1) for found in (match, expected)]
        np.testing.assert_allclose(*similarity, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_blank_images(kernel):
    """Every patch is as near as every other: more than a list has room for, and all at distance 0."""
    images = [unit_rows(np.random.default_rng(0), 1, 16).repeat(600, 1) for _ in range(4)]
    with patch.object(whole_set, "BLOCK_ROWS", 600):
        together = match_set(images, kernel=kernel, share=0.1)
    for own, match in enumerate(together):
        assert match.distances.abs().max() < 1e-6
        assert match.rows.tolist() == [600 if own == 0 else 0] * 600


def test_a_set_of_one_has_nothing_to_match():
    with pytest.raises(InputError, match="at least two, found one"):
        match_set([torch.eye(4)])
