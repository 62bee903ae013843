"""`--report`: one command from images to a page, through a real local Ray, with a tiny untrained backbone."""

import json
import shutil
from pathlib import Path

import pytest
from generated import TINY

from jobs.cli import main

FLAGS = [f"--backbone={TINY}", "--weights=random:0", "--resolution=64", "--masking=off", "--threads=1"]
pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.thorough]


@pytest.fixture(scope="module")
def images(mvtec_tree, tmp_path_factory) -> Path:
    """The generated tree, and an image that cannot be read."""
    root = tmp_path_factory.mktemp("reported") / "parts"
    shutil.copytree(mvtec_tree, root)
    (root / "01" / "test" / "good" / "broken <b>.png").write_text("no image")
    return root


def test_score_with_failures_and_again(images, tmp_path, capsys):
    out, command = tmp_path / "run", ["score", f"--images={images}", f"--out={tmp_path / 'run'}", "--report", *FLAGS]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "12 images done, 1 failed" in printed
    assert printed.index("12 images done") < printed.index("image metrics") < printed.index("report.html")
    page = (out / "report.html").read_text()
    assert "broken &lt;b&gt;.png" in page
    assert set(json.loads((out / "metrics.json").read_text())["categories"]) == {"01", "plate top"}
    assert json.loads((out / "job.json").read_text())["stages"]["score"]["config"]["report"] is True
    assert main(["verify", str(out)]) == 0

    (out / "report.html").unlink()
    (out / "metrics.json").unlink()
    assert main(command) == 0
    assert "resuming: 2 of 2 shards are finished" in capsys.readouterr().out
    assert (out / "report.html").stat().st_size > 10_000
    assert (out / "metrics.json").is_file()


@pytest.mark.slow
def test_a_finished_run_may_be_repeated_with_the_flag(images, tmp_path, capsys):
    command = ["score", f"--images={images}", f"--out={tmp_path / 'run'}", "--category=01", *FLAGS]
    assert main(command) == 0
    assert not (tmp_path / "run" / "report.html").exists()
    assert main([*command, "--report"]) == 0
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_batched_without_labels(images, tmp_path, capsys):
    photos = tmp_path / "photos"
    shutil.copytree(images / "01" / "train" / "good", photos)
    assert main(["batched", f"--images={photos}", f"--out={tmp_path / 'run'}", "--report", *FLAGS]) == 0
    assert "metrics" not in capsys.readouterr().out
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert "4</b> images scored" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_a_report_that_cannot_be_written_is_an_error_after_the_run(images, tmp_path, capsys):
    command = ["score", f"--images={images}", f"--out={tmp_path / 'run'}", "--category=01", *FLAGS]
    assert main(command) == 0
    (tmp_path / "run" / "report.html").mkdir()
    statuses = [main(["report", str(tmp_path / "run")]), main([*command, "--report"])]
    said = [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()]
    assert statuses == [1, 1]
    assert said[0] == said[1]
    assert "report.html" in said[0]


def test_in_a_file_of_stages(images, tmp_path):
    file = tmp_path / "stages.yaml"
    settings = {"images": str(images), "out": str(tmp_path / "run"), "report": True, "category": "01", "backbone": TINY}
    settings |= {"weights": "random:0", "resolution": 64, "masking": "off", "threads": 1}
    file.write_text(json.dumps({"stages": [{"score": settings}]}))
    assert main(["run", str(file)]) == 0
    assert (tmp_path / "run" / "report.html").is_file()
