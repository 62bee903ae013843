"""`anomalydino masking-test`: a decision and a picture for each category."""

import io

import numpy as np
import pytest
from generated import TINY, save, textured
from PIL import Image
from rich.console import Console

from anomalydino_plugin import ImageError, InputError
from jobs.config import MaskingTestConfig
from jobs.masking_sheet import run

SETTINGS = {"backbone": TINY, "weights": "random:0", "resolution": 64}


def call(images, out, **settings) -> tuple[dict, str]:
    shown = io.StringIO()
    config = MaskingTestConfig(images=str(images), out=str(out), **SETTINGS, **settings)
    return run(config, Console(file=shown, width=200)), shown.getvalue()


@pytest.fixture
def tree(tmp_path):
    for number, category in enumerate(["nut", "top plate"]):
        for index in range(2):
            save(tmp_path / "tree" / category / "train" / "good" / f"{index}.png", textured(10 * number + index))
        save(tmp_path / "tree" / category / "test" / "good" / "0.png", textured(99))
    return tmp_path / "tree"


def test_each_category_has_a_decision_and_a_picture(tree, tmp_path):
    decisions, shown = call(tree, tmp_path / "sheets")
    assert sorted(decisions) == ["nut", "top plate"]
    for category, name in (("nut", "nut.png"), ("top plate", "top%20plate.png")):
        with Image.open(tmp_path / "sheets" / name) as sheet:
            assert np.asarray(sheet).std() > 0
            assert sheet.width > sheet.height
        line = next(line for line in shown.splitlines() if line.startswith(f"{category}: "))
        assert f"confidence {decisions[category].confidence:.2f}" in line
        assert line.endswith(name)
        assert ("confirm by eye" in line) == decisions[category].confirm_by_eye
    assert all(0 <= decision.foreground_share <= 1 for decision in decisions.values())


def test_one_image_or_a_folder_of_references(tree, tmp_path):
    file = tree / "nut" / "train" / "good" / "0.png"
    alone, _ = call(file, tmp_path / "one")
    named, _ = call(
        tree / "nut" / "test" / "good", tmp_path / "folder", references=str(tree / "nut" / "train" / "good")
    )
    assert list(alone) == ["0"]
    assert list(alone.values()) == list(named.values())  # the first reference image is that file


def test_nothing_to_look_at(tmp_path):
    save(tmp_path / "flat" / "0.png", textured(1))
    with pytest.raises(
        InputError, match="category 'flat' has no normal images: expected files in its train/good folder"
    ):
        call(tmp_path / "flat", tmp_path / "out")
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(ImageError, match=r"bad\.png"):
        call(tmp_path / "bad.png", tmp_path / "out")
    assert not (tmp_path / "out").exists()
