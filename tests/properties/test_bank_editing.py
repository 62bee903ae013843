"""Invariants of merging, dropping and subsampling, on banks of random rows."""

import dataclasses

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalydino_plugin import (
    MemoryBank,
    PatchSource,
    drop_images,
    merge_banks,
    nearest,
    subsample_coreset,
    subsample_randomly,
)
from anomalydino_plugin.bank_editing import keep_rows

WIDTH = 8


@st.composite
def banks(draw, name: str = "a") -> MemoryBank:
    """Rows in any order of image, angle and position; some repeat, and an image may have none."""
    count = draw(st.integers(1, 30))
    images = draw(st.integers(1, 4))
    angles = draw(st.permutations([0.0, 45.0, 90.0]))[: draw(st.integers(1, 3))]
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    rows = rng.standard_normal((count, WIDTH)).astype(np.float32)
    rows[rng.random(count) < 0.3] = rows[0]
    sources = [rng.integers(0, high, count) for high in (images, len(angles), 5, 7)]
    return MemoryBank(
        rows=torch.nn.functional.normalize(torch.from_numpy(rows), dim=1),
        sources=torch.from_numpy(np.stack(sources, axis=1).astype(np.int32)),
        foreground=torch.from_numpy(rng.random(count) < 0.5),
        image_ids=tuple(f"{name}{number}" for number in range(images)),
        angles=tuple(angles),
        sizes=tuple((10 + number, int(rng.integers(10, 99))) for number in range(images)),
        fingerprint={"backbone": "tiny"},
        notes={"tests": "{}"},
    )


def row_for_row(bank: MemoryBank) -> list[tuple[PatchSource, list[float], bool, tuple[int, int]]]:
    """Everything that a bank says of each of its rows."""
    sizes = dict(zip(bank.image_ids, bank.sizes, strict=True))
    sources = [bank.source(row) for row in range(len(bank))]
    parts = zip(sources, bank.rows.tolist(), bank.foreground.tolist(), strict=True)
    return [(source, row, foreground, sizes[source.image_id]) for source, row, foreground in parts]


@settings(deadline=None, max_examples=60)
@given(a=banks("a"), b=banks("b"))
def test_dropping_what_was_merged_gives_the_bank_back(a, b):
    merged = merge_banks([a, b])
    assert row_for_row(merged) == row_for_row(a) + row_for_row(b)
    for kept, dropped in ((a, b), (b, a)):
        again = drop_images(merged, dropped.image_ids)
        assert row_for_row(again) == row_for_row(kept)
        assert (again.image_ids, again.sizes, again.notes) == (kept.image_ids, kept.sizes, kept.notes)


@settings(deadline=None, max_examples=40)
@given(a=banks("a"), b=banks("b"), c=banks("c"))
def test_merging_is_associative(a, b, c):
    at_once = merge_banks([a, b, c])
    for nested in (merge_banks([merge_banks([a, b]), c]), merge_banks([a, merge_banks([b, c])])):
        assert row_for_row(nested) == row_for_row(at_once)
        assert torch.equal(nested.sources, at_once.sources)
        assert dataclasses.replace(nested, rows=0, sources=0, foreground=0) == dataclasses.replace(
            at_once, rows=0, sources=0, foreground=0
        )


@settings(deadline=None, max_examples=40)
@given(bank=banks(), data=st.data())
def test_dropping_in_steps_or_at_once(bank, data):
    order = data.draw(st.permutations(bank.image_ids))[1:]
    at_once, stepwise = drop_images(bank, order), bank
    for image_id in order:
        stepwise = drop_images(stepwise, [image_id])
    assert row_for_row(stepwise) == row_for_row(at_once)
    assert row_for_row(at_once) == [row for row in row_for_row(bank) if row[0].image_id not in order]


@settings(deadline=None, max_examples=60)
@given(
    bank=banks(),
    share=st.floats(0.01, 1.0),
    seed=st.integers(0, 9),
    subsample=st.sampled_from([subsample_randomly, subsample_coreset]),
)
def test_subsampling_keeps_rows_with_their_provenance_and_lowers_no_distance(bank, share, seed, subsample):
    numbered = dataclasses.replace(bank, sources=bank.sources.clone())
    numbered.sources[:, 3] = torch.arange(len(bank))  # so that every row has a provenance of its own
    part = subsample(numbered, share, seed)
    rows = part.sources[:, 3].tolist()
    assert rows == sorted(set(rows))
    assert row_for_row(part) == [row_for_row(numbered)[row] for row in rows]
    expected = max(1, int(len(bank) * share))
    assert len(part) == expected or (subsample is subsample_coreset and 1 <= len(part) < expected)
    assert (part.image_ids, part.sizes) == (bank.image_ids, bank.sizes)
    queries = torch.nn.functional.normalize(torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=1)
    whole = nearest(torch.cat([queries, bank.rows]), bank.rows).distances
    assert (nearest(torch.cat([queries, bank.rows]), part.rows).distances >= whole - 1e-6).all()


@settings(deadline=None, max_examples=40)
@given(bank=banks(), share=st.floats(0.05, 1.0))
def test_a_coreset_lacks_rows_only_where_rows_repeat(bank, share):
    part = subsample_coreset(bank, share)
    if len(part) < max(1, int(len(bank) * share)):
        kept = {tuple(row) for row in part.rows.tolist()}
        assert kept == {tuple(row) for row in bank.rows.tolist()}


@settings(deadline=None, max_examples=30)
@given(bank=banks())
def test_keeping_all_rows_is_the_identity(bank):
    for everything in (torch.ones(len(bank), dtype=torch.bool), torch.arange(len(bank))):
        same = keep_rows(bank, everything)
        assert row_for_row(same) == row_for_row(bank)
        assert (same.image_ids, same.angles, same.sizes) == (bank.image_ids, bank.angles, bank.sizes)
    for subsample in (subsample_randomly, subsample_coreset):
        assert row_for_row(subsample(bank, 1.0)) == row_for_row(bank)
