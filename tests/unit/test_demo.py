import hashlib

import numpy as np
import pytest

from anomalydino_plugin import ConfigError, read_image
from jobs.demo import _make_room
from jobs.demo_data import CATEGORIES, make_demo_images
from jobs.evaluate import image_metrics
from jobs.inputs import discover
from jobs.pictures import heat_colors, masking_test_sheet, overlay, panel, write_png


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    make_demo_images(folder)
    return folder


def test_the_tree_is_complete(images):
    inputs = discover(str(images))
    assert inputs.categories == CATEGORIES
    assert len(inputs.images) == 48
    assert "CC0" in (images / "LICENSE.txt").read_text()


def test_the_same_seed_gives_the_same_bytes(images, tmp_path):
    make_demo_images(tmp_path)
    for path in images.rglob("*.png"):
        other = tmp_path / path.relative_to(images)
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(other.read_bytes()).digest()


def test_defects_change_their_tile_inside_the_mask_and_nowhere_else(images):
    for record in discover(str(images)).images:
        if record.label == "good":
            continue
        damaged, mask = read_image(record.uri).astype(int), read_image(record.mask_uri)[..., 0] > 0
        goods = [read_image(path).astype(int) for path in (images / record.category / "test" / "good").iterdir()]
        changed = min((np.abs(damaged - good).max(axis=2) > 0 for good in goods), key=np.count_nonzero)
        assert 0.002 < mask.mean() < 0.5
        assert not (changed & ~mask).any(), record.uri
        assert changed[mask].mean() > 0.5, record.uri


def test_heat_is_monotone_in_brightness():
    colours = heat_colors(np.linspace(0, 1, 64, dtype=np.float32)[None], 0, 1)[0].astype(float)
    luminance = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > -1).all()
    assert luminance[-1] > luminance[0] + 150


def test_overlay_draws_the_ground_truth_and_leaves_cold_pixels():
    image = np.full((60, 80, 3), 100, np.uint8)
    truth = np.zeros((60, 80), bool)
    truth[20:40, 20:40] = True
    drawn = overlay(image, np.zeros((60, 80), np.float32), 0.5, 1.0, truth=truth)
    assert tuple(drawn[20, 30]) == (0, 255, 80)
    assert (drawn[50:, 60:] == 100).all()


@pytest.mark.parametrize("title", ["short", "x" * 500, "größe 测试 \u202e\n<script>"])
@pytest.mark.parametrize("edge", [16, 900])
def test_panels_of_any_size_and_title(title, edge):
    image = np.zeros((edge, edge, 3), np.uint8)
    drawn = panel([image, image], ["a", "b"], title)
    assert drawn.shape[0] < 520
    assert drawn.min() < 100  # ink


def test_masking_sheet():
    image = np.full((64, 64, 3), 200, np.uint8)
    mask = np.zeros((4, 4), bool)
    mask[1:3, 1:3] = True
    sheet = masking_test_sheet(image, np.ones((4, 4), np.float32), mask, ["evidence"] * 3, "test")
    assert sheet.ndim == 3
    assert ((sheet == 50).all(axis=2)).sum() > 1000  # the dimmed background


def test_png_is_written_whole(tmp_path):
    write_png(tmp_path / "a" / "b.png", np.zeros((4, 4, 3), np.uint8))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.png"]


def test_only_an_earlier_demo_is_replaced(tmp_path):
    _make_room(tmp_path / "demo")
    (tmp_path / "demo" / "old").touch()
    _make_room(tmp_path / "demo")
    assert not (tmp_path / "demo" / "old").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").touch()
    with pytest.raises(ConfigError, match="no earlier demo"):
        _make_room(tmp_path / "mine")


def test_metrics_where_labels_are_missing():
    scores = np.array([0.1, 0.2, 0.3, 0.9])
    full = image_metrics("c", scores, ["good", "good", "crack", "crack"], 0.25)
    assert (full.auroc, full.average_precision, full.f1_max, full.f1_threshold) == (1.0, 1.0, 1.0, pytest.approx(0.3))
    assert (full.false_alarms, full.misses) == (0.0, 0.0)
    part = image_metrics("c", scores, ["good", None, "good", None], 0.25)
    assert (part.labelled, part.auroc, part.false_alarms, part.misses) == (2, None, 0.5, None)
