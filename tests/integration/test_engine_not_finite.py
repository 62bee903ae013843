"""Features that are not finite, in anomalib's Engine: the run stops, and says at which image."""

from functools import partial
from pathlib import Path

import in_anomalib
import numpy as np
import pytest
from anomalib.data import PredictDataset
from generated import TINY
from in_anomalib import engine

from anomalydino_plugin import AnomalyDINOBatched, AnomalyDINOFewShot, BankError, ImageError, read_image

SETTINGS = {"backbone": TINY, "weights": "random:0", "resolution": 64, "masking": "off", "visualizer": False}
folder = partial(in_anomalib.folder, mask_dir=None, val_split_mode="none", train_batch_size=2, eval_batch_size=3)


def spoil(monkeypatch, model, path: Path) -> None:
    """The encoder gives one NaN for the image at this path."""
    encode, wrong = model.model.encode, model.model.prepare(read_image(path))

    def spoilt(pixels):
        features = encode(pixels).clone()
        for place, image in enumerate(pixels):
            if np.array_equal(image, wrong):
                features[place, 3, 5] = np.nan
        return features

    monkeypatch.setattr(model.model, "encode", spoilt)


@pytest.fixture
def tree(mvtec_tree) -> Path:
    return mvtec_tree / "01"


@pytest.fixture
def bad(tree) -> Path:
    """The second of its batch."""
    return tree / "test" / "spot" / "001.png"


@pytest.fixture
def fitted(tree, tmp_path) -> AnomalyDINOFewShot:
    model = AnomalyDINOFewShot(**SETTINGS)
    engine(tmp_path).fit(model, datamodule=folder(tree))
    return model


def test_few_shot_prediction_one_by_one(fitted, bad, tmp_path, monkeypatch):
    spoil(monkeypatch, fitted, bad)
    with pytest.raises(ImageError, match="not finite") as raised:
        engine(tmp_path).predict(fitted, dataset=PredictDataset(bad.parent))
    assert repr(str(bad)) in str(raised.value)
    assert "000.png" not in str(raised.value)


@pytest.mark.parametrize("run", ["test", "predict"])
def test_few_shot_batch_is_named_with_the_place_of_the_image(fitted, tree, bad, tmp_path, monkeypatch, run):
    spoil(monkeypatch, fitted, bad)
    with pytest.raises(ImageError, match=r"image 1 of the batch: .*not finite") as raised:
        getattr(engine(tmp_path), run)(fitted, datamodule=folder(tree))
    listed = str(raised.value).split(": image 1 of")[0].removeprefix("cannot score ").split(", ")
    assert listed[1] == repr(str(bad))
    assert len(listed) == 3


@pytest.mark.parametrize("rotations", ["agnostic", "informed"])
def test_few_shot_reference(tree, tmp_path, monkeypatch, rotations):
    model, reference = AnomalyDINOFewShot(**SETTINGS, shots=2, rotations=rotations), tree / "train" / "good" / "001.png"
    spoil(monkeypatch, model, reference)
    with pytest.raises(BankError, match=r"001\.png.*not finite") as raised:
        engine(tmp_path).fit(model, datamodule=folder(tree))
    assert repr(str(reference)) in str(raised.value)


@pytest.mark.parametrize("mode", ["official", "musc"])
@pytest.mark.parametrize("run", ["test", "predict"])
def test_batched(tree, bad, tmp_path, monkeypatch, mode, run):
    model = AnomalyDINOBatched(**SETTINGS, mode=mode)
    spoil(monkeypatch, model, bad)
    with pytest.raises(ImageError, match="not finite") as raised:
        getattr(engine(tmp_path), run)(model, datamodule=folder(tree))
    assert repr(str(bad)) in str(raised.value)
    assert "000.png" not in str(raised.value)
