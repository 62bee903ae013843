import os
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from anomalydino_plugin import BankError, MemoryBank, PatchSource
from anomalydino_plugin.memory_bank import BankBuilder, check_fingerprint

FINGERPRINT = {"resolution": "448", "backbone": "dinov2_vits14"}


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


def view(value: float, patches: int = 6) -> torch.Tensor:
    return torch.full((patches, 4), float(value))


def test_indices_follow_the_order_of_images_and_angles():
    builder = BankBuilder()
    builder.add(view(1), (2, 3), image_id="b", size=(20, 30), angle=90)
    builder.add(view(1), (3, 2), image_id="a", size=(40, 50))
    builder.add(view(1), (2, 3), image_id="b", size=(1, 1), angle=0)
    bank = builder.freeze(FINGERPRINT)
    assert (bank.image_ids, bank.angles) == (("b", "a"), (90.0, 0.0))
    assert bank.sizes == ((20, 30), (40, 50))  # the first view of an image says its size
    assert bank.sources[:, :2].tolist() == [[0, 0]] * 6 + [[1, 1]] * 6 + [[0, 1]] * 6
    assert bank.sources[:6, 2:].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert bank.sources[6:12, 2:].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]]
    assert (bank.sources.dtype, bank.rows.dtype, bank.foreground.dtype) == (torch.int32, torch.float32, torch.bool)
    assert bank.notes == {}


def test_background_is_kept_and_marked():
    mask = torch.tensor([True, False, True, False, False, True])
    builder = BankBuilder()
    builder.add(view(1), (2, 3), image_id="a", size=(2, 3), foreground=mask)
    builder.add(view(1), (2, 3), image_id="b", size=(2, 3))
    builder.add(view(1), (2, 3), image_id="c", size=(2, 3), foreground=mask, keep_background=False)
    assert builder.freeze(FINGERPRINT).foreground.tolist() == mask.tolist() + [True] * 6 + [True] * 3


def test_each_row_is_normalised_on_its_own_whatever_its_type():
    builder = BankBuilder()
    features = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float16)
    builder.add(features, (1, 2), image_id="a", size=(1, 2))
    rows = builder.freeze(FINGERPRINT).rows
    assert rows.dtype == torch.float32
    assert torch.allclose(rows, torch.tensor([[0.6, 0.8], [0.0, 1.0]]))


@pytest.mark.parametrize("row", [-1, 24, 1000])
def test_rows_that_are_not_there(row):
    with pytest.raises(BankError, match=f"bank row {row}: expected 0 to 23"):
        built().source(row)


def test_first_and_last_row_are_there():
    bank = built()
    assert bank.source(0).row == 0
    assert bank.source(23) == PatchSource("b.png", 45.0, 1, 2)


@pytest.mark.parametrize("features", [torch.ones(5, 4), torch.ones(7, 4)])
def test_features_that_do_not_fit_the_grid(features):
    with pytest.raises(BankError, match=rf"{len(features)} features for a grid of \(2, 3\): expected 6"):
        BankBuilder().add(features, (2, 3), image_id="a", size=(2, 3))


def test_one_value_that_is_not_finite_is_refused_and_names_the_image():
    features = view(1)
    features[5, 3] = torch.inf
    with pytest.raises(BankError, match=r"'x\.png' gave features that are not finite"):
        BankBuilder().add(features, (2, 3), image_id="x.png", size=(2, 3))


def test_what_is_written_and_read(tmp_path):
    bank = replace(built(), notes={"why": "a test", "by": "hand"})
    path = tmp_path / "new" / "folder" / "bank.safetensors"
    bank.save(path)
    bank.save(str(path))  # again, over itself
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        assert sorted(file.keys()) == ["foreground", "rows", "sources"]
    assert metadata == {
        "format": "anomalydino-bank/1",
        "image_ids": '["a.png", "b.png"]',
        "angles": "[0.0, 45.0]",
        "sizes": "[[20, 30], [20, 30]]",
        "fingerprint": '{"backbone": "dinov2_vits14", "resolution": "448"}',
        "notes": '{"by": "hand", "why": "a test"}',
    }
    again = MemoryBank.load(str(path))
    for name in ("image_ids", "angles", "sizes", "fingerprint", "notes"):
        assert getattr(again, name) == getattr(bank, name)
    for name in ("rows", "sources", "foreground"):
        assert torch.equal(getattr(again, name), getattr(bank, name))


def test_rows_that_lie_across_memory_are_written_as_they_read(tmp_path):
    bank = replace(built(), rows=torch.randn(4, 24).T)
    bank.save(tmp_path / "bank.safetensors")
    assert torch.equal(MemoryBank.load(tmp_path / "bank.safetensors").rows, bank.rows)


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "bank.safetensors"
    built().save(path)
    before = path.read_bytes()
    seen = []

    def breaks(self, target):
        seen.append((self.name, self.read_bytes()[:8] != b"", target))
        raise OSError("no space")

    monkeypatch.setattr(type(path), "replace", breaks)
    with pytest.raises(OSError, match="no space"):
        built().save(path)
    assert seen == [(f".bank.safetensors.{os.getpid()}.tmp", True, path)]  # beside it, and hidden
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["bank.safetensors"]


def test_every_setting_that_differs_is_named():
    with pytest.raises(BankError) as caught:
        check_fingerprint({"a": "1", "b": "2", "d": "4"}, {"a": "1", "b": "3", "c": "5"}, "some.bank")
    differing = "b: bank '2', model '3'; c: bank None, model '5'; d: bank '4', model None"
    assert f"memory bank 'some.bank' was made with other settings ({differing})" in str(caught.value)
    assert check_fingerprint({"a": "1"}, {"a": "1"}, "some.bank") is None


def test_loading_compares_only_what_is_expected(tmp_path):
    path = tmp_path / "bank.safetensors"
    built().save(path)
    assert MemoryBank.load(path).fingerprint == FINGERPRINT
    with pytest.raises(BankError, match=r"bank\.safetensors' was made with other settings \(backbone"):
        MemoryBank.load(path, {})
