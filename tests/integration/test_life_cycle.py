"""What a user of anomalib does between two processes and on the command line, for both models."""

import json
import logging
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import in_anomalib
import pytest
import torch
from anomalib.cli import AnomalibCLI
from anomalib.data import PredictDataset
from generated import TINY
from in_anomalib import DATA, engine
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from anomalydino_plugin import AnomalyDINOBatched, AnomalyDINOFewShot, MaskingDecision

SETTINGS = {"backbone": TINY, "weights": "random:0", "resolution": 64, "masking": "off"}
folder = partial(in_anomalib.folder, eval_batch_size=4)


@pytest.fixture
def tree(mvtec_tree) -> Path:
    return mvtec_tree / "01"


# A new process

RESUME = """
import json, sys
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalydino_plugin import AnomalyDINOFewShot, FewShotModel
root, checkpoint, results = sys.argv[1:]
assert torch.load(checkpoint, weights_only=True)
def refuse(*args):
    raise SystemExit("the bank was built again")
FewShotModel.add_reference = refuse
folder = lambda: Folder(name="part", root=root, mask_dir="ground_truth/spot", num_workers=0, eval_batch_size=4,
                        val_split_mode="same_as_test", **DATA)
engine = lambda: Engine(default_root_dir=results, logger=False, accelerator="cpu", enable_progress_bar=False)
model, host = AnomalyDINOFewShot(**SETTINGS), engine()
host.fit(model, datamodule=folder(), ckpt_path=checkpoint)
(resumed,) = host.test(model, datamodule=folder(), verbose=False)
(tested,) = engine().test(AnomalyDINOFewShot(**SETTINGS), datamodule=folder(), ckpt_path=checkpoint, verbose=False)
print("FOUND", json.dumps([resumed, tested, float(model.post_processor.image_threshold), list(model.model.bank.image_ids)]))
"""


@pytest.mark.thorough
@pytest.mark.timeout(240)
def test_a_new_process_resumes_and_tests_from_a_checkpoint(tree, tmp_path):
    model, host = AnomalyDINOFewShot(**SETTINGS, shots=2), engine(tmp_path / "first")
    host.fit(model, datamodule=folder(tree))
    (expected,) = host.test(model, datamodule=folder(tree), verbose=False)
    program = f"SETTINGS, DATA = {SETTINGS | {'shots': 2}!r}, {DATA!r}\n{RESUME}"
    checkpoint = host.trainer.checkpoint_callback.best_model_path
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(tree), checkpoint, str(tmp_path / "second")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [text for text in done.stdout.splitlines() if text.startswith("FOUND")]
    resumed, tested, threshold, references = json.loads(line.removeprefix("FOUND"))
    assert resumed == pytest.approx(expected)
    assert tested == pytest.approx(expected)
    assert threshold == float(model.post_processor.image_threshold)
    assert references == list(model.model.bank.image_ids)


# Few-shot selection


@pytest.mark.slow
def test_selection_on_the_command_line(tree, tmp_path):
    settings = {**SETTINGS, "shots": 2, "seed": 1, "rotations": "informed"}
    flags = {
        **{f"model.{name}": value for name, value in settings.items()},
        **{f"data.{name}": value for name, value in DATA.items()},
        **{"data.name": "part", "data.root": tree, "data.num_workers": 0, "default_root_dir": tmp_path},
    }
    common = ["fit", "--model=anomalydino_plugin.AnomalyDINOFewShot", "--data=anomalib.data.Folder"]
    AnomalibCLI(args=[*common, "--trainer.accelerator=cpu", *(f"--{name}={value}" for name, value in flags.items())])
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    core = AnomalyDINOFewShot.load_from_checkpoint(checkpoint).model
    assert [Path(name).name for name in core.bank.image_ids] == ["002.png", "003.png"]
    assert core.angles == (0.0,)


@pytest.mark.parametrize("verdict", [True, False])
def test_masking_auto_follows_the_first_reference(tree, tmp_path, monkeypatch, caplog, verdict):
    """Decided inside fit, logged, and known to whoever loads the checkpoint."""
    answers = [MaskingDecision(verdict, 1.0, 0.5, 0.0, 0.0, "the first"), MaskingDecision(not verdict, 1, 0, 0, 0, "x")]
    asked = iter(answers)
    monkeypatch.setattr("anomalydino_plugin.few_shot.torch_model.masking_test", lambda *args: next(asked))
    model, host = AnomalyDINOFewShot(**{**SETTINGS, "masking": "auto"}, shots=2), engine(tmp_path)
    with torch.no_grad():  # components beyond the foreground threshold, as of trained features
        model.model.backbone.vit.norm.weight.mul_(8)
    with caplog.at_level(logging.INFO):
        host.fit(model, datamodule=folder(tree))
    assert "masking test: the first" in caplog.text
    assert model.model.use_mask is verdict
    restored = AnomalyDINOFewShot.load_from_checkpoint(host.trainer.checkpoint_callback.best_model_path).model
    assert restored.masking_decision == answers[0]
    assert restored.use_mask is verdict


