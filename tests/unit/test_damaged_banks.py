"""Whatever is wrong with a bank, loading it is one error that names the file and says what to do."""

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from anomalydino_plugin import BankError, MemoryBank
from anomalydino_plugin.memory_bank import BankBuilder


@pytest.fixture
def file(tmp_path):
    builder = BankBuilder()
    builder.add(torch.randn(6, 4), (2, 3), image_id="a.png", size=(20, 30))
    builder.freeze({"backbone": "tiny"}).save(tmp_path / "bank.safetensors")
    return tmp_path / "bank.safetensors"


def parts(file) -> tuple[dict, dict]:
    with safe_open(file, "pt") as bank:
        return {name: bank.get_tensor(name) for name in bank.keys()}, dict(bank.metadata())  # noqa: SIM118


METADATA = {
    "a key is missing": lambda found: found.pop("angles"),
    "no JSON": lambda found: found.update(sizes="[[20, 30"),
    "JSON of another kind": lambda found: found.update(image_ids="7"),
    "names that are no text": lambda found: found.update(image_ids="[7]"),
    "sizes of three": lambda found: found.update(sizes="[[1, 2, 3]]"),
    "sizes that are text": lambda found: found.update(sizes='[["a", "b"]]'),
    "angle that is none": lambda found: found.update(angles="[null]"),
    "fingerprint that is a list": lambda found: found.update(fingerprint="[1]"),
    "no image": lambda found: found.update(image_ids="[]", sizes="[]"),
    "more images than sizes": lambda found: found.update(image_ids='["a.png", "b.png"]'),
    "no angle": lambda found: found.update(angles="[]"),
    "another format": lambda found: found.update(format="anomalydino-bank/9"),
    "deep nesting": lambda found: found.update(notes="[" * 100_000),
}
TENSORS = {
    "a tensor is missing": lambda found: found.pop("sources"),
    "flat rows": lambda found: found.update(rows=torch.randn(24)),
    "rows of no dimension": lambda found: found.update(rows=torch.tensor(1.0)),
    "one flat row": lambda found: found.update(
        rows=torch.ones(4), sources=torch.zeros(1, 4, dtype=torch.int32), foreground=torch.ones(1, dtype=torch.bool)
    ),
    "no rows": lambda found: found.update(
        rows=torch.empty(0, 4),
        sources=torch.empty(0, 4, dtype=torch.int32),
        foreground=torch.empty(0, dtype=torch.bool),
    ),
    "rows of another type": lambda found: found.update(rows=found["rows"].double()),
    "fewer sources": lambda found: found.update(sources=found["sources"][:5].clone()),
    "longer mask": lambda found: found.update(foreground=torch.ones(7, dtype=torch.bool)),
    "image that is not listed": lambda found: found["sources"].__setitem__((0, 0), 5),
    "negative angle": lambda found: found["sources"].__setitem__((0, 1), -1),
    "NaN": lambda found: found["rows"].__setitem__((3, 2), torch.nan),
}


@pytest.mark.parametrize("damage", METADATA.values(), ids=METADATA)
def test_damaged_metadata(file, damage):
    tensors, metadata = parts(file)
    damage(metadata)
    save_file(tensors, file, metadata)
    refused(file)


@pytest.mark.parametrize("damage", TENSORS.values(), ids=TENSORS)
def test_damaged_tensors(file, damage):
    tensors, metadata = parts(file)
    damage(tensors)
    save_file(tensors, file, metadata)
    refused(file)


def refused(file) -> None:
    with pytest.raises(BankError, match=r"(?s)bank\.safetensors.*[Bb]uild (it|the bank) again"):
        MemoryBank.load(file)


def test_every_cut_is_refused(file):
    whole = file.read_bytes()
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        refused(file)


@pytest.mark.parametrize("rows", [10**9, 2**62])
def test_a_header_that_promises_more_than_the_file_holds_allocates_nothing(file, rows):
    header = {"rows": {"dtype": "F32", "shape": [rows, 384], "data_offsets": [0, min(rows * 1536, 2**63)]}}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 64)
    refused(file)
    file.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    refused(file)


def test_another_file_of_tensors(file):
    save_file(parts(file)[0], file)
    with pytest.raises(BankError, match="has format None: expected 'anomalydino-bank/1'"):
        MemoryBank.load(file)


def test_no_file(tmp_path):
    with pytest.raises(BankError, match=r"no memory bank .*none\.safetensors.*anomalydino fit"):
        MemoryBank.load(tmp_path / "none.safetensors")
