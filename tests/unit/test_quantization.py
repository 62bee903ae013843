"""What the eight-bit search is told about a product: how far it may be off, of rows that make it hard."""

import itertools

import numpy as np
import pytest
import torch

from anomalydino_plugin import RunningLowest, nearest, search_rows
from anomalydino_plugin.kernels import rows as kernel_rows

pytest.importorskip("numba")

from anomalydino_plugin.kernels import lowest, panels, tiles
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
    """Rounded as they are, it would be 0.02, 0.007 and 0.09."""
    rng = np.random.default_rng(0)
    for kind, most in (("random", 0.0205), ("a large mean", 0.0004), ("massive features", 0.02)):
        rows, queries = (unit(KINDS[kind](rng, count, 384)) for count in (512, 32))
        assert panels.pack_queries(queries, panels.pack_rows(rows, [512], "int8")).reach.max() < most


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


@needs_vnni
@pytest.mark.parametrize("count", [1, 7, 300])
def test_near_ties_among_the_lowest_and_more_of_them_than_a_list_has_room_for(count):
    """Rows that eight bits cannot tell apart: all are listed, and the n lowest are still the n lowest."""
    rng = np.random.default_rng(count)
    base = unit(rng.standard_normal((1, 64)))
    rows, queries = (torch.from_numpy(unit(base + 1e-4 * rng.standard_normal((size, 64)))) for size in (5000, 50))
    running, cuts = RunningLowest(queries, count), (0, 1100, 2 * (lowest._ROOM + panels.GROUP), 5000)
    for start, stop in itertools.pairwise(cuts):
        running.update(search_rows(rows[start:stop], [stop - start], "tiles_int8"), [stop - start], start)
    exact = (1 - queries.double() @ rows.double().T).sort(dim=1).values[:, :count].mean(dim=1)
    np.testing.assert_allclose(running.result().distances.numpy(), exact.numpy(), atol=3e-7)


@needs_vnni
def test_both_precisions_find_the_same_rows():
    rng = np.random.default_rng(0)
    rows, queries = (torch.from_numpy(unit(massive(rng, count, 384))) for count in (5000, 100))
    one, other = (nearest(queries, search_rows(rows, kernel=kernel)) for kernel in ("tiles_f32", "tiles_int8"))
    assert torch.equal(one.rows, other.rows)
    assert torch.equal(one.distances, other.distances)
