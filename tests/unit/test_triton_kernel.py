"""The GPU search under Triton's interpreter, in a process of its own: the interpreter is chosen when Triton loads."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import torch
from anomalydino_plugin import RunningLowest, nearest, search_rows

def unit(count, seed, width=48):
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)

base = unit(1, 9)
close = torch.nn.functional.normalize(base + 1e-4 * unit(300, 1), dim=1)  # nearer than float16 can tell apart
for bank, queries in ((unit(300, 1), unit(140, 2)), (close, close[:50] + 0), (unit(5, 3), unit(3, 4))):
    match = nearest(queries, search_rows(bank, kernel="triton"), k=3)
    expected = (1 - queries.double() @ bank.double().T).clamp(0, 2).sort(dim=1).values[:, :3]
    assert (match.distances - expected).abs().max() < 3e-7, "nearest"

images = [unit(length, seed) for seed, length in enumerate((40, 7, 90, 33))]
for count, left_out in ((1, None), (5, 2), (60, 0)):
    queries = images[2][:20]
    found = {}
    for kernel in ("torch", "triton"):
        lowest, row = RunningLowest(queries, count), 0
        for first in (0, 2):
            lengths = [len(image) for image in images[first : first + 2]]
            own = left_out - first if left_out is not None and first <= left_out < first + 2 else None
            lowest.update(search_rows(torch.cat(images[first : first + 2]), lengths, kernel), lengths, row, own)
            row += sum(lengths)
        found[kernel] = lowest.result()
    assert (found["torch"].distances - found["triton"].distances).abs().max() < 1e-6, "lowest"
    assert torch.equal(found["torch"].rows, found["triton"].rows), "rows"
print("equal")
"""


def test_equals_the_reference_under_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
