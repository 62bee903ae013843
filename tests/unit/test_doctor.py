"""`anomalydino doctor`: what it says where; the whole command is in tests/integration/test_trust.py."""

import hashlib
import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from anomalydino_plugin.weights import resolve
from jobs import doctor


@pytest.mark.parametrize(("place", "known"), [("environment", True), ("environment", False), ("cache", False)])
def test_weights_that_are_here_are_named_with_their_checksum(tmp_path, monkeypatch, place, known):
    checksum = hashlib.sha256(b"weights").hexdigest()
    file = tmp_path / "some.safetensors" if place == "environment" else resolve.cached_path("dinov2_vits14")
    file.write_bytes(b"weights")
    if place == "environment":
        monkeypatch.setenv("ANOMALYDINO_WEIGHTS", str(file))
    monkeypatch.setattr(resolve, "KNOWN_FILES", {checksum} if known else set())
    said = "known" if known else "not known"
    assert list(doctor.weights("dinov2_vits14")) == [
        ("weights of dinov2_vits14", f"from the {place}, sha256 {checksum} ({said})")
    ]


def test_where_ray_would_run(monkeypatch):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert list(doctor.ray_address("head:6379")) == [("ray address", "head:6379")]
    assert "inside the process" in dict(doctor.ray_address(None))["ray address"]
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert dict(doctor.ray_address(None))["ray address"] == "that of the surrounding job"


def test_what_is_written_comes_back_and_goes_again(tmp_path, monkeypatch):
    assert doctor.write_test("memory://doctor/out") == (0, "ok under 'memory://doctor/out'")
    assert doctor.write_test(str(tmp_path)) == (0, f"ok under {str(tmp_path)!r}")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(doctor.Folder, "read", lambda self, name: b"other")
    assert doctor.write_test(str(tmp_path)) == (1, f"failed: {str(tmp_path)!r} gave other bytes back")


def test_without_an_output_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "write_test", lambda out: pytest.fail("wrote"))
    options = SimpleNamespace(backbone="dinov2_vits14", ray_address=None, out=None)
    console = Console(record=True, file=io.StringIO(), width=300)
    assert doctor.main(options, console) == 0
    assert "write test" not in console.export_text()
