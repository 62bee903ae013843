"""Invariants of matching, against a float64 oracle."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalydino_plugin import kernel_for, nearest, search_rows
from anomalydino_plugin.errors import ConfigError


def runnable() -> list[str]:
    """Kernels of this machine; `auto` would leave so few rows to torch."""
    found = []
    for kernel in ("torch", "tiles_f32", "tiles_bf16", "tiles_int8"):
        try:
            found.append(kernel_for(kernel))
        except ConfigError:
            continue
    return found


kernels = st.sampled_from(runnable())


def unit_rows(seed: int, count: int, width: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, width)).astype(np.float32)
    rows[rng.random(count) < 0.2] = rows[0]  # duplicates
    return torch.nn.functional.normalize(torch.from_numpy(rows), dim=1)


sizes = st.tuples(
    st.integers(0, 2**16), st.integers(1, 40), st.integers(1, 600), st.integers(1, 12).map(lambda half: 2 * half)
)


@settings(deadline=None, max_examples=60)
@given(sizes=sizes, k=st.integers(1, 5), block=st.integers(1, 500), kernel=kernels)
def test_equals_float64_oracle_whatever_kernel_and_block(sizes, k, block, kernel):
    seed, queries_count, rows_count, width = sizes
    k = min(k, rows_count)
    queries, bank = unit_rows(seed, queries_count, width), unit_rows(seed + 1, rows_count, width)
    match = nearest(queries, search_rows(bank, kernel=kernel), k=k, block_elements=block)
    exact = 1 - queries.double() @ bank.double().T
    expected = exact.sort(dim=1).values[:, :k].clamp(0, 2)
    assert torch.allclose(match.distances.double(), expected, atol=1e-6)
    assert torch.allclose(exact.gather(1, match.rows).clamp(0, 2), match.distances.double(), atol=1e-6)
    assert all(len(set(row.tolist())) == k for row in match.rows)


@settings(deadline=None, max_examples=40)
@given(sizes=sizes, block=st.integers(1, 500))
def test_block_size_changes_nothing(sizes, block):
    seed, queries_count, rows_count, width = sizes
    queries, bank = unit_rows(seed, queries_count, width), unit_rows(seed + 1, rows_count, width)
    assert torch.allclose(
        nearest(queries, bank, block_elements=block).distances, nearest(queries, bank).distances, atol=1e-6
    )


@settings(deadline=None, max_examples=40)
@given(sizes=sizes)
def test_permuting_the_bank_changes_no_distance(sizes):
    seed, queries_count, rows_count, width = sizes
    queries, bank = unit_rows(seed, queries_count, width), unit_rows(seed + 1, rows_count, width)
    order = torch.randperm(rows_count, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(nearest(queries, bank[order]).distances, nearest(queries, bank).distances, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(sizes=sizes, extra=st.integers(1, 20))
def test_adding_rows_never_raises_a_distance(sizes, extra):
    seed, queries_count, rows_count, width = sizes
    queries, bank = unit_rows(seed, queries_count, width), unit_rows(seed + 1, rows_count, width)
    larger = torch.cat([bank, unit_rows(seed + 2, extra, width)])
    assert (nearest(queries, larger).distances <= nearest(queries, bank).distances + 1e-6).all()
