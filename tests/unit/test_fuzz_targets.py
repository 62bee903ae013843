"""The targets of `make fuzz` hold on their seeds, on every cut of them, and on bytes changed at random."""

import random

import pytest
from fuzz.targets import TARGETS, seeds

# Found by fuzzing, and whether it is accepted now that what was wrong is mended.
FOUND: list[tuple[str, bytes, bool]] = [
    ("manifest", "uri\na.png\n".encode("utf-16"), False),
    ("manifest", b"uri,image_id,label,_uri\ns3://3:]/b/a.png,1,cut,m.png\n", False),
    ("configuration", b"stages: [extract: {images: a, out: ~run}]", True),  # no such user: a folder of that name
    ("configuration", b'stages: [extract: {images: "a\\0b", out: run}]', False),
]


@pytest.mark.parametrize("target", TARGETS)
def test_seeds_and_what_is_near_them(target):
    rng = random.Random(0)  # noqa: S311
    for seed in seeds(target):
        assert TARGETS[target](seed)
        for length in range(0, len(seed), max(1, len(seed) // 40)):
            TARGETS[target](seed[:length])
        for _ in range(60):
            changed = bytearray(seed)
            for _ in range(rng.randint(1, 6)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            TARGETS[target](bytes(changed))


@pytest.mark.parametrize(("target", "data", "accepted"), FOUND)
def test_what_fuzzing_found(target, data, accepted):
    assert TARGETS[target](data) is accepted
