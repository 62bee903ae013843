"""Manifests, flags and YAML files that are wrong: one line that names what is wrong, and nothing is written."""

import re
from pathlib import Path

import pytest
from corpus.configurations import CONFIGURATIONS
from corpus.manifests import MANIFESTS, write
from generated import TINY, save, textured

from jobs.cli import main
from jobs.decode import decode
from jobs.inputs import discover

QUICK = ["--backbone", TINY, "--weights", "random:0", "--resolution", "64", "--masking", "off", "--threads", "1"]
BAD_MANIFESTS = [kind for kind in MANIFESTS if kind.says]
GOOD_MANIFESTS = [kind for kind in MANIFESTS if not kind.says]


@pytest.fixture
def images(tmp_path, monkeypatch) -> Path:
    for number in range(3):
        save(tmp_path / "in" / f"{number}.png", textured(number))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "in"


def status_of(words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as end:
        return int(end.code or 0)


@pytest.mark.parametrize("kind", BAD_MANIFESTS, ids=[kind.name for kind in BAD_MANIFESTS])
def test_bad_manifests(kind, images, tmp_path, capsys):
    manifest = write(tmp_path / "given", kind)
    words = ["score", "--images", str(manifest), "--references", str(images), "--out", str(tmp_path / "out"), *QUICK]
    assert status_of(words) == 1
    told = capsys.readouterr()
    assert re.search(kind.says, told.err, re.DOTALL), told.err
    assert kind.file in told.err
    assert "Traceback" not in told.err
    assert "hunter2" not in told.err + told.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", GOOD_MANIFESTS, ids=[kind.name for kind in GOOD_MANIFESTS])
def test_odd_manifests_that_mean_something(kind, images, tmp_path):
    inputs = discover(str(write(tmp_path / "given", kind)), references=str(images))
    assert inputs.categories == tuple(sorted(kind.categories))
    decoded, failures = decode(inputs.images, 64, 16)
    assert (len(decoded), len(failures)) == (2 - kind.failed, kind.failed)
    assert all("expected" in failure.message.lower() or "check" in failure.message.lower() for failure in failures)


@pytest.mark.parametrize("kind", CONFIGURATIONS, ids=[kind.name for kind in CONFIGURATIONS])
def test_bad_configurations(kind, images, tmp_path, capsys, ray_session):
    words = ["score", "--images", str(images), "--references", str(images), "--out", str(tmp_path / "out"), *QUICK]
    if kind.yaml is not None:
        file = tmp_path / "settings.yaml"
        file.write_bytes(kind.yaml if isinstance(kind.yaml, bytes) else kind.yaml.encode())
        names = {line.partition(":")[0] for line in str(kind.yaml).splitlines()}
        kept = [word for word in zip(words[1::2], words[2::2], strict=True) if word[0][2:] not in names]
        words = ["score", f"--config={file}", *(part for pair in kept for part in pair)]
    assert status_of([*words, *kind.flags]) == kind.status
    told = capsys.readouterr()
    assert re.search(kind.says, told.err, re.DOTALL), told.err
    assert told.err.count("\n") == 1, told.err
    assert not kind.hidden or kind.hidden not in told.err + told.out
    assert not list(tmp_path.rglob("PWNED"))
    assert not list((tmp_path / "out" / "scores").rglob("*.parquet"))
    assert sorted(path.name for path in images.iterdir()) == ["0.png", "1.png", "2.png"]
