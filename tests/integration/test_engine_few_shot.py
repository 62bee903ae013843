"""`AnomalyDINOFewShot` through anomalib's Engine and CLI, with a tiny untrained backbone on generated images."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import in_anomalib
import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.models import get_model
from generated import TINY, save, textured
from in_anomalib import engine

from anomalydino_plugin import AnomalyDINOFewShot, ConfigError, ImageError, InputError, register

SETTINGS = {"backbone": TINY, "weights": "random:0", "resolution": 64, "masking": "off"}
folder = partial(in_anomalib.folder, train_batch_size=2, eval_batch_size=3)


@pytest.fixture
def tree(mvtec_tree):
    return mvtec_tree / "01"


@pytest.fixture
def fitted(tree, tmp_path):
    model, host = AnomalyDINOFewShot(**SETTINGS, shots=2), engine(tmp_path)
    host.fit(model, datamodule=folder(tree))
    return model, host


def names(model) -> list[str]:
    return [Path(image_id).name for image_id in model.model.bank.image_ids]


def test_fit_takes_the_chosen_references_only(fitted):
    model, host = fitted
    assert names(model) == ["000.png", "001.png"]
    assert len(model.model.memory.rows) == 2 * 8 * 16
    assert len(host.trainer.datamodule.train_data) == 4  # the user's datamodule is as it was


def test_seed_and_all_shots(tree, tmp_path):
    second = AnomalyDINOFewShot(**SETTINGS, shots=1, seed=3)
    engine(tmp_path).fit(second, datamodule=folder(tree))
    assert names(second) == ["003.png"]
    full = AnomalyDINOFewShot(**SETTINGS, shots=None)
    engine(tmp_path).fit(full, datamodule=folder(tree))
    assert names(full) == ["000.png", "001.png", "002.png", "003.png"]


def test_no_other_training_image_is_opened(tree, tmp_path):
    import shutil

    shutil.copytree(tree, tmp_path / "part")
    (tmp_path / "part" / "train" / "good" / "003.png").write_text("would fail to decode")
    model = AnomalyDINOFewShot(**SETTINGS, shots=2)
    engine(tmp_path).fit(model, datamodule=folder(tmp_path / "part"))
    assert names(model) == ["000.png", "001.png"]
    (tmp_path / "part" / "train" / "good" / "000.png").write_text("no image")
    with pytest.raises(ImageError, match=r"000\.png"):
        engine(tmp_path).fit(AnomalyDINOFewShot(**SETTINGS), datamodule=folder(tmp_path / "part"))


def test_scores_equal_the_torch_model(fitted, tree, tmp_path):
    model, _ = fitted
    model.post_processor = None
    # a new engine: the trainer of the first keeps the post-processor among its callbacks
    batches = engine(tmp_path).predict(model, dataset=PredictDataset(tree / "test" / "spot"))
    for batch in batches:
        for path, score in zip(batch.image_path, batch.pred_score, strict=True):
            assert float(score) == pytest.approx(model.model.score(path).score, abs=1e-5)


def test_test_reports_anomalibs_metrics(fitted, tree):
    model, host = fitted
    (metrics,) = host.test(model, datamodule=folder(tree))
    assert metrics.keys() == {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"}


def test_thresholds_come_from_normal_images_and_labels_follow(fitted, tree):
    model, host = fitted
    from anomalydino_plugin import calibrate

    calibration = calibrate(model.model)
    assert float(model.post_processor.image_threshold) == pytest.approx(calibration.image_threshold)
    for batch in host.predict(model, datamodule=folder(tree)):
        assert ((batch.pred_score > 0.5) == batch.pred_label).all()
        assert (batch.pred_score > 0).all()
        assert (batch.pred_score < 1).all()


def test_validation_labels_change_nothing(fitted, tree):
    model, host = fitted
    before = float(model.post_processor.image_threshold)
    host.validate(model, datamodule=folder(tree))
    assert float(model.post_processor.image_threshold) == before


def test_calibration_shots(tree, tmp_path):
    model = AnomalyDINOFewShot(**SETTINGS, shots=1, calibration_shots=3)
    engine(tmp_path).fit(model, datamodule=folder(tree))
    from anomalydino_plugin import calibrate

    held_out = [tree / "train" / "good" / f"00{number}.png" for number in (1, 2, 3)]
    expected = calibrate(model.model, held_out).image_threshold
    assert float(model.post_processor.image_threshold) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(InputError, match="need 5 training images, found 4"):
        engine(tmp_path).fit(AnomalyDINOFewShot(**SETTINGS, shots=1, calibration_shots=4), datamodule=folder(tree))


def test_ranking_is_the_same_before_and_after_post_processing(fitted, tree, tmp_path):
    model, host = fitted
    after = torch.cat([batch.pred_score for batch in host.predict(model, datamodule=folder(tree))])
    model.post_processor = None
    raw = torch.cat([batch.pred_score for batch in engine(tmp_path).predict(model, datamodule=folder(tree))])
    assert not torch.equal(raw, after)
    assert torch.equal(raw.argsort(), after.argsort())


@pytest.mark.thorough
def test_checkpoint_in_a_new_process(fitted, tree):
    model, host = fitted
    path = tree / "test" / "spot" / "000.png"
    program = (
        "import sys\nfrom anomalydino_plugin import AnomalyDINOFewShot\n"
        "model = AnomalyDINOFewShot.load_from_checkpoint(sys.argv[1])\n"
        "print(model.model.score(sys.argv[2]).score, float(model.post_processor.image_threshold), model.model.bank.source(9))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, host.trainer.checkpoint_callback.best_model_path, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    score, threshold, source = done.stdout.strip().splitlines()[-1].split(" ", 2)
    assert float(score) == pytest.approx(model.model.score(path).score, abs=1e-6)
    assert float(threshold) == float(model.post_processor.image_threshold)
    assert source == str(model.model.bank.source(9))


def test_engine_tests_from_a_checkpoint(fitted, tree, tmp_path):
    model, host = fitted
    fresh = AnomalyDINOFewShot(**SETTINGS, shots=2)
    (expected,) = host.test(model, datamodule=folder(tree))
    (found,) = engine(tmp_path).test(
        fresh, datamodule=folder(tree), ckpt_path=host.trainer.checkpoint_callback.best_model_path
    )
    assert found == pytest.approx(expected)


def test_unfitted_model(tree, tmp_path):
    from anomalydino_plugin import BankError

    with pytest.raises(BankError, match="fit the model"):
        engine(tmp_path).test(AnomalyDINOFewShot(**SETTINGS), datamodule=folder(tree))


def test_without_validation_data(tree, tmp_path):
    model = AnomalyDINOFewShot(**SETTINGS)
    engine(tmp_path).fit(model, datamodule=folder(tree, val_split_mode="none"))
    assert names(model) == ["000.png"]


@pytest.fixture
def mixed(tree, tmp_path):
    import shutil

    shutil.copytree(tree, tmp_path / "mixed")
    save(tmp_path / "mixed" / "test" / "good" / "900.png", textured(9, (96, 160)))
    save(tmp_path / "mixed" / "train" / "good" / "001.png", textured(8, (128, 96)))
    return tmp_path / "mixed"


def test_mixed_sizes_are_refused_before_the_first_batch(mixed, tmp_path):
    model, host = AnomalyDINOFewShot(**SETTINGS, shots=2), engine(tmp_path)
    host.fit(model, datamodule=folder(mixed, val_split_mode="none"))  # references are read one by one
    assert model.model.bank.sizes == ((96, 96), (128, 96))
    with pytest.raises(ConfigError, match=r"96 x 96 .*900\.png' is 160 x 96 .*eval_batch_size=1"):
        host.test(model, datamodule=folder(mixed, val_split_mode="none"))


def test_mixed_sizes_work_one_by_one(mixed, tmp_path):
    model, host = AnomalyDINOFewShot(**SETTINGS), engine(tmp_path)
    datamodule = folder(mixed, val_split_mode="none", eval_batch_size=1)
    host.fit(model, datamodule=datamodule)
    shapes = {tuple(batch.anomaly_map.shape[-2:]) for batch in host.predict(model, datamodule=datamodule)}
    assert shapes == {(96, 96), (96, 160)}


def test_get_model():
    by_name = get_model("anomaly_dino_few_shot", **SETTINGS)
    assert type(by_name) is AnomalyDINOFewShot
    register()
    by_path = get_model({"class_path": "anomalydino_plugin.AnomalyDINOFewShot", "init_args": SETTINGS})
    assert type(by_path) is AnomalyDINOFewShot


def test_wrong_settings():
    with pytest.raises(ConfigError, match="shots=0"):
        AnomalyDINOFewShot(**SETTINGS, shots=0)
    with pytest.raises(ConfigError, match="set resolution instead"):
        AnomalyDINOFewShot.configure_pre_processor((256, 256))


@pytest.mark.timeout(240)
def test_anomalibs_command_line(tree, tmp_path):
    flags = {
        "model": "anomalydino_plugin.AnomalyDINOFewShot",
        **{f"model.{name}": value for name, value in SETTINGS.items()},
        "data": "anomalib.data.Folder",
        **{"data.name": "part", "data.root": tree, "data.normal_dir": "train/good", "data.abnormal_dir": "test/spot"},
        **{"data.normal_test_dir": "test/good", "data.num_workers": 0, "default_root_dir": tmp_path},
        "trainer.accelerator": "cpu",
    }
    script = Path(sys.executable).with_name("anomalib")
    command = [str(script), "train", *(f"--{name}={value}" for name, value in flags.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "image_AUROC" in done.stdout
    assert list(tmp_path.rglob("*.ckpt"))


def test_pictures_of_anomalibs_visualizer(fitted, tree, tmp_path):
    model, host = fitted
    host.test(model, datamodule=folder(tree))
    assert len(list(tmp_path.rglob("images/**/*.png"))) == 6


SEVERAL_DEVICES = """
import json, sys
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalydino_plugin import AnomalyDINOFewShot
root, devices = sys.argv[1], int(sys.argv[2])
model = AnomalyDINOFewShot({backbone!r}, {weights!r}, resolution=64, masking="off", shots=2)
def folder():
    return Folder(name="part", root=root, normal_dir="train/good", normal_test_dir="test/good",
                  abnormal_dir="test/spot", mask_dir="ground_truth/spot", num_workers=0, val_split_mode="same_as_test")
engine = Engine(default_root_dir=sys.argv[3], logger=False, accelerator="cpu", devices=devices,
                strategy="ddp" if devices > 1 else "auto", enable_progress_bar=False)
engine.fit(model, datamodule=folder())
(metrics,) = engine.test(model, datamodule=folder(), verbose=False)
if engine.trainer.global_rank == 0:
    print("FOUND", json.dumps([engine.trainer.world_size, len(model.model.memory), metrics]))
"""


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_several_devices_build_the_same_bank_and_share_the_test_set(tree, tmp_path):
    """Two processes on the CPU stand for two devices."""
    import json

    (tmp_path / "script.py").write_text(SEVERAL_DEVICES.format(**SETTINGS))
    found = []
    for devices in (1, 2):
        command = [sys.executable, "-W", "ignore", str(tmp_path / "script.py"), str(tree), str(devices), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        (line,) = [text for text in done.stdout.splitlines() if text.startswith("FOUND")]
        found.append(json.loads(line.removeprefix("FOUND")))
    assert [entry[0] for entry in found] == [1, 2]
    assert found[0][1] == found[1][1] == 2 * 8 * 16
    assert found[0][2] == pytest.approx(found[1][2], abs=1e-6)
