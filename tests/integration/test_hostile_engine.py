"""Bad images through anomalib's Engine: its reader is not ours, so errors must name the file, other pixels be announced."""

import logging
import os
from pathlib import Path

import pytest
from corpus.images import IMAGES, path_of
from faults.engine_inputs import EQUAL, LOGGED, NAMED, OTHER, Tried
from generated import save, textured

from anomalydino_plugin.host_images import first_unreadable, name_unreadable, read_otherwise, warn_of_other_pixels

# One of each way to end; tests/faults/engine_inputs.py tries all of them.
EXPECTED = {
    "jpeg called png": EQUAL,
    "cmyk.jpg": EQUAL,
    "rgba": EQUAL,
    "sixteen bit": OTHER,
    "all transparent": OTHER,
    "exif orientation 6": OTHER,
    "exif orientation 9": EQUAL,
    "float with nan": OTHER,
    "text": NAMED,
    "one pixel": NAMED,
    "named pipe": NAMED,
    "dangling link": NAMED,
    "cut in half, jpg": LOGGED,
    "bomb, png header": LOGGED,
}


@pytest.fixture(scope="module")
def tried(tmp_path_factory) -> Tried:
    return Tried(tmp_path_factory.mktemp("engine"))


@pytest.mark.parametrize("kind", [kind for kind in IMAGES if kind.name in EXPECTED], ids=lambda kind: kind.name)
def test_engine_predict(kind, tried, tmp_path):
    path = path_of(tmp_path, kind)
    kind.make(path)
    found = tried.outcome(kind.name, path)
    assert found.outcome == EXPECTED[kind.name], found


def test_expected_kinds_exist():
    assert set(EXPECTED) <= {kind.name for kind in IMAGES}


def test_what_is_read_otherwise_is_seen_from_the_header(tmp_path):
    expected = {"sixteen bit": "cut off at 255", "exif orientation 6": "EXIF", "all transparent": "transparency"}
    for kind in IMAGES:
        if kind.name in expected:
            kind.make(path_of(tmp_path, kind))
            assert expected[kind.name] in read_otherwise(os.fspath(path_of(tmp_path, kind)))
    save(tmp_path / "plain.png", textured(1))
    assert read_otherwise(str(tmp_path / "plain.png")) is None
    assert read_otherwise(str(tmp_path / "none.png")) is None


def test_one_warning_for_all(tmp_path, caplog):
    (kind,) = (kind for kind in IMAGES if kind.name == "sixteen bit")
    for name in ("a.png", "b.png"):
        kind.make(tmp_path / name)
    save(tmp_path / "c.png", textured(1))
    with caplog.at_level(logging.WARNING):
        warn_of_other_pixels(str(path) for path in sorted(tmp_path.iterdir()))
    (record,) = caplog.records
    assert "2 image(s)" in record.getMessage()
    assert "a.png" in record.getMessage()


def test_the_unreadable_file_is_found(tmp_path, caplog):
    save(tmp_path / "a.png", textured(1))
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    paths = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert first_unreadable(paths)[0] == paths[1]
    assert first_unreadable(paths[:1]) is None
    name_unreadable(paths, OSError("truncated"))
    assert paths[1] in caplog.text
    caplog.clear()
    name_unreadable(paths, OSError(f"truncated: {paths[1]}"))  # it was named
    name_unreadable(paths, KeyboardInterrupt())
    assert not caplog.text


def test_nothing_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert read_otherwise(str(tmp_path / "pipe.png")) is None
    assert first_unreadable([str(tmp_path / "pipe.png")])[0].endswith("pipe.png")
    assert Path(tmp_path / "pipe.png").is_fifo()
