"""What a run is given is data: it says neither where output goes, nor what is executed, nor what is printed."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from generated import TINY, save, textured
from safetensors.torch import save_file

from anomalydino_plugin import WeightsError
from anomalydino_plugin.weights.reading import read_tensors
from jobs.cli import main
from jobs.messages import clean
from jobs.store import folder_name

QUICK = ["--backbone", TINY, "--resolution", "64", "--masking", "off", "--threads", "1"]
CATEGORIES = [
    "..",
    "../../up",
    "/etc/absolute",
    "C:\\drive",
    "\\\\server\\share",
    ".hidden",
    "a/b",
    "nul\x07bell",
    "=1+1",
]
ESCAPE = "\x1b[31mred.png"


@pytest.fixture(scope="module")
def finished(ray_session, tmp_path_factory) -> tuple[Path, Path]:
    """A run over categories whose names would lead elsewhere; returns its parent folder and OUT."""
    root = tmp_path_factory.mktemp("trust")
    save(root / "in" / ESCAPE, textured(1))
    lines = [f'"{ESCAPE}","{category}"' for category in CATEGORIES]
    (root / "in" / "list.csv").write_text("uri,category\n" + "\n".join(lines) + "\n")
    words = ["extract", "--images", str(root / "in" / "list.csv"), "--out", str(root / "here" / "out"), *QUICK]
    assert main([*words, "--weights", "random:0", "--shard-size", "1"]) == 0
    return root, root / "here" / "out"


@pytest.mark.thorough
def test_output_stays_in_its_folder(finished):
    root, out = finished
    outside = [path for path in root.rglob("*") if path.is_file() and out not in path.parents]
    assert {path.parent for path in outside} == {root / "in"}
    folders = {path.name for path in (out / "images").iterdir()}
    assert folders == {folder_name(category) for category in CATEGORIES}
    assert all(path.resolve().is_relative_to(out.resolve()) for path in out.rglob("*"))


@pytest.mark.parametrize("name", [*CATEGORIES, ".", "con", "a" * 50, "é/..", "%2e%2e"])
def test_a_category_is_one_folder_name(name):
    folder = folder_name(name)
    assert not {"/", "\\", ":"} & set(folder)
    assert folder not in {"", ".", ".."}
    assert not folder.startswith(".")


@pytest.mark.thorough
def test_nothing_else_is_left_behind(finished):
    _, out = finished
    files = [path for path in out.rglob("*") if path.is_file()]
    assert not [path for path in files if path.name.endswith(".tmp") or "/parts/" in path.as_posix()]


SECRETS = ["s3://AKIAKEY:hunter2@bucket/x", "https://x.test/a.png?X-Amz-Signature=hunter2&b=1", "gs://hunter2@b/x"]


@pytest.mark.parametrize("uri", SECRETS)
@pytest.mark.parametrize("flag", ["images", "out", "references", "weights", "calibration", "config", "ray-address"])
@pytest.mark.parametrize("form", ["text", "json"])
def test_secrets_are_neither_printed_nor_stored(uri, flag, form, tmp_path, capsys, monkeypatch):
    save(tmp_path / "in" / "a.png", textured(1))
    monkeypatch.chdir(tmp_path)
    given = {
        "images": str(tmp_path / "in"),
        "out": str(tmp_path / "out"),
        "references": str(tmp_path / "in"),
        flag: uri,
    }
    words = ["score", *QUICK, "--log-format", form, *(f"--{name}={value}" for name, value in given.items())]
    try:
        status = main(words)
    except SystemExit as end:
        status = int(end.code or 0)
    told = capsys.readouterr()
    assert status in {1, 2}
    assert "hunter2" not in told.out + told.err
    stored = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".png"]
    assert not [path for path in stored if b"hunter2" in path.read_bytes()]


def test_messages_show_control_characters_and_hide_credentials():
    assert clean("a\x1b[31mb\udcff\x07") == "a\\x1b[31mb\\udcff\\x07"
    assert clean("see s3://key:secret@bucket/x?token=abc&y=1") == "see s3://***@bucket/x?token=***&y=1"
    assert clean("Prüfung 日本 a@b.test") == "Prüfung 日本 a@b.test"


@pytest.mark.thorough
def test_json_lines(finished, capsys, tmp_path):
    _, out = finished
    assert main(["verify", str(out), "--log-format", "json"]) == 0
    assert main(["evaluate", str(tmp_path), "--log-format=json"]) == 1
    told = capsys.readouterr()
    lines = [json.loads(line) for line in (told.out + told.err).splitlines()]
    assert {line["level"] for line in lines} == {"info", "error"}
    assert all(line["time"].endswith("Z") and line["message"] for line in lines)
    assert lines[-1]["command"] == "evaluate"


@pytest.mark.thorough
def test_a_quiet_run_prints_warnings_alone(ray_session, tmp_path, capsys):
    save(tmp_path / "in" / "a.png", textured(1))
    words = ["extract", "--images", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *QUICK]
    assert main(["--log-level", "warning", *words, "--weights", "random:0"]) == 0
    assert capsys.readouterr().out == "warning: untrained weights (random:0): scores mean nothing\n"


@pytest.mark.thorough
def test_unknown_weights_are_pointed_out(ray_session, tiny_backbone, tmp_path, capsys):
    save(tmp_path / "in" / "a.png", textured(1))
    save_file(dict(tiny_backbone.vit.state_dict()), tmp_path / "own.safetensors")
    words = ["extract", "--images", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *QUICK]
    assert main([*words, "--weights", str(tmp_path / "own.safetensors")]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("warning: weights 'own.safetensors' (explicit): sha256 ")
    assert "is not one we know" in first


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("PWNED"),))


@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.safetensors", "x.pkl"])
@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_no_weights_file_is_executed(name, writer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if writer == "pickle":
        (tmp_path / name).write_bytes(pickle.dumps({"model": Payload()}))
    else:
        torch.save({"model": Payload()}, tmp_path / name)
    with pytest.raises(WeightsError):
        read_tensors(tmp_path / name)
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.thorough
def test_a_bank_of_another_model_is_refused(ray_session, tmp_path, capsys):
    save(tmp_path / "in" / "a.png", textured(1))
    common = ["--images", str(tmp_path / "in"), "--masking", "off", "--threads", "1", "--backbone", TINY]
    fit = ["fit", *common, "--references", str(tmp_path / "in"), "--out", str(tmp_path / "banks"), "--resolution", "64"]
    assert main([*fit, "--weights", "random:0"]) == 0
    score = ["score", *common, "--banks", str(tmp_path / "banks"), "--out", str(tmp_path / "out")]
    for change, says in (
        (["--weights", "random:1", "--resolution", "64"], "weights: bank 'random:0', model 'random:1'"),
        (["--weights", "random:0", "--resolution", "80"], "resolution: bank '64', model '80'"),
    ):
        capsys.readouterr()
        assert main([*score, *change]) == 1
        assert says in capsys.readouterr().err
    extract = ["extract", *common, "--out", str(tmp_path / "embeddings"), "--weights", "random:1", "--resolution", "64"]
    assert main(extract) == 0
    capsys.readouterr()
    apart = ["--embeddings", str(tmp_path / "embeddings"), "--banks", str(tmp_path / "banks"), "--masking", "off"]
    assert main(["score", *apart, "--out", str(tmp_path / "out")]) == 1
    assert "weights: bank 'random:0', model 'random:1'" in capsys.readouterr().err


def test_doctor(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "hunter2")
    monkeypatch.setenv("ANOMALYDINO_WEIGHTS", str(tmp_path / "none"))
    assert main(["doctor", "--out", str(tmp_path / "new")]) == 0
    told = capsys.readouterr().out
    for part in (
        "python: ",
        "torch: ",
        "openvino",
        "engine: ",
        "kernel: ",
        "ray address: none",
        "write test: ok",
    ):
        assert part in told
    assert "hunter2" not in told
    assert "AWS_ACCESS_KEY_ID: set" in told
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    assert main(["doctor", "--out", str(tmp_path / "file" / "below")]) == 1
    assert "write test: failed" in capsys.readouterr().out
