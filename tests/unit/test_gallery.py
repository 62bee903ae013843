"""Pictures of a finished run: which images, what they are called, and what is left out."""

import numpy as np
import pytest
from generated_run import THRESHOLD, Made, make_run
from PIL import Image

from anomalydino_plugin import ConfigError
from jobs.gallery import heat_scale, write_gallery

IMAGES = [Made("nut", f"{name}.png", score) for name, score in [("a", 0.1), ("b", 0.2), ("c", 0.15)]]
DEFECT = Made("nut", "scratch.png", 0.9, "scratch")


@pytest.fixture
def out(tmp_path):
    return make_run(tmp_path, [*IMAGES, DEFECT, Made("a/b", "x.png", 0.4, None)])


def test_the_ends_of_each_category_are_drawn(out):
    written = write_gallery(str(out), per_category=3)
    assert [path.relative_to(out / "pictures").as_posix() for path in written] == [
        "a%2Fb/0001_unknown_x.png",
        "nut/0001_scratch_scratch.png",
        "nut/0002_good_b.png",
        "nut/0004_good_a.png",
    ]
    with Image.open(written[0]) as alone, Image.open(written[1]) as defect, Image.open(written[3]) as good:
        assert alone.size == defect.size == good.size
        assert np.asarray(defect).std() > 0
        assert not np.array_equal(np.asarray(defect), np.asarray(good))


def test_an_image_that_went_away_is_left_out(out):
    (out.parent / "images" / "nut" / "test" / "scratch" / "scratch.png").unlink()
    names = [path.name for path in write_gallery(str(out), per_category=8)]
    assert "0001_scratch_scratch.png" not in names
    assert len(names) == 4


def test_a_ground_truth_of_another_size_is_resized(out):
    mask = out.parent / "images" / "nut" / "test" / "scratch" / "scratch.png.mask.png"
    before = write_gallery(str(out), per_category=1)[1].read_bytes()
    with Image.open(mask) as image:
        doubled = image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)
    doubled.save(mask)
    assert write_gallery(str(out), per_category=1)[1].read_bytes() == before


def test_a_run_elsewhere_is_refused():
    with pytest.raises(ConfigError, match=r"pictures of 'memory://run': expected a local folder"):
        write_gallery("memory://run", per_category=2)


@pytest.mark.parametrize(
    ("threshold", "scores", "expected"),
    [
        (THRESHOLD, [0.1, 0.2], (0.15, 0.45)),  # normal images alone stay cold
        (THRESHOLD, [0.1, 0.9], (0.15, 0.9)),
        (None, [0.1, 0.8], (0.4, 0.8)),
    ],
)
def test_the_scale_of_heat(threshold, scores, expected):
    rows = [{"threshold": threshold, "score": score} for score in scores]
    assert heat_scale(rows) == pytest.approx(expected)
