"""What the eight-bit search is told about a product: how far it may be off, of rows that make it hard."""

import itertools
from unittest.mock import patch

import numpy as np
import pytest
import torch

from anomalydino_plugin import RunningLowest, match_set, nearest, search_rows
from anomalydino_plugin.batched import whole_set
from anomalydino_plugin.kernels import rows as kernel_rows

pytest.importorskip("numba")

from anomalydino_plugin.kernels import heaps, lowest, panels, tiles
from anomalydino_plugin.kernels.microkernel import LANES, QUERIES, QUERY_NUMBERS, ROW_NUMBERS
from anomalydino_plugin.kernels.panels import row_inside

needs_vnni = pytest.mark.skipif(
    bool(kernel_rows._missing("tiles_int8", "cpu", 2)), reason="needs a processor with AVX-512 VNNI"
)


def unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(norms > 0, norms, 1)).astype(np.float32)


def massive(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    """Two features hold nearly all of each row, as in large vision transformers."""
    rows = rng.standard_normal((count, width))
    rows[:, : min(2, width)] *= 50
    return rows


def mixed(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    rows = massive(rng, count, width)
    rows[::5] = 0
    rows[1::5] = np.eye(width)[rng.integers(0, width, len(rows[1::5]))]
    rows[2::5] = -rows[3 % count]
    return rows


KINDS = {
    "random": lambda rng, count, width: rng.standard_normal((count, width)),
    "a large mean": lambda rng, count, width: 10 + rng.standard_normal((count, width)),
    "massive features": massive,
    "equal": lambda rng, count, width: np.ones((count, width)),
    "zeros, unit vectors, opposites": mixed,
}


def estimates(packed_queries: panels.QueryPanels, packed: panels.RowPanels, queries: int, rows: int) -> np.ndarray:
    """(Q, M) what the innermost loop should come out at, from the panels alone."""
    steps = -(-packed.width // 4)
    words = packed_queries.words.transpose(0, 2, 1).reshape(-1, steps + QUERY_NUMBERS)[:queries]
    own = np.ascontiguousarray(words[:, :steps]).view(np.int8).astype(np.int64)
    begin, (step, part) = (
        words[:, steps].astype(np.int64),
        np.ascontiguousarray(words[:, steps + 1 :]).view(np.float32).T,
    )
    found = np.full((queries, rows), np.nan)
    for group, first in enumerate(packed.first):
        for place in range(8 * 2 * LANES):
            pair, bit = divmod(place, 2 * LANES)
            inside = row_inside.py_func(pair, bit)
            if inside >= packed.filled[group]:
                continue
            row = packed.words[group, pair, :, bit // LANES, bit % LANES]
            theirs = np.ascontiguousarray(row[:steps]).view(np.uint8).astype(np.int64)
            row_step, row_part = np.ascontiguousarray(row[steps : steps + ROW_NUMBERS]).view(np.float32)
            total = own @ theirs + begin
            found[:, first + inside] = total * (step.astype(np.float64) * row_step) + part + row_part
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [2, 6, 24, 384, 770])
def test_no_product_is_further_off_than_is_said(kind, width):
    rng = np.random.default_rng(width)
    rows, queries = (unit(KINDS[kind](rng, count, width)) for count in (300, 21))
    packed = panels.pack_rows(rows, [200, 100], "int8")
    packed_queries = panels.pack_queries(queries, packed)
    exact = queries.astype(np.float64) @ rows.astype(np.float64).T
    off = np.abs(estimates(packed_queries, packed, 21, 300) - exact)
    assert (off <= packed_queries.reach[:, None]).all()


def test_the_bound_is_narrow_where_rows_share_a_mean_and_features_are_massive():
    """Rounded as they are, it would be 0.007 and 0.09."""
    rng = np.random.default_rng(0)
    for kind, most in (("a large mean", 0.0004), ("massive features", 0.02)):
        rows, queries = (unit(KINDS[kind](rng, count, 384)) for count in (512, 32))
        assert panels.pack_queries(queries, panels.pack_rows(rows, [512], "int8")).reach.max() < most


@needs_vnni
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [2, 24, 384, 1536])
def test_no_product_of_the_processor_is_further_off_than_is_said(kind, width):
    """Each row is an image of its own, so that the maximum of its tile is its product."""
    rng = np.random.default_rng(width)
    rows, queries = (unit(KINDS[kind](rng, count, width)) for count in (60, 21))
    packed = panels.pack_rows(rows, [1] * 60, "int8")
    packed_queries = panels.pack_queries(queries, packed)
    products = np.empty((len(packed_queries.words) * QUERIES, len(packed.first) * LANES), np.float32)
    tiles.tile_maxima(packed_queries.words, packed.words, packed.filled, packed.image, -1, products)
    exact = queries.astype(np.float64) @ rows.astype(np.float64).T
    assert (np.abs(products[:21, ::LANES] - exact) <= packed_queries.reach[:, None]).all()


@needs_vnni
@pytest.mark.parametrize("width", [2, 6, 384, 770])
def test_the_innermost_loop_comes_out_at_what_the_panels_say(width):
    rng = np.random.default_rng(0)
    rows, queries = (unit(mixed(rng, count, width)) for count in (300, 21))
    packed = panels.pack_rows(rows, [300], "int8")
    packed_queries = panels.pack_queries(queries, packed)
    maxima = np.empty((len(packed_queries.words) * QUERIES, len(packed.first) * LANES), np.float32)
    tiles.tile_maxima(packed_queries.words, packed.words, packed.filled, packed.image, -1, maxima)
    expected = estimates(packed_queries, packed, 21, 300)
    for tile in range(19):
        np.testing.assert_allclose(
            maxima[:21, tile], expected[:, tile * LANES : (tile + 1) * LANES].max(axis=1), atol=2e-6
        )


def similarities(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(Q, M) in float32, by the function that computes again what may count."""
    found = np.empty((len(queries), len(rows)), np.float32)
    for query, row in np.ndindex(found.shape):
        found[query, row] = heaps.similarity(queries, query, rows, row)
    return found


def near_ties(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    """Rows that eight bits cannot tell apart."""
    return np.random.default_rng(0).standard_normal((1, width)) + 3e-4 * rng.standard_normal((count, width))


@needs_vnni
@pytest.mark.parametrize("kind", [*KINDS, "near ties"])
@pytest.mark.parametrize("count", [1, 7, 300])
def test_what_is_kept_is_what_comparing_all_in_float32_keeps(kind, count):
    """Bit for bit, and the nearest row too; of near ties and equal rows more are listed than there is room for."""
    rng = np.random.default_rng(count)
    make = KINDS.get(kind, near_ties)
    rows, queries = unit(make(rng, 3000, 32)), unit(make(rng, 9, 32))
    running, cuts = RunningLowest(torch.from_numpy(queries), count), (0, 200, 500 + lowest._ROOM + panels.GROUP, 3000)
    for start, stop in itertools.pairwise(cuts):
        block = search_rows(torch.from_numpy(rows[start:stop]), [stop - start], "tiles_int8")
        running.update(block, [stop - start], start)
    expected = similarities(queries, rows)
    np.testing.assert_array_equal(
        running._highest.sort(dim=1).values.numpy(), np.sort(expected, axis=1)[:, len(rows) - count :]
    )
    np.testing.assert_array_equal(running.result().rows.numpy(), expected.argmax(axis=1))
    found = nearest(torch.from_numpy(queries), search_rows(torch.from_numpy(rows), kernel="tiles_int8"))
    np.testing.assert_array_equal(found.rows[:, 0].numpy(), expected.argmax(axis=1))


@needs_vnni
@pytest.mark.parametrize("kind", [*KINDS, "near ties"])
def test_a_set_at_once_keeps_what_comparing_all_in_float32_keeps(kind):
    rng = np.random.default_rng(0)
    make = KINDS.get(kind, near_ties)
    images = [unit(make(rng, count, 32)) for count in (40, 300, 30)]
    with patch.object(whole_set, "BLOCK_ROWS", 300):
        together = match_set([torch.from_numpy(image) for image in images], share=0.05, kernel="tiles_int8")
    for place, match in enumerate(together):
        others = np.concatenate([image for other, image in enumerate(images) if other != place])
        found = np.sort(similarities(images[place], others), axis=1)[:, len(others) - int(0.05 * len(others)) + 1 :]
        exact = (1 - found.astype(np.float64)).clip(0, 2).mean(axis=1)
        np.testing.assert_allclose(match.distances.numpy(), exact, atol=1e-7)


@needs_vnni
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_its_own_rows_matter(value):
    """Without that, the mean of the rows and the largest margin would not be finite either."""
    rng = np.random.default_rng(0)
    images = [torch.from_numpy(unit(rng.standard_normal((200, 32)))) for _ in range(3)]
    images[2][7, 3] = value
    with patch.object(whole_set, "BLOCK_ROWS", 200):
        found, expected = (match_set(images, share=0.1, kernel=kernel) for kernel in ("tiles_int8", "tiles_f32"))
    for one, other in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_allclose(one.distances, other.distances, atol=1e-6)
        assert torch.equal(one.rows, other.rows)
    bank = search_rows(torch.cat(images), [600], "tiles_int8")
    assert np.isnan(value) == (nearest(images[0], bank).rows[:, 0].tolist() == list(range(200)))


@needs_vnni
def test_both_precisions_find_the_same_rows():
    rng = np.random.default_rng(0)
    rows, queries = (torch.from_numpy(unit(massive(rng, count, 384))) for count in (5000, 100))
    one, other = (nearest(queries, search_rows(rows, kernel=kernel)) for kernel in ("tiles_f32", "tiles_int8"))
    assert torch.equal(one.rows, other.rows)
    assert torch.equal(one.distances, other.distances)
