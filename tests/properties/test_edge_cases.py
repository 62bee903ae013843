"""Float edge cases against a float64 oracle: zero vectors, duplicates, ties, subnormals; grids, ids and stores."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from anomalydino_plugin import foreground_mask, image_score, nearest, plan_geometry
from anomalydino_plugin.calibration import normalise_score
from anomalydino_plugin.decoding import _TO_EIGHT_BITS
from anomalydino_plugin.mutual import RunningLowest
from anomalydino_plugin.preprocessing import prepare_pixels
from jobs import schema
from jobs.inputs import image_id
from jobs.store import Store, folder_name

SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, 1e-20, 1.0, -1.0, 3e38]
WIDTH = 5


@st.composite
def odd_rows(draw, most: int = 20) -> torch.Tensor:
    """(n, 5) rows of special values, normalised as the library does it: zero and subnormal rows stay near zero."""
    element = st.sampled_from(SPECIAL) | st.floats(-2, 2, width=32)
    values = draw(arrays(np.float32, st.tuples(st.integers(1, most), st.just(WIDTH)), elements=element))
    if draw(st.booleans()):
        values[-1] = values[0]
    return torch.nn.functional.normalize(torch.from_numpy(values), dim=1)


@settings(deadline=None, max_examples=150)
@given(queries=odd_rows(), bank=odd_rows(), k=st.integers(1, 3), block=st.integers(1, 60))
def test_matching_with_odd_rows(queries, bank, k, block):
    k = min(k, len(bank))
    match = nearest(queries, bank, k=k, block_elements=block)
    exact = 1 - queries.double() @ bank.double().T
    expected = exact.sort(dim=1).values[:, :k].clamp(0, 2)
    assert torch.isfinite(match.distances).all()
    assert ((match.distances >= 0) & (match.distances <= 2)).all()
    assert torch.allclose(match.distances.double(), expected, atol=2e-6)
    found = exact.gather(1, match.rows).clamp(0, 2)
    assert torch.allclose(found, expected, atol=2e-6)


@settings(deadline=None, max_examples=100)
@given(queries=odd_rows(6), images=st.lists(odd_rows(8), min_size=1, max_size=4), count=st.integers(1, 9))
def test_lowest_mean_with_odd_rows(queries, images, count):
    everything = torch.cat(images)
    count = min(count, len(everything))
    lowest = RunningLowest(queries, count, "official")
    row = 0
    for image in images:
        lowest.update(image, [len(image)], row)
        row += len(image)
    exact = (1 - queries.double() @ everything.double().T).clamp(0, 2)
    expected = exact.sort(dim=1).values[:, :count].mean(dim=1)
    assert torch.allclose(lowest.result().distances.double(), expected, atol=3e-6)


@settings(deadline=None, max_examples=60)
@given(row=odd_rows(1), copies=st.integers(2, 12))
def test_all_ties(row, copies):
    bank = row.expand(copies, WIDTH).contiguous()
    match = nearest(row, bank, k=2)
    assert len(set(match.rows[0].tolist())) == 2
    assert match.distances[0, 0] == match.distances[0, 1]


@settings(deadline=None, max_examples=100)
@given(
    values=arrays(np.float32, st.integers(1, 300), elements=st.sampled_from([0.0, 1e-45, 1e-38, 0.5, 2.0])),
    statistic=st.sampled_from(["mean_top:0.01", "mean_top:1", "max", "quantile:0.5", "quantile:1"]),
)
def test_scores_lie_between_the_distances(values, statistic):
    score = image_score(torch.from_numpy(values), statistic).item()
    assert values.min() - 1e-7 <= score <= values.max() + 1e-7


@settings(deadline=None)
@given(score=st.sampled_from([0.0, 1e-45, 1e-300, 0.1, 2.0]), threshold=st.sampled_from([0.0, 1e-45, 1e-300, 0.1, 2.0]))
def test_normalised_scores_are_numbers(score, threshold):
    value = normalise_score(score, threshold)
    assert 0.0 <= value <= 1.0
    assert (value > 0.5) == (score > threshold)
    both = normalise_score(torch.tensor([score]), torch.tensor(threshold))
    assert torch.isfinite(both).all()


@settings(deadline=None, max_examples=100)
@given(
    grid=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kind=st.sampled_from(["noise", "zero", "constant", "subnormal", "huge"]),
    morphology=st.sampled_from(["official", "grid"]),
    seed=st.integers(0, 99),
)
def test_masks_are_of_the_grid_whatever_the_component(grid, kind, morphology, seed):
    rng = np.random.default_rng(seed)
    count = grid[0] * grid[1]
    component = {
        "noise": rng.standard_normal(count) * 20,
        "zero": np.zeros(count),
        "constant": np.full(count, 11.0),
        "subnormal": np.full(count, 1e-310),
        "huge": np.full(count, 1e300),
    }[kind]
    mask = np.asarray(foreground_mask(component, grid, morphology=morphology))
    assert mask.dtype == bool
    assert mask.size == count


@settings(deadline=None, max_examples=200)
@given(
    height=st.integers(14, 3000),
    width=st.integers(14, 3000),
    resolution=st.integers(14, 700),
    patch=st.sampled_from([14, 16]),
)
def test_grid_arithmetic(height, width, resolution, patch):
    if min(height, width, resolution) < patch or max(height, width) > 20 * min(height, width):
        return
    plan = plan_geometry(height, width, resolution, patch)
    resized = plan.resized
    assert min(resized) == resolution
    assert all(rows == edge // patch for rows, edge in zip(plan.grid, resized, strict=True))
    assert all(0.5 < share <= 1 for share in plan.coverage)
    exact = max(height, width) * resolution / min(height, width)
    assert 0 <= exact - max(resized) < 1 + 1e-9
    turned = plan_geometry(width, height, resolution, patch)
    assert turned.grid == plan.grid[::-1]


@settings(deadline=None, max_examples=20)
@given(height=st.integers(16, 90), width=st.integers(16, 90), resolution=st.integers(16, 64))
def test_prepared_pixels_have_the_planned_size(height, width, resolution):
    image = np.full((height, width, 3), 9, np.uint8)
    plan = plan_geometry(height, width, resolution, 16)
    assert prepare_pixels(image, resolution, 16).shape == (plan.grid[0] * 16, plan.grid[1] * 16, 3)


def test_sixteen_bits_to_eight_is_the_rounded_quotient():
    levels = np.arange(65536)
    assert np.array_equal(_TO_EIGHT_BITS, np.floor(levels.astype(np.float64) / 257 + 0.5))


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=20)


@settings(deadline=None, max_examples=200)
@given(left=st.tuples(names, names), right=st.tuples(names, names))
def test_ids_differ_where_places_do(left, right):
    assert (image_id(*left) == image_id(*right)) == ("/".join(left) == "/".join(right))
    assert len(image_id(*left)) == 20


@settings(deadline=None, max_examples=200)
@given(left=names, right=names)
def test_folder_names_are_safe_and_differ(left, right):
    assert (folder_name(left) == folder_name(right)) == (left == right)
    assert not {"/", "\\", ":", "\0"} & set(folder_name(left))
    assert not folder_name(left).startswith(".")


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    joined=st.integers(1, 5),
    order=st.randoms(use_true_random=False),
)
def test_joining_keeps_every_row_once_in_order(sizes, joined, order):
    """However shards are finished and joined, a reader gets the rows of all of them, sorted."""
    root = Path(tempfile.mkdtemp())
    try:
        store = Store(root, "score", {"failures": joined})
        store.claim("identity", ("failures",), {})
        shards, expected = [], []
        for number, size in enumerate(sizes):
            ids = [f"{number:03d}-{row}" for row in range(size)]
            expected += ids
            shards.append((f"{number:06d}", ids))
        order.shuffle(shards)
        for name, ids in shards:
            rows = [dict.fromkeys(schema.FAILURES.names, "x") | {"image_id": item} for item in ids]
            table = pa.Table.from_pylist(rows, schema=schema.FAILURES)
            store.commit("c", name, {"failures": table}, {"done": 0, "failed": len(ids)})
        for item in store.unjoined():
            store.join(*item)
        store.drop_parts()
        assert store.sweep() == []
        if expected:
            assert store.read("failures", ["image_id"]).column("image_id").to_pylist() == expected
        assert store.unjoined() == []
    finally:
        shutil.rmtree(root)
