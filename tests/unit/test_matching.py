"""Exact answers on small banks: blocks, ties, types, which search is asked, and what is refused."""

from types import SimpleNamespace

import pytest
import torch

from anomalydino_plugin import BankError, ConfigError, matching, nearest
from anomalydino_plugin.kernels.rows import SearchRows

AXES = torch.eye(4)


def unit_rows(count: int, width: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=1)


def test_distances_and_rows_of_axes():
    match = nearest(AXES[[2, 0]], torch.cat([AXES, -AXES]), k=8)
    assert match.rows[0].tolist() == [2, 0, 1, 3, 4, 5, 7, 6]  # equal distances: the lower row first
    assert match.distances.tolist() == [[0.0] + [1.0] * 6 + [2.0]] * 2
    assert (match.distances.dtype, match.rows.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("block", [1, 2, 3, 5, 6, 7, 20, 10**9])
def test_equal_rows_whatever_the_blocks(block):
    """Two queries: a block of n similarities holds n // 2 rows."""
    bank = torch.cat([-AXES[:1], AXES[1:2], AXES[:1], AXES[:1], AXES[1:2], AXES[:1]])
    assert nearest(AXES[:2], bank, block_elements=block).rows.tolist() == [[2], [1]]
    match = nearest(AXES[:2], bank, k=3, block_elements=block)
    assert match.rows[0].tolist() == [2, 3, 5]
    assert match.rows[1, :2].tolist() == [1, 4]
    assert match.distances.tolist() == [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


def test_memory_is_bounded_by_the_block(monkeypatch):
    """No product of queries and rows is larger than was asked for, and none is cut smaller than need be."""
    asked = []
    top = matching._top
    monkeypatch.setattr(matching, "_top", lambda values, k: asked.append(tuple(values.shape)) or top(values, k))
    queries, bank = unit_rows(1500), unit_rows(50, seed=1)
    nearest(queries, bank, block_elements=1024 * 20)
    assert asked == [(1024, 20), (1024, 20), (1024, 10), (476, 43), (476, 7)]
    asked.clear()
    nearest(queries[:3], bank, block_elements=2)
    assert asked == [(3, 1)] * 50  # at least one row
    asked.clear()
    nearest(queries[:1], bank, block_elements=25)
    assert asked == [(1, 25), (1, 25)]


def test_queries_beyond_one_block():
    queries, bank = unit_rows(2500), unit_rows(30, seed=1)
    match = nearest(queries, bank, k=2)
    exact, rows = (1 - queries.double() @ bank.double().T).sort(dim=1, stable=True)
    assert torch.equal(match.rows, rows[:, :2])
    assert torch.allclose(match.distances.double(), exact[:, :2], atol=1e-7)


def test_no_query():
    match = nearest(unit_rows(4)[:0], unit_rows(5), k=3)
    assert (tuple(match.distances.shape), tuple(match.rows.shape)) == ((0, 3), (0, 3))
    assert (match.distances.dtype, match.rows.dtype) == (torch.float32, torch.int64)


def test_distances_stay_in_their_range_where_lengths_are_rounded_up():
    row = AXES[:1] * 1.001
    assert nearest(torch.cat([row, -row]), row).distances.tolist() == [[0.0], [2.0]]


def test_half_precision_around_the_search_changes_nothing():
    queries, bank = unit_rows(200, 64), unit_rows(3000, 64, seed=1)
    exact, rows = (1 - queries.double() @ bank.double().T).sort(dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nearest(queries, bank, k=2)
    assert torch.equal(found.rows, rows[:, :2])
    assert torch.allclose(found.distances.double(), exact[:, :2], atol=1e-7)


def answers(rows: list[list[int]], asked: list):
    def nearest_rows(queries, k):
        asked.append((len(queries), k))
        return torch.tensor(rows)

    return nearest_rows


def test_a_layout_that_finds_rows_is_measured_exactly():
    asked = []
    layout = SimpleNamespace(nearest=lambda *given: (None, answers([[3, 0], [1, 2]], asked)(*given)))
    match = nearest(AXES[:2], SearchRows(AXES, (4,), "triton", layout), k=2)
    assert asked == [(2, 2)]
    assert match.rows.tolist() == [[0, 3], [1, 2]]  # ordered by the exact distance
    assert match.distances.tolist() == [[0.0, 1.0], [0.0, 1.0]]


def test_a_layout_that_measures_is_believed():
    asked = []
    distances = torch.tensor([[0.5, 0.25], [0.5, 0.5]])
    layout = SimpleNamespace(nearest=lambda *given: (distances, answers([[3, 0], [1, 2]], asked)(*given)))
    match = nearest(AXES[:2], SearchRows(AXES, (4,), "tiles_f32", layout), k=2)
    assert asked == [(2, 2)]
    assert match.rows.tolist() == [[0, 3], [1, 2]]
    assert match.distances.tolist() == [[0.25, 0.5], [0.5, 0.5]]


def test_rows_without_a_layout_are_searched_in_blocks():
    match = nearest(AXES, SearchRows(AXES.flip(0), (4,), "torch"))
    assert match.rows[:, 0].tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("queries", "bank", "options", "error", "message"),
    [
        (AXES, AXES[:0], {}, BankError, r"shape \(0, 4\): expected at least one row"),
        (AXES, AXES[0], {}, BankError, r"shape \(4,\): expected at least one row"),
        (AXES[0], AXES, {}, BankError, r"queries of shape \(4,\) against a bank of shape \(4, 4\)"),
        (AXES[:, :3], AXES, {}, BankError, r"queries of shape \(4, 3\) against a bank of shape \(4, 4\)"),
        (AXES, AXES, {"k": 0}, ConfigError, "k=0: expected 1 to 4"),
        (AXES, AXES, {"k": 5}, ConfigError, "k=5: expected 1 to 4"),
        (AXES, AXES, {"block_elements": 0}, ConfigError, "block_elements=0: expected a positive number"),
    ],
)
def test_refused(queries, bank, options, error, message):
    with pytest.raises(error, match=message):
        nearest(queries, bank, **options)


def test_one_block_element_and_as_many_neighbours_as_rows_are_allowed():
    assert nearest(AXES, AXES, k=4, block_elements=1).rows[:, 0].tolist() == [0, 1, 2, 3]