def test_references_that_are_copies_set_no_threshold(tree, tmp_path, caplog):
    """Each is found in the other: the score of a normal image would be nearly 0. The bank stands, scores stay raw."""
    shutil.copytree(tree, tmp_path / "part")
    shutil.copy(tmp_path / "part" / "train" / "good" / "000.png", tmp_path / "part" / "train" / "good" / "001.png")
    model, host = AnomalyDINOFewShot(**SETTINGS, shots=2), engine(tmp_path)
    host.fit(model, datamodule=folder(tmp_path / "part"))
    assert "no thresholds: the normal images score nearly 0" in caplog.text
    for batch in host.predict(model, datamodule=folder(tmp_path / "part")):
        assert batch.pred_label is None
        for path, score in zip(batch.image_path, batch.pred_score, strict=True):
            assert float(score) == pytest.approx(model.model.score(path).score, abs=1e-5)


# Batched zero-shot: test sees every image once


class Seen(Callback):
    """Paths and raw scores of the test batches."""

    def __init__(self):
        self.scores: list[tuple[str, float]] = []

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, *args):
        self.scores += zip(outputs.image_path, outputs.pred_score.tolist(), strict=True)


@pytest.mark.parametrize("options", [{"num_workers": 0}, {"num_workers": 2}, {"num_workers": 2, "eval_batch_size": 1}])
def test_engine_test_by_datamodule(tree, tmp_path, options):
    raw = engine(tmp_path / "raw").predict(AnomalyDINOBatched(**SETTINGS), datamodule=folder(tree))
    expected = {
        path: float(score) for batch in raw for path, score in zip(batch.image_path, batch.pred_score, strict=True)
    }
    seen = Seen()
    engine(tmp_path, callbacks=[seen]).test(AnomalyDINOBatched(**SETTINGS), datamodule=folder(tree, **options))
    assert len(seen.scores) == 6
    assert dict(seen.scores) == pytest.approx(expected, abs=1e-6)


def test_engine_test_by_a_shuffled_loader_with_persistent_workers(tree, tmp_path):
    datamodule = folder(tree)
    datamodule.setup()
    dataset = datamodule.test_data
    workers = {"num_workers": 2, "persistent_workers": True}
    loader = DataLoader(dataset, batch_size=4, shuffle=True, collate_fn=dataset.collate_fn, **workers)
    seen = Seen()
    host = engine(tmp_path, callbacks=[seen])
    found = [host.test(AnomalyDINOBatched(**SETTINGS), dataloaders=loader, verbose=False)[0] for _ in range(2)]
    assert found[0] == pytest.approx(found[1])
    assert sorted(path for path, _ in seen.scores) == sorted(2 * [str(path) for path in dataset.samples.image_path])


def test_default_batch_size_of_predict_dataset(tree, tmp_path):
    """anomalib's own loader over a dataset: batch 1."""
    batches = engine(tmp_path).predict(AnomalyDINOBatched(**SETTINGS), dataset=PredictDataset(tree / "test"))
    assert sum(len(batch.pred_score) for batch in batches) == 6


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-true"])
def test_batched_in_lower_precision(tree, tmp_path, precision):
    def scores(**options):
        batches = engine(tmp_path, **options).predict(AnomalyDINOBatched(**SETTINGS), datamodule=folder(tree))
        return torch.cat([batch.pred_score for batch in batches])

    exact, low = scores(), scores(precision=precision)
    assert low.dtype == torch.float32
    assert not torch.equal(low, exact)
    assert torch.allclose(low, exact, rtol=0.05)


# CUDA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [AnomalyDINOFewShot, AnomalyDINOBatched])
def test_a_cuda_device_gives_the_same_scores(tree, tmp_path, name):
    found = []
    for accelerator in ("cpu", "cuda"):
        model, host = name(**SETTINGS, visualizer=False), engine(tmp_path, accelerator=accelerator, devices=1)
        host.fit(model, datamodule=folder(tree))
        batches = host.predict(model, datamodule=folder(tree))
        found.append(torch.cat([batch.pred_score.cpu() for batch in batches]))
        assert 0.0 <= host.test(model, datamodule=folder(tree), verbose=False)[0]["image_AUROC"] <= 1.0
    assert torch.allclose(found[0], found[1], rtol=1e-3)
