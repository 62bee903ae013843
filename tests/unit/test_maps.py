"""`anomalydino maps`: files of the right values, size and name."""

import csv

import numpy as np
import pytest
import torch
from generated_run import HOT, PATCH, RESOLUTION, SIZE, Made, make_run
from PIL import Image
from rich.console import Console

from anomalydino_plugin import InputError, anomaly_map, plan_geometry
from jobs import cli, maps, pipeline
from jobs.cli import main
from jobs.config import MapsConfig
from jobs.patch_reader import read_patches
from jobs.store import Store

IMAGES = [Made("01", "a.png", 0.4, "spot"), Made("01", "b.png", 0.2), Made("../up/x y", "c.png", 0.1)]


@pytest.fixture
def out(tmp_path):
    return make_run(tmp_path, IMAGES)


def index(folder) -> dict[str, dict[str, str]]:
    with (folder / "maps.csv").open() as file:
        return {row["uri"].rsplit("/", 1)[1]: row for row in csv.DictReader(file)}


def write(out, kind, **settings):
    maps.run(MapsConfig(str(out), kind, **settings), Console(quiet=True))
    return index(out / "maps")


def expected(score: float) -> np.ndarray:
    plan = plan_geometry(*SIZE, RESOLUTION, PATCH)
    distances = np.full(plan.grid, score / 2, np.float32)
    distances[HOT], distances[0] = score, 0
    return anomaly_map(torch.from_numpy(distances), SIZE, coverage=plan.coverage).numpy()


def test_values_are_those_of_the_model(out):
    rows = write(out, "npy")
    assert len(rows) == 3
    for made in IMAGES:
        values = np.load(out / "maps" / rows[made.name]["file"])
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, expected(made.score))


def test_tiff_holds_the_same_values(out):
    rows = write(out, "tiff")
    picture = Image.open(out / "maps" / rows["a.png"]["file"])
    assert picture.mode == "F"
    np.testing.assert_array_equal(np.array(picture), expected(0.4))


def test_png_has_the_size_of_the_image_and_one_scale_for_a_category(out):
    rows = write(out, "png")
    hot, cold = (np.array(Image.open(out / "maps" / rows[name]["file"])).astype(int) for name in ("a.png", "b.png"))
    assert hot.shape == cold.shape == (*SIZE, 3)
    assert hot.sum(axis=2).max() > cold.sum(axis=2).max() + 100


def test_an_overlay_needs_the_image(out, tmp_path, capsys):
    (tmp_path / "images/01/test/good/b.png").unlink()
    Image.new("RGB", (30, 30)).save(next(tmp_path.glob("images/*up_x y/test/good/c.png")))
    assert main(["maps", str(out), "--format", "overlay"]) == 0
    printed = capsys.readouterr().out
    assert "1 maps, 2 images left out" in printed
    assert "has 30 x 30 pixels now" in printed
    assert set(index(out / "maps")) == {"a.png"}


def test_no_name_leaves_the_folder(out, tmp_path):
    maps.run(MapsConfig(str(out), "npy", to=str(tmp_path / "deep" / "to")), Console(quiet=True))
    names = {path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*.npy")}
    assert names == {("deep", "to")}
    assert {path.name for path in (tmp_path / "deep" / "to").iterdir()} == {"01", "%2E.%2Fup%2Fx%20y", "maps.csv"}


@pytest.mark.parametrize(
    "uri", ["/x/../..", "/x/" + "\U0001f980" * 200 + ".png", "..", "/x/.png", "/x/a b.tar.gz", "s3://b/<script>"]
)
def test_names_are_safe_and_distinct(uri):
    names = {maps.map_name({"uri": uri, "category": "..", "image_id": name}, "png") for name in ("../1", "2")}
    assert len(names) == 2
    for name in names:
        folder, file = name.split("/")
        assert folder == "%2E."
        assert not file.startswith(".")
        assert len(file) < 120
        assert file.isascii()


def test_only_some_categories(out):
    assert set(write(out, "png", category="01")) == {"a.png", "b.png"}
    with pytest.raises(InputError, match="no category 'x'"):
        write(out, "png", category="x")


def test_a_file_is_whole_or_not_there(out, monkeypatch):
    def broken(*arguments):
        raise MemoryError

    monkeypatch.setattr(maps, "_encoded", broken)
    with pytest.raises(MemoryError):
        write(out, "npy")
    assert not [path for path in (out / "maps").rglob("*") if path.is_file()]


def test_patches_are_read_a_row_group_at_a_time(out):
    """Only the images asked for, and none whose grid does not fit its rows."""
    plan = plan_geometry(*SIZE, RESOLUTION, PATCH)
    ids = [row["image_id"] for row in Store(out).read("scores").to_pylist()]
    assert [found.image_id for found in read_patches(Store(out), {ids[0]: plan.grid})] == ids[:1]
    assert list(read_patches(Store(out), {ids[0]: (1, 1)})) == []
    assert list(read_patches(Store(out), {"0": plan.grid, "z": plan.grid})) == []
    found = {each.image_id: each for each in read_patches(Store(out), dict.fromkeys(ids, plan.grid))}
    assert set(found) == set(ids)
    assert all((each.top.row, each.top.col) == HOT for each in found.values())
    assert not found[ids[0]].foreground[0].any()


def test_report_and_maps_as_stages_of_a_file(out, tmp_path):
    stages = (
        "stages:\n  - report: {out: out, file: page.html, max_images: 1}\n  - maps: {out: out, to: heat, format: npy}\n"
    )
    (tmp_path / "stages.yaml").write_text(stages)
    loaded = pipeline.load(str(tmp_path / "stages.yaml"))
    assert [pipeline._run(stage, Console(quiet=True)) for stage in loaded] == [0, 0]
    assert (tmp_path / "page.html").is_file()
    assert len(index(tmp_path / "heat")) == 3


def test_report_and_maps_can_be_submitted(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    job = cli._submitted(["maps", "run", "--to", "heat", "--category", "01"])
    assert job.words[:2] == ("maps", str(tmp_path / "run"))
    assert f"--to={tmp_path / 'heat'}" in job.words
    options = cli._parser().parse_args(list(job.words)).maps
    assert (options.to, options.category, options.format) == (str(tmp_path / "heat"), "01", "png")
