import pytest
import torch

from anomalydino_plugin import BankError, MemoryBank, PatchSource
from anomalydino_plugin.memory_bank import BankBuilder

FINGERPRINT = {"backbone": "dinov2_vits14", "resolution": "448"}


def built(**options) -> MemoryBank:
    builder = BankBuilder()
    for image in ("a.png", "b.png"):
        for angle in (0, 45):
            builder.add(torch.randn(6, 4), (2, 3), image_id=image, size=(20, 30), angle=angle, **options)
    return builder.freeze(FINGERPRINT)


def test_every_row_knows_its_source():
    bank = built()
    assert len(bank) == 24
    assert bank.source(0) == PatchSource("a.png", 0.0, 0, 0)
    assert bank.source(11) == PatchSource("a.png", 45.0, 1, 2)
    assert bank.source(16) == PatchSource("b.png", 0.0, 1, 1)
    with pytest.raises(BankError, match="expected 0 to 23"):
        bank.source(24)


def test_rows_are_normalised():
    assert torch.allclose(built().rows.norm(dim=1), torch.ones(24))


def test_saved_and_loaded(tmp_path):
    bank = built()
    bank.save(tmp_path / "bank.safetensors")
    again = MemoryBank.load(tmp_path / "bank.safetensors", FINGERPRINT)
    assert torch.equal(again.rows, bank.rows)
    assert [again.source(row) for row in range(24)] == [bank.source(row) for row in range(24)]
    assert (again.sizes, again.fingerprint) == (((20, 30), (20, 30)), FINGERPRINT)
    assert [path.name for path in tmp_path.iterdir()] == ["bank.safetensors"]  # no temporary file left


def test_other_settings_are_refused_by_name(tmp_path):
    built().save(tmp_path / "bank.safetensors")
    with pytest.raises(BankError, match="resolution: bank '448', model '672'") as caught:
        MemoryBank.load(tmp_path / "bank.safetensors", {**FINGERPRINT, "resolution": "672"})
    assert "backbone" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a bank", b"\xff" * 64])
def test_damaged_files(tmp_path, content):
    (tmp_path / "bank.safetensors").write_bytes(content)
    with pytest.raises(BankError, match="cannot read memory bank"):
        MemoryBank.load(tmp_path / "bank.safetensors")


def test_only_foreground_is_kept_where_asked():
    mask = torch.tensor([True, False, False, False, False, True])
    bank = built(foreground=mask, keep_background=False)
    assert len(bank) == 8
    assert [bank.source(row)[2:] for row in (0, 1)] == [(0, 0), (1, 2)]


def test_nothing_to_keep():
    with pytest.raises(BankError, match="empty"):
        BankBuilder().freeze(FINGERPRINT)
    with pytest.raises(BankError, match="no foreground"):
        built(foreground=torch.zeros(6, dtype=torch.bool), keep_background=False)
    with pytest.raises(BankError, match="not finite"):
        BankBuilder().add(torch.full((6, 4), torch.nan), (2, 3), image_id="a", size=(2, 3))
