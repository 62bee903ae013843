"""The GPU search under Triton's interpreter, in a process of its own: the interpreter is chosen when Triton loads.

What is computed there is slow to the point that every case is as small as it can be.
"""

import pytest
from triton_interpreter import printed_by

pytest.importorskip("triton")

PROGRAM = """
import sys

import torch
from anomalydino_plugin import RunningLowest, nearest, search_rows
from anomalydino_plugin.kernels import gpu_search, triton_refine

gpu_search._ROOM = 60
triton_refine._FEATURES_AT_ONCE = 16  # so that a row needs several steps, the last one not whole

def unit(count, seed, width=24):
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)

def nearest_rows():
    triton_refine._TILES_AT_ONCE = 8  # so that a bank needs several steps
    base = unit(1, 9)
    close = torch.nn.functional.normalize(base + 1e-4 * unit(300, 1), dim=1)  # nearer than float16 can tell apart
    zero = torch.zeros(1, 130)
    cases = (
        (unit(300, 1, 128), unit(140, 2, 128)),
        (torch.cat([unit(60, 1, 130), zero]), torch.cat([unit(3, 2, 130), zero])),
        (close, close[:50] + 0),
        (unit(5, 3), unit(3, 4)),
    )
    for bank, queries in cases:
        for k in (1, 3):
            match = nearest(queries, search_rows(bank, kernel="triton"), k=k)
            expected = (1 - queries.double() @ bank.double().T).clamp(0, 2).sort(dim=1).values[:, :k]
            assert (match.distances - expected).abs().max() < 3e-7

def compared(queries, blocks, count, left_out):
    found = {}
    for kernel in ("torch", "triton"):
        lowest, row, seen = RunningLowest(queries, count), 0, 0
        for images in blocks:
            own = left_out - seen if left_out is not None and seen <= left_out < seen + len(images) else None
            lowest.update(search_rows(torch.cat(images), list(map(len, images)), kernel), list(map(len, images)), row, own)
            row, seen = row + sum(map(len, images)), seen + len(images)
        found[kernel] = lowest.result()
    assert (found["torch"].distances - found["triton"].distances).abs().max() < 1e-6
    assert torch.equal(found["torch"].rows, found["triton"].rows)

def blocks():
    images = [unit(length, seed, 128) for seed, length in enumerate((140, 7, 190, 133))]
    for count, left_out in ((1, None), (5, 2), (60, 0)):  # the last of more than a block has
        compared(images[2][:20], (images[:2], images[2:]), count, left_out)

def without_a_guess():
    def no_guess(*_):
        return None

    gpu_search._guess = no_guess
    blocks()

def a_guess_too_high():
    def too_high(half, *_):
        return torch.full((len(half),), 0.99)

    gpu_search._guess = too_high
    blocks()

def nearly_all_equal():
    gpu_search._HELD = 1000  # so that they are compared query by query
    one = unit(1, 5).expand(100, -1)
    for queries in (one[:2] + 0, unit(3, 6)):
        match = nearest(queries, search_rows(one + 0, kernel="triton"), k=3)
        assert match.rows.tolist() == [[0, 1, 2]] * len(queries)

def can_run():
    assert gpu_search.why_not(torch.device("cpu")) == ""

def equal_rows():
    one = unit(1, 5).expand(100, -1)  # more than there is room for
    rows = torch.cat([unit(90, 6), one, unit(60, 7)])
    layout = search_rows(rows, None, "triton").layout
    lowest = RunningLowest(one[:3] + 0, 9)
    before = lowest._highest.clone()
    assert not layout.take_in(one[:3] + 0, lowest._lowest, 0, -1, by_image=False)
    assert torch.equal(before, lowest._highest)
    compared(one[:3] + 0, ([rows],), 9, None)
    compared(unit(20, 8), ([rows],), 9, None)

globals()[sys.argv[1]]()
print("equal")
"""


@pytest.mark.parametrize(
    "case",
    ["nearest_rows", "blocks", "without_a_guess", "a_guess_too_high", "equal_rows", "nearly_all_equal", "can_run"],
)
def test_equals_the_reference_under_the_interpreter(case):
    assert printed_by(PROGRAM, case) == "equal"
