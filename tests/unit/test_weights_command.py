"""`anomalydino weights show | fetch | import`."""

import pytest
from generated import TINY
from safetensors.torch import save_file

from anomalydino_plugin import load_backbone
from jobs.cli import main


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Weights of the smallest backbone; no network, and an empty cache."""
    monkeypatch.setenv("ANOMALYDINO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ANOMALYDINO_WEIGHTS", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    tensors = load_backbone(TINY, "random:1").vit.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def test_an_imported_file_is_shown_and_found(file, tmp_path, capsys):
    assert main(["weights", "show", "--backbone", TINY]) == 0
    shown = capsys.readouterr().out
    assert "not set" in shown
    assert "nothing at" in shown
    assert "has only dinov2_vits14" in shown
    assert main(["weights", "import", str(file), "--backbone", TINY]) == 0
    imported = capsys.readouterr().out
    assert f"{tmp_path / 'cache'}" in imported
    assert "not known" in imported
    assert main(["weights", "show", "--backbone", TINY]) == 0
    assert "(not known)" in capsys.readouterr().out
    assert main(["weights", "fetch", "--backbone", TINY]) == 0
    assert f"{tmp_path / 'cache'}" in capsys.readouterr().out


def test_the_environment_comes_first(file, monkeypatch, capsys):
    monkeypatch.setenv("ANOMALYDINO_WEIGHTS", str(file))
    assert main(["weights", "show", "--backbone", TINY]) == 0
    assert str(file) in capsys.readouterr().out
    assert main(["weights", "fetch", "--backbone", TINY]) == 0
    assert f"{file} (environment" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["import"], "weights import: expected a file"),
        (["import", "nothing.pth"], "weights import: no file 'nothing.pth'"),
    ],
)
def test_what_cannot_be_imported(file, words, says, capsys):
    assert main(["weights", *words, "--backbone", TINY]) == 1
    assert says in capsys.readouterr().err


def test_a_file_of_another_backbone(file, capsys):
    assert main(["weights", "import", str(file), "--backbone", "dinov2_vits14"]) == 1
    assert "do not fit backbone 'dinov2_vits14'" in capsys.readouterr().err
