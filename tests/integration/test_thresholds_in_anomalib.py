"""Thresholds, checkpoints and precisions of `AnomalyDINOFewShot` through anomalib's Engine."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import in_anomalib
import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from generated import TINY
from lightning.pytorch.callbacks import Callback
from safetensors.torch import save_file

from anomalydino_plugin import (
    AnomalyDINOFewShot,
    ConfigError,
    FewShotModel,
    ImageError,
    InputError,
    WeightsError,
    calibrate,
    load_backbone,
    normalise_score,
)

SETTINGS = {"backbone": TINY, "weights": "random:0", "resolution": 64, "masking": "off", "shots": 3}
folder = partial(in_anomalib.folder, val_split_mode="none", train_batch_size=2, eval_batch_size=3)
engine = partial(in_anomalib.engine, enable_model_summary=False)


class Results(NamedTuple):
    """Predictions of the six test images, by path."""

    scores: dict[str, float]
    labels: dict[str, bool]
    maps: dict[str, torch.Tensor]
    masks: dict[str, torch.Tensor]


def predicted(host: Engine, model: AnomalyDINOFewShot, datamodule: Folder, **options) -> Results:
    results = Results({}, {}, {}, {})
    for batch in host.predict(model, datamodule=datamodule, **options):
        for index, path in enumerate(batch.image_path):
            results.scores[path] = float(batch.pred_score[index])
            results.maps[path] = batch.anomaly_map[index].squeeze()
            if batch.pred_label is not None:
                results.labels[path] = bool(batch.pred_label[index])
                results.masks[path] = batch.pred_mask[index].squeeze()
    assert len(results.scores) == 6
    return results


def thresholds(model: AnomalyDINOFewShot) -> tuple[float, float]:
    return float(model.post_processor.image_threshold), float(model.post_processor.pixel_threshold)


@pytest.fixture
def tree(mvtec_tree) -> Path:
    return mvtec_tree / "01"


@pytest.fixture(scope="module")
def fitted(mvtec_tree, tmp_path_factory) -> tuple[FewShotModel, str]:
    """A fitted torch model, to compare with, and its checkpoint."""
    model, host = AnomalyDINOFewShot(**SETTINGS), engine(tmp_path_factory.mktemp("fitted"))
    host.fit(model, datamodule=folder(mvtec_tree / "01"))
    return model.model, host.trainer.checkpoint_callback.best_model_path


@pytest.fixture
def core(fitted) -> FewShotModel:
    return fitted[0]


@pytest.fixture
def checkpoint(fitted) -> str:
    return fitted[1]


@pytest.fixture
def no_building(monkeypatch):
    """Whoever builds a bank, or a part of one, fails."""

    def refuse(*args, **kwargs):
        raise AssertionError("the bank was built again")

    for name in ("fit", "extend", "add_reference", "freeze"):
        monkeypatch.setattr(FewShotModel, name, refuse)


def assert_follows(results: Results, core: FewShotModel, image: float, pixel: float) -> None:
    """Scores, maps, labels and masks are those of the torch model under these thresholds."""
    for path, score in results.scores.items():
        detection = core.score(path)
        raw_map = core.anomaly_map(detection)
        assert score == pytest.approx(normalise_score(detection.score, image), rel=1e-5)
        assert results.labels[path] == (detection.score > image)
        assert np.allclose(results.maps[path].numpy(), normalise_score(raw_map, pixel), rtol=1e-4, atol=1e-6)
        assert (results.masks[path].numpy() == (raw_map > pixel)).mean() > 0.999  # a pixel may lie on the threshold


# Another false-alarm target


@pytest.mark.parametrize("false_alarm", [0.001, 0.2, 0.5])
def test_another_target_for_a_loaded_checkpoint(core, checkpoint, false_alarm, no_building):
    stored = AnomalyDINOFewShot.load_from_checkpoint(checkpoint)
    changed = AnomalyDINOFewShot.load_from_checkpoint(checkpoint, false_alarm=false_alarm)
    expected = calibrate(core, false_alarm=false_alarm)
    assert thresholds(changed) == pytest.approx((expected.image_threshold, expected.pixel_threshold), rel=1e-6)
    assert thresholds(stored) == pytest.approx(calibrate(core)[:2], rel=1e-6)
    assert (thresholds(changed) > thresholds(stored)) == (false_alarm < 0.05)
    assert torch.equal(changed.model.bank.rows, core.bank.rows)


@pytest.mark.parametrize("false_alarm", [0.001, 0.5])
def test_another_target_through_the_engine(core, checkpoint, tree, tmp_path, false_alarm, no_building):
    fresh = AnomalyDINOFewShot(**SETTINGS, false_alarm=false_alarm)
    results = predicted(engine(tmp_path), fresh, folder(tree), ckpt_path=checkpoint)
    expected = calibrate(core, false_alarm=false_alarm)
    assert thresholds(fresh) == pytest.approx((expected.image_threshold, expected.pixel_threshold), rel=1e-6)
    assert_follows(results, core, expected.image_threshold, expected.pixel_threshold)


def test_another_target_for_a_fitted_model(core, checkpoint, tree, tmp_path, no_building):
    model = AnomalyDINOFewShot.load_from_checkpoint(checkpoint)
    for false_alarm in (0.3, 0.01):
        model.false_alarm = false_alarm
        predicted(engine(tmp_path), model, folder(tree))
        assert thresholds(model) == pytest.approx(calibrate(core, false_alarm=false_alarm)[:2], rel=1e-6)


def test_the_target_of_a_checkpoint_stays(core, checkpoint, tree, tmp_path):
    first, host = AnomalyDINOFewShot.load_from_checkpoint(checkpoint, false_alarm=0.3), engine(tmp_path)
    predicted(host, first, folder(tree))
    host.trainer.save_checkpoint(tmp_path / "again.ckpt")
    again = AnomalyDINOFewShot.load_from_checkpoint(tmp_path / "again.ckpt")
    assert again.false_alarm == 0.3
    assert thresholds(again) == thresholds(first)
    assert thresholds(again) == pytest.approx(calibrate(core, false_alarm=0.3)[:2], rel=1e-6)


def test_a_target_out_of_range(checkpoint):
    with pytest.raises(ConfigError, match=r"false_alarm=1\.5"):
        AnomalyDINOFewShot.load_from_checkpoint(checkpoint, false_alarm=1.5)


# Thresholds in place of the calibrated ones

OVERRIDES = [
    {"image_threshold": 0.55, "pixel_threshold": 0.35},
    {"image_threshold": 0.52},
    {"pixel_threshold": 0.45},
    {"image_threshold": 0.5, "false_alarm": 0.4},
]


def overridden(core: FewShotModel, override: dict[str, float]) -> tuple[float, float]:
    calibration = calibrate(core, false_alarm=override.get("false_alarm", 0.05))
    return (
        override.get("image_threshold", calibration.image_threshold),
        override.get("pixel_threshold", calibration.pixel_threshold),
    )


@pytest.mark.parametrize("override", OVERRIDES)
def test_thresholds_for_a_loaded_checkpoint(core, checkpoint, tree, tmp_path, override, no_building):
    model = AnomalyDINOFewShot.load_from_checkpoint(checkpoint, **override)
    expected = overridden(core, override)
    assert thresholds(model) == pytest.approx(expected, rel=1e-6)
    assert_follows(predicted(engine(tmp_path), model, folder(tree)), core, *expected)


@pytest.mark.parametrize("override", OVERRIDES)
def test_thresholds_through_the_engine(core, checkpoint, tree, tmp_path, override, no_building):
    model = AnomalyDINOFewShot(**SETTINGS, **override)
    results = predicted(engine(tmp_path), model, folder(tree), ckpt_path=checkpoint)
    assert_follows(results, core, *overridden(core, override))


def test_thresholds_change_labels_and_no_ranking(core, checkpoint, tree, tmp_path):
    scores = sorted(core.score(path).score for path in tree.glob("test/*/*.png"))
    between = (scores[1] + scores[2]) / 2
    orders = []
    for threshold in (1e-3, between, 1.9):
        model = AnomalyDINOFewShot.load_from_checkpoint(checkpoint, image_threshold=threshold)
        results = predicted(engine(tmp_path), model, folder(tree))
        assert sum(results.labels.values()) == sum(score > threshold for score in scores)
        orders.append(sorted(results.scores, key=results.scores.__getitem__))
    assert orders[0] == orders[1] == orders[2]


def test_thresholds_of_a_fit(tree, tmp_path):
    model, host = AnomalyDINOFewShot(**SETTINGS, image_threshold=0.33), engine(tmp_path)
    host.fit(model, datamodule=folder(tree))
    assert thresholds(model) == pytest.approx((0.33, calibrate(model.model).pixel_threshold), rel=1e-6)
    path = host.trainer.checkpoint_callback.best_model_path
    assert thresholds(AnomalyDINOFewShot.load_from_checkpoint(path)) == thresholds(model)
    without = AnomalyDINOFewShot.load_from_checkpoint(path, image_threshold=None)
    assert thresholds(without) == pytest.approx(calibrate(model.model)[:2], rel=1e-6)


def test_thresholds_taken_back(core, checkpoint, tree, tmp_path):
    model = AnomalyDINOFewShot.load_from_checkpoint(checkpoint, image_threshold=0.9)
    model.image_threshold = None
    predicted(engine(tmp_path), model, folder(tree))
    assert thresholds(model) == pytest.approx(calibrate(core)[:2], rel=1e-6)


def test_one_threshold_where_nothing_sets_the_other(tree, tmp_path):
    settings = {**SETTINGS, "shots": 1, "rotations": "informed"}  # a single unrotated reference calibrates nothing
    plain, host = AnomalyDINOFewShot(**settings), engine(tmp_path)
    host.fit(plain, datamodule=folder(tree))
    assert not plain.post_processor.calibrated
    path = host.trainer.checkpoint_callback.best_model_path
    with pytest.raises(ConfigError, match=r"image_threshold=0\.3, pixel_threshold=None: expected both"):
        AnomalyDINOFewShot.load_from_checkpoint(path, image_threshold=0.3)
    with pytest.raises(ConfigError, match="expected both"):
        engine(tmp_path).predict(
            AnomalyDINOFewShot(**settings, pixel_threshold=0.3), datamodule=folder(tree), ckpt_path=path
        )
    both = AnomalyDINOFewShot.load_from_checkpoint(path, image_threshold=0.3, pixel_threshold=0.4)
    assert_follows(predicted(engine(tmp_path), both, folder(tree)), plain.model, 0.3, 0.4)


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan")])
def test_thresholds_out_of_range(checkpoint, threshold):
    with pytest.raises(ConfigError, match="positive"):
        AnomalyDINOFewShot.load_from_checkpoint(checkpoint, image_threshold=threshold)


# Scores are those of the image alone


def test_scores_do_not_depend_on_the_batch(core, checkpoint, tree, tmp_path):
    model = AnomalyDINOFewShot.load_from_checkpoint(checkpoint)
    alone, three, six = (
        predicted(engine(tmp_path), model, folder(tree, eval_batch_size=size, test_split_mode="from_dir"))
        for size in (1, 3, 6)
    )
    assert_follows(alone, core, *calibrate(core)[:2])
    for batched in (three, six):
        assert batched.scores == pytest.approx(alone.scores, abs=1e-6)
        assert batched.labels == alone.labels
        for path, anomaly_map in alone.maps.items():
            assert torch.allclose(batched.maps[path], anomaly_map, atol=1e-6)
    peaks = [float(anomaly_map.max()) for anomaly_map in alone.maps.values()]
    assert max(peaks) - min(peaks) > 0.01  # no map was stretched to a range of its own
    assert max(peaks) < 1


# Checkpoints without their weights file


def test_a_checkpoint_outlives_its_weights_file(tree, tmp_path):
    file = tmp_path / "weights.safetensors"
    weights = load_backbone(TINY, "random:7").vit.state_dict()
    save_file({name: value.contiguous() for name, value in weights.items()}, file)
    settings = {**SETTINGS, "weights": str(file)}
    model, host = AnomalyDINOFewShot(**settings), engine(tmp_path)
    host.fit(model, datamodule=folder(tree))
    file.unlink()
    program = (
        "import sys\n"
        "from anomalydino_plugin import AnomalyDINOFewShot\n"
        "model = AnomalyDINOFewShot.load_from_checkpoint(sys.argv[1])\n"
        "print(model.model.score(sys.argv[2]).score, float(model.post_processor.image_threshold),\n"
        "      model.model.backbone.weights_sha256, len(model.model.bank))\n"
    )
    image = tree / "test" / "spot" / "001.png"
    done = subprocess.run(
        [sys.executable, "-c", program, host.trainer.checkpoint_callback.best_model_path, str(image)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    score, threshold, checksum, rows = done.stdout.strip().splitlines()[-1].split()
    assert float(score) == pytest.approx(model.model.score(image).score, abs=1e-6)
    assert float(threshold) == thresholds(model)[0]
    assert checksum == model.model.backbone.weights_sha256
    assert int(rows) == len(model.model.bank)
    with pytest.raises(WeightsError):
        AnomalyDINOFewShot(**settings)


def test_a_model_without_weights_takes_those_of_the_checkpoint(core, checkpoint, tree, tmp_path, monkeypatch):
    monkeypatch.setattr("anomalydino_plugin.backbone.resolve_weights", lambda *args, **kwargs: pytest.fail("looked up"))
    monkeypatch.setattr("anomalydino_plugin.backbone._random_seed", lambda *args: pytest.fail("random weights"))
    bare = AnomalyDINOFewShot(**{**SETTINGS, "weights": "checkpoint"})
    host = engine(tmp_path)
    results = predicted(host, bare, folder(tree), ckpt_path=checkpoint)
    assert_follows(results, core, *calibrate(core)[:2])
    host.trainer.save_checkpoint(tmp_path / "again.ckpt")  # and it can be handed on
    again = AnomalyDINOFewShot.load_from_checkpoint(tmp_path / "again.ckpt")
    assert again.model.fingerprint() == core.fingerprint()


# Precision


@pytest.fixture(scope="module")
def exact(mvtec_tree, tmp_path_factory) -> Results:
    """Raw results in float32."""
    model, host = AnomalyDINOFewShot(**SETTINGS, post_processor=False), engine(tmp_path_factory.mktemp("exact"))
    host.fit(model, datamodule=folder(mvtec_tree / "01"))
    return predicted(host, model, folder(mvtec_tree / "01"))


@pytest.mark.parametrize(
    "precision", ["bf16-mixed", "16-mixed", "16-true"]
)  # Lightning runs all; 16-mixed as bf16 here
def test_lower_precision(core, exact, tree, tmp_path, precision):
    model, host = AnomalyDINOFewShot(**SETTINGS, post_processor=False), engine(tmp_path, precision=precision)
    host.fit(model, datamodule=folder(tree))
    raw = predicted(host, model, folder(tree))
    assert model.model.memory.rows.dtype == torch.float32
    assert torch.allclose(model.model.memory.rows, core.memory.rows, atol=0.01)
    assert raw.scores == pytest.approx(exact.scores, rel=0.05)
    assert raw.scores != exact.scores  # the encoder did run in lower precision
    for path, anomaly_map in exact.maps.items():
        assert raw.maps[path].dtype == torch.float32
        assert torch.allclose(raw.maps[path], anomaly_map, rtol=0.05, atol=0.005)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-true"])
def test_thresholds_in_lower_precision(core, checkpoint, tree, tmp_path, precision):
    model = AnomalyDINOFewShot.load_from_checkpoint(checkpoint)
    before = thresholds(model)
    results = predicted(engine(tmp_path, precision=precision), model, folder(tree))
    assert thresholds(model) == before
    assert model.post_processor.normal_scores.dtype == torch.float64
    assert model.post_processor.normal_scores.tolist() == list(calibrate(core).scores)
    assert torch.equal(model.model.memory.rows, core.memory.rows)
    for path, score in results.scores.items():
        assert score == pytest.approx(normalise_score(core.score(path).score, before[0]), rel=0.05)
        assert results.labels[path] == (score > 0.5)
    (metrics,) = engine(tmp_path, precision=precision).test(model, datamodule=folder(tree))
    assert metrics.keys() == {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"}


@pytest.mark.parametrize(("precision", "instead"), [("bf16-true", "'bf16-mixed'"), ("64-true", "'32-true'")])
def test_refused_precision(checkpoint, tree, tmp_path, precision, instead):
    with pytest.raises(ConfigError, match=f"precision='{precision}'.*use {instead}"):
        engine(tmp_path, precision=precision).fit(AnomalyDINOFewShot(**SETTINGS), datamodule=folder(tree))
    model = AnomalyDINOFewShot.load_from_checkpoint(checkpoint)
    with pytest.raises(ConfigError, match=f"precision='{precision}'.*use {instead}"):
        engine(tmp_path, precision=precision).predict(model, datamodule=folder(tree))


# Interrupted and resumed


ALL_TRAINING_IMAGES = ["000.png", "001.png", "002.png", "003.png"]


def training_images(datamodule: Folder) -> list[str]:
    return sorted(Path(path).name for path in datamodule.train_data.samples["image_path"])


def test_a_resumed_fit_keeps_bank_and_datamodule(core, checkpoint, tree, tmp_path, no_building):
    model, host, datamodule = AnomalyDINOFewShot(**SETTINGS), engine(tmp_path), folder(tree)
    host.fit(model, datamodule=datamodule, ckpt_path=checkpoint)
    assert training_images(datamodule) == ALL_TRAINING_IMAGES
    assert torch.equal(model.model.bank.rows, core.bank.rows)
    assert model.model.bank.image_ids == core.bank.image_ids
    assert_follows(predicted(host, model, datamodule), core, *calibrate(core)[:2])


def test_a_fit_gives_the_datamodule_back(tree, core, tmp_path):
    model, datamodule = AnomalyDINOFewShot(**SETTINGS), folder(tree)
    for _ in range(2):
        engine(tmp_path).fit(model, datamodule=datamodule)
        assert training_images(datamodule) == ALL_TRAINING_IMAGES
    assert torch.equal(model.model.bank.rows, core.bank.rows)


def broken_reference(model: AnomalyDINOFewShot, monkeypatch) -> type[Exception]:
    def refuse(image, image_id):
        raise ImageError(f"cannot read {image_id}")

    monkeypatch.setattr(model.model, "add_reference", refuse)
    return ImageError


def too_many_shots(model: AnomalyDINOFewShot, monkeypatch) -> type[Exception]:
    monkeypatch.setattr(model, "shots", 5)
    return InputError


@pytest.mark.parametrize("interrupt", [broken_reference, too_many_shots])
def test_an_interrupted_fit_gives_the_datamodule_back(core, tree, tmp_path, monkeypatch, interrupt):
    model, datamodule = AnomalyDINOFewShot(**SETTINGS), folder(tree)
    with monkeypatch.context() as patch, pytest.raises(interrupt(model, patch)):
        engine(tmp_path).fit(model, datamodule=datamodule)
    assert training_images(datamodule) == ALL_TRAINING_IMAGES
    engine(tmp_path).fit(model, datamodule=datamodule)
    assert torch.equal(model.model.bank.rows, core.bank.rows)


class Interrupt(Callback):
    """A host's own callback that fails before the references are read."""

    def on_train_start(self, trainer, pl_module):
        raise RuntimeError("interrupted")


def test_a_fit_interrupted_before_its_references_are_read(core, tree, tmp_path):
    model, datamodule = AnomalyDINOFewShot(**SETTINGS), folder(tree)
    with pytest.raises(RuntimeError, match="interrupted"):
        engine(tmp_path, callbacks=[Interrupt()]).fit(model, datamodule=datamodule)
    assert training_images(datamodule) == ALL_TRAINING_IMAGES
    engine(tmp_path).fit(model, datamodule=datamodule)
    assert torch.equal(model.model.bank.rows, core.bank.rows)
