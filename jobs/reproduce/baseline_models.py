"""anomalib's models on given references and test images: ``Engine.fit``, ``Engine.predict``, our metrics.

Raw scores and maps are measured: post-processing clamps them. Maps have the size of a model's input, and are resized
to the image's (bilinear) before pixels are measured at full resolution.

Legend: ``H W`` pixels of an image, ``h w`` pixels of a map.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from anomalib.data.datasets.base.image import AnomalibDataset
from anomalib.engine import Engine
from lightning.pytorch import seed_everything
from numpy.typing import NDArray
from pandas import DataFrame
from PIL import Image
from rich.console import Console

from anomalydino_plugin import load_weights
from jobs.evaluate import evaluate_run
from jobs.filesystem import local_path
from jobs.inputs import GOOD
from jobs.metric_rows import CategoryMetrics
from jobs.reproduce.baselines import BUILTIN, BaselineOrder
from jobs.reproduce.protocol import PAPER_BACKBONE
from jobs.scored_run import ScoredImage, ScoredRun
from jobs.store import Store

_SEED = 0  # of coresets and randomised components
_UNTRAINED = "random"


def run_baseline(order: BaselineOrder) -> CategoryMetrics:
    """Fit and measure one baseline."""
    seed_everything(_SEED)
    data, model = _Protocol(order), build(order)
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(default_root_dir=folder, logger=False, enable_progress_bar=False, barebones=False)
        if order.baseline != "winclip":  # which takes its references when it is set up
            engine.fit(model, datamodule=data)
        batches = engine.predict(model, datamodule=data) or []
    (metrics,) = evaluate_run(_PredictedRun(order, batches), Console(quiet=True), None if order.pixel else False)
    return metrics


def build(order: BaselineOrder) -> Any:
    """A baseline with its own defaults, on local weights: timm and open_clip would ask a hub for them."""
    import timm
    from anomalib import models

    raw = {"post_processor": False, "evaluator": False, "visualizer": False}
    trained = order.weights.partition(":")[0] != _UNTRAINED
    if order.baseline == "winclip":
        import open_clip

        create = open_clip.create_model_and_transforms
        with patch("open_clip.create_model_and_transforms", _from_file(create, order.weights if trained else None)):
            return models.WinClip(class_name=order.category, k_shot=len(order.references), **raw)
    if order.baseline == BUILTIN:
        tensors = load_weights(order.weights, PAPER_BACKBONE) if trained else None  # builds a model with timm, too
        with patch("timm.create_model", functools.partial(_dinov2, timm.create_model, tensors)):
            return models.AnomalyDINO(masking=order.masked, **raw)
    overlay = {"pretrained_cfg_overlay": {"file": order.weights}} if trained else {}
    with patch("timm.create_model", functools.partial(timm.create_model, **overlay)):
        kind = models.Padim if order.baseline == "padim" else models.Patchcore
        return kind(pre_trained=trained, **raw)


def _dinov2(create: Callable[..., Any], tensors: dict[str, torch.Tensor] | None, name: str, **options: Any) -> Any:
    backbone = create(name, **{**options, "pretrained": False})
    if tensors is not None:
        backbone.load_state_dict(tensors, strict=True)
    return backbone


def _from_file(create: Callable[..., Any], weights: str | None) -> Callable[..., Any]:
    return lambda name, **_: create(name, pretrained=weights)


class _Protocol(AnomalibDataModule):  # type: ignore[misc]  # no type information
    """The references as training images, and all test images one by one.

    The references stand for a validation set, too: models ask for one, and none of them learns from it.
    """

    def __init__(self, order: BaselineOrder) -> None:
        super().__init__(train_batch_size=1, eval_batch_size=1, num_workers=0)
        self.order = order

    def _setup(self, _stage: str | None = None) -> None:
        tests = [str(local_path(record.uri)) for record in self.order.tests]
        defects = [record.label not in {GOOD, None} for record in self.order.tests]
        self.train_data = self.val_data = _dataset(list(self.order.references), [False] * len(self.order.references))
        self.test_data = _dataset(tests, defects)

    def _create_test_split(self) -> None:
        """The test set is given."""

    def _create_val_split(self) -> None:
        """So is this."""


def _dataset(paths: list[str], defects: list[bool]) -> AnomalibDataset:
    samples = DataFrame(
        {"image_path": paths, "split": "test", "label_index": [int(defect) for defect in defects], "mask_path": ""}
    )
    samples.attrs["task"] = "classification"  # masks are read by our own evaluation
    dataset = AnomalibDataset()
    dataset.samples = samples
    return dataset


class _PredictedRun(ScoredRun):
    """Predictions as the run that our evaluation reads."""

    def __init__(self, order: BaselineOrder, batches: list[Any]) -> None:
        self.store = Store(order.out)
        self.settings, self.failed = {}, {order.category: 0}
        found = {path: one for batch in batches for path, one in _predictions(batch)}
        self._maps: dict[str, NDArray[np.float32]] = {}
        images = []
        for record in sorted(order.tests, key=lambda record: record.image_id):
            path = str(local_path(record.uri))
            score, self._maps[record.image_id] = found[path]
            with Image.open(path) as file:
                size = (file.height, file.width)
            grid = self._maps[record.image_id].shape
            images.append(
                ScoredImage(record.image_id, record.uri, record.label, record.mask_uri, size, grid, score, None)
            )
        self.images = {order.category: images}

    def distances(self, category: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Id and (h, w) map of each image."""
        del category
        yield from self._maps.items()

    def anomaly_map(self, image: ScoredImage, distances: NDArray[np.float32]) -> NDArray[np.float32]:
        """(H, W) map at the image's size."""
        values = torch.from_numpy(distances)[None, None]
        resized = torch.nn.functional.interpolate(values, size=image.size, mode="bilinear", align_corners=False)
        return np.asarray(resized[0, 0].numpy())


def _predictions(batch: Any) -> Iterator[tuple[str, tuple[float, NDArray[np.float32]]]]:
    """Path, and raw score with (h, w) map, of each image of a batch."""
    scores = batch.pred_score.reshape(-1)
    maps = batch.anomaly_map.reshape(len(scores), *batch.anomaly_map.shape[-2:])
    for path, score, values in zip(batch.image_path, scores, maps, strict=True):
        yield str(path), (float(score), values.float().cpu().numpy())
