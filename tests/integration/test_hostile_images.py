"""One run over a folder that holds every kind of bad image: each is scored, or fails with its name and a remedy."""

import os
import re
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest
from corpus.entries import BESIDE
from corpus.images import IMAGES, path_of, write_all
from corpus.kinds import FAILED, SCORED
from generated import TINY, save, textured

from anomalydino_plugin import FewShotModel, ImageError
from jobs.cli import main
from jobs.decode import decode, read
from jobs.inputs import discover

FLAGS = ["--backbone", TINY, "--weights", "random:0", "--resolution", "64", "--masking", "off", "--threads", "1"]
LIMIT = 60  # seconds; nothing may hang


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hostile") / "images"
    write_all(root)
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module", params=["score", "extract"])
def finished(request, ray_session, folder, tmp_path_factory) -> tuple[str, Path]:
    references = tmp_path_factory.mktemp("good")
    save(references / "good.png", textured(1))
    out = tmp_path_factory.mktemp("run") / "out"
    extra = ["--references", str(references), "--shots", "1"] if request.param == "score" else []
    words = [request.param, "--images", str(folder), "--out", str(out), "--max-failures", "1.0", *FLAGS, *extra]
    assert main(words) == 0
    return request.param, out


@pytest.fixture
def alarm():
    """Fails a test that hangs in a system call, where a timeout of the test runner would end everything."""

    def late(*_):
        raise TimeoutError(f"not finished within {LIMIT} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def rows(out: Path, kind: str) -> dict[str, dict]:
    """Rows of a kind by the bytes of the file name."""
    table = ds.dataset([str(path) for path in (out / kind).rglob("*.parquet")]).to_table()
    found = [row for row in table.to_pylist() if row.get("status") != "reference"]
    return {name_of(row["uri"]): row for row in found}


def name_of(uri: str) -> str:
    from jobs.filesystem import local_path

    return local_path(uri).name if uri.startswith("file://") else uri.rpartition("/")[2]


def test_there_are_enough_kinds():
    assert len(IMAGES) >= 130
    assert len({kind.name for kind in IMAGES}) == len(IMAGES)
    assert {kind.outcome for kind in IMAGES} == {SCORED, FAILED}


@pytest.mark.thorough
def test_every_file_is_scored_or_a_failure(finished, folder):
    stage, out = finished
    images, failures = rows(out, "images"), rows(out, "failures")
    expected = {os.fsdecode(kind.file_name): kind.outcome for kind in IMAGES}
    done = "scored" if stage == "score" else "extracted"
    found = {name: SCORED if row["status"] == done else row["status"] for name, row in images.items()}
    assert found == {**expected, **dict.fromkeys(BESIDE, SCORED)}
    assert set(failures) == {name for name, outcome in expected.items() if outcome == FAILED}
    if stage == "score":
        scores = rows(out, "scores")
        assert set(scores) == {name for name, outcome in found.items() if outcome == SCORED}
        assert all(0 <= row["score"] <= 2 and row["is_anomalous"] is not None for row in scores.values())


@pytest.mark.thorough
def test_every_failure_names_the_file_and_the_remedy(finished):
    _, out = finished
    failures = rows(out, "failures")
    for kind in (kind for kind in IMAGES if kind.outcome == FAILED):
        row = failures[os.fsdecode(kind.file_name)]
        assert row["error_type"] == "ImageError", row
        assert repr(row["uri"]) in row["message"], row
        assert re.search(kind.says, row["message"]), row
        assert "\n" not in row["message"]
        assert "Traceback" not in row["message"]


@pytest.mark.thorough
def test_the_run_reads_back(finished, capsys):
    _, out = finished
    assert main(["verify", str(out)]) == 0, capsys.readouterr().out


@pytest.mark.thorough
def test_a_scored_file_has_the_score_of_its_pixels(finished, folder, tiny_backbone):
    """Whatever a file is called or how it is encoded, its score is that of the decoded picture."""
    stage, out = finished
    if stage != "score":
        pytest.skip("extract has no scores")
    model = FewShotModel(tiny_backbone, resolution=64, masking="off").fit([textured(1)])
    for name, row in rows(out, "scores").items():
        if not name.startswith("20000"):
            assert row["score"] == pytest.approx(model.score(read(row["uri"])).score, abs=1e-5), name


@pytest.mark.parametrize("kind", IMAGES, ids=[kind.name for kind in IMAGES])
def test_python_api(kind, folder, alarm):
    path = path_of(folder, kind)
    record = next(record for record in discover(str(folder), normal=False).images if name_of(record.uri) == path.name)
    decoded, failures = decode([record], 64, 16)
    if kind.outcome == SCORED:
        assert failures == []
        pixels = read(record.uri)
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3
        if kind.level is not None:
            assert pixels.mean() == pytest.approx(kind.level, abs=0.01)
    else:
        assert decoded == []
        assert re.search(kind.says, failures[0].message)
        assert failures[0].message.count(repr(record.uri)) == 1


@pytest.mark.thorough
def test_a_limit_of_pixels_can_be_set(folder, ray_session, tmp_path):
    save(tmp_path / "in" / "small.png", textured(1))
    save(tmp_path / "in" / "large.png", textured(1, (200, 200)))
    words = ["extract", "--images", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--max-pixels", "30000"]
    assert main([*words, *FLAGS]) == 0
    failure = rows(tmp_path / "out", "failures")["large.png"]
    assert "200 x 200 = 40000 pixels, more than the limit of 30000" in failure["message"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give its rights away")
def test_files_that_may_not_be_read(tmp_path):
    tmp_path.chmod(0o755)
    save(tmp_path / "private.png", textured(1))
    (tmp_path / "private.png").chmod(0)
    for parent in [tmp_path, *tmp_path.parents][:3]:
        parent.chmod(0o755)
    os.seteuid(65_534)
    try:
        with pytest.raises(ImageError, match=r"private\.png': Permission denied\. Check path and permissions"):
            read(str(tmp_path / "private.png"))
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give its rights away")
@pytest.mark.parametrize("given", ["images", "images/closed/below"])
def test_a_folder_that_may_not_be_listed_is_not_left_out(tmp_path, given):
    from anomalydino_plugin import InputError

    save(tmp_path / "images" / "open" / "a.png", textured(1))
    save(tmp_path / "images" / "closed" / "below" / "b.png", textured(2))
    (tmp_path / "images" / "closed").chmod(0)
    for parent in [tmp_path, *tmp_path.parents]:
        if parent.is_relative_to(tempfile.gettempdir()) and parent != Path(tempfile.gettempdir()):
            parent.chmod(0o755)
    os.seteuid(65_534)
    try:
        with pytest.raises(InputError, match=r"Permission denied.*closed.*permissions"):
            discover(str(tmp_path / given), normal=False)
    finally:
        os.seteuid(0)
