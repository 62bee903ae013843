"""`AnomalyDINOBatched` through anomalib's Engine, with a tiny untrained backbone on generated images."""

import shutil
from functools import partial

import in_anomalib
import numpy as np
import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.data.utils.split import ValSplitMode
from anomalib.models import get_model
from anomalib.pre_processing import PreProcessor
from generated import TINY, save, textured
from in_anomalib import engine
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.v2 import CenterCrop

from anomalydino_plugin import AnomalyDINOBatched, BatchedModel, ConfigError, InputError, read_image, register

SETTINGS = {"backbone": TINY, "weights": "random:0", "resolution": 64, "masking": "off"}
folder = partial(in_anomalib.folder, eval_batch_size=4)


def scores_of(batches) -> dict[str, float]:
    return {p: float(s) for batch in batches for p, s in zip(batch.image_path, batch.pred_score, strict=True)}


@pytest.fixture
def tree(mvtec_tree, tmp_path):
    shutil.copytree(mvtec_tree / "01", tmp_path / "part")
    return tmp_path / "part"


@pytest.fixture
def model():
    return AnomalyDINOBatched(**SETTINGS)


@pytest.fixture
def expected(tree, tiny_backbone):
    """Scores of the test images among themselves, from the torch model."""
    paths = sorted(str(path) for path in (tree / "test").rglob("*.png"))
    detections = BatchedModel(tiny_backbone, resolution=64, masking="off").score_set(paths)
    return dict(zip(paths, (detection.score for detection in detections), strict=True))


def assert_scores(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for path, score in expected.items():
        assert found[path] == pytest.approx(score, abs=1e-6), path


def test_fit_does_nothing_and_test_reports_metrics(model, tree, tmp_path):
    host = engine(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if torch.is_tensor(tensor)}
    host.fit(model, datamodule=folder(tree))
    for name, tensor in model.state_dict().items():
        assert not torch.is_tensor(tensor) or torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name
    (metrics,) = host.test(model, datamodule=folder(tree))
    assert metrics.keys() == {"image_AUROC", "image_F1Max", "pixel_AUROC"}
    assert len(list(tmp_path.rglob("images/**/*.png"))) == 6


def test_validation_computes_nothing(model, tree, tmp_path, monkeypatch):
    monkeypatch.setattr(BatchedModel, "encode", lambda *args: pytest.fail("validation encoded an image"))
    engine(tmp_path).validate(model, datamodule=folder(tree))


@pytest.mark.parametrize("workers", [0, 2])
def test_predict_by_datamodule(model, tree, tmp_path, expected, workers):
    batches = engine(tmp_path).predict(model, datamodule=folder(tree, num_workers=workers))
    assert_scores(scores_of(batches), expected)


def test_predict_by_data_path_and_dataset(model, tree, tmp_path, tiny_backbone):
    paths = sorted(str(path) for path in (tree / "test" / "spot").iterdir())
    detections = BatchedModel(tiny_backbone, resolution=64, masking="off").score_set(paths)
    expected = dict(zip(paths, (detection.score for detection in detections), strict=True))
    assert_scores(scores_of(engine(tmp_path).predict(model, data_path=tree / "test" / "spot")), expected)
    assert_scores(scores_of(engine(tmp_path).predict(model, dataset=PredictDataset(tree / "test" / "spot"))), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"shuffle": True, "batch_size": 2},
        {"shuffle": True, "batch_size": 4, "num_workers": 2, "persistent_workers": True},
        {"batch_size": 6, "num_workers": 1},
        {"batch_size": 1},
    ],
)
def test_loaders_of_all_kinds(model, tree, tmp_path, expected, options):
    dataset = PredictDataset(tree / "test")
    loader = DataLoader(dataset, collate_fn=dataset.collate_fn, **options)
    host = engine(tmp_path)
    assert_scores(scores_of(host.predict(model, dataloaders=loader)), expected)
    assert_scores(scores_of(host.predict(model, dataloaders=loader)), expected)  # a second time, workers still there


def test_duplicates_give_as_many_predictions_as_images(model, tree, tmp_path):
    dataset = PredictDataset(tree / "test")
    doubled = Subset(dataset, [0, 1, 2, 0, 3])
    loader = DataLoader(doubled, collate_fn=dataset.collate_fn, batch_size=2)
    batches = engine(tmp_path).predict(model, dataloaders=loader)
    scores = torch.cat([batch.pred_score for batch in batches])
    assert len(scores) == 5
    assert scores[0] == scores[3] == pytest.approx(0, abs=1e-6)
    assert (scores[[1, 2, 4]] > 1e-3).all()


def test_several_loaders_are_separate_sets(model, tree, tmp_path, tiny_backbone):
    def loader(name: str) -> DataLoader:
        dataset = PredictDataset(tree / "test" / name)
        return DataLoader(dataset, collate_fn=dataset.collate_fn, batch_size=2)

    found = engine(tmp_path).predict(model, dataloaders=[loader("good"), loader("spot")])
    for batches, name in zip(found, ("good", "spot"), strict=True):
        paths = sorted(str(path) for path in (tree / "test" / name).iterdir())
        detections = BatchedModel(tiny_backbone, resolution=64, masking="off").score_set(paths)
        assert_scores(scores_of(batches), dict(zip(paths, (d.score for d in detections), strict=True)))


@pytest.mark.parametrize("batch_size", [1, 32])
def test_mixed_patch_grids(model, tree, tmp_path, tiny_backbone, batch_size):
    save(tree / "test" / "good" / "900.png", textured(9, (96, 160)))
    save(tree / "test" / "good" / "901.png", textured(8, (130, 96)))
    paths = sorted(str(path) for path in (tree / "test").rglob("*.png"))
    detections = BatchedModel(tiny_backbone, resolution=64, masking="off").score_set(paths)
    expected = dict(zip(paths, (detection.score for detection in detections), strict=True))
    datamodule = folder(tree, eval_batch_size=batch_size)
    batches = engine(tmp_path).predict(model, datamodule=datamodule)
    assert_scores(scores_of(batches), expected)
    for batch in batches:
        assert batch.anomaly_map.shape[-2:] == batch.image.shape[-2:]
    (metrics,) = engine(tmp_path).test(AnomalyDINOBatched(**SETTINGS), datamodule=datamodule)
    assert np.isfinite(metrics["pixel_AUROC"])


def test_one_image_alone(model, tree, tmp_path):
    with pytest.raises(InputError, match="at least two, found 1"):
        engine(tmp_path).predict(model, data_path=tree / "test" / "spot" / "000.png")


def test_limited_batches(model, tree, tmp_path, tiny_backbone):
    """The set is what the trainer will show: the first batches."""
    datamodule = folder(tree, eval_batch_size=2)
    batches = engine(tmp_path, limit_predict_batches=2).predict(model, datamodule=datamodule)
    paths = [path for batch in batches for path in batch.image_path]
    assert len(paths) == 4
    detections = BatchedModel(tiny_backbone, resolution=64, masking="off").score_set(paths)
    assert_scores(scores_of(batches), dict(zip(paths, (d.score for d in detections), strict=True)))


def test_a_dataset_without_paths_is_joined_by_content(tree, tmp_path, expected):
    model = AnomalyDINOBatched(**SETTINGS, visualizer=False)  # anomalib's visualizer wants paths

    class WithoutPaths(PredictDataset):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            item.image_path = None
            return item

    dataset = WithoutPaths(tree / "test")
    loader = DataLoader(dataset, collate_fn=dataset.collate_fn, batch_size=4)
    batches = engine(tmp_path).predict(model, dataloaders=loader)
    scores = torch.cat([batch.pred_score for batch in batches])
    by_order = [expected[str(path)] for path in dataset.image_filenames]
    np.testing.assert_allclose(scores.numpy(), by_order, atol=1e-6)


def test_the_users_pre_processor_applies_to_both_passes(tree, tmp_path, tiny_backbone):
    model = AnomalyDINOBatched(**SETTINGS, pre_processor=PreProcessor(transform=CenterCrop(80)))
    batches = engine(tmp_path).predict(model, datamodule=folder(tree))
    paths = sorted(str(path) for path in (tree / "test").rglob("*.png"))
    cropped = [read_image(path)[8:88, 8:88] for path in paths]
    detections = BatchedModel(tiny_backbone, resolution=64, masking="off").score_set(cropped)
    assert_scores(scores_of(batches), dict(zip(paths, (d.score for d in detections), strict=True)))


def test_features_beyond_the_budget_go_to_disk(tree, tmp_path, expected):
    model = AnomalyDINOBatched(**SETTINGS, memory_budget_gb=0, spill_folder=str(tmp_path))
    assert_scores(scores_of(engine(tmp_path / "results").predict(model, datamodule=folder(tree))), expected)
    assert not list(tmp_path.glob("*.features"))  # gone with the run


def test_thresholds_of_an_earlier_run(tree, tmp_path):
    model = AnomalyDINOBatched(**SETTINGS, image_threshold=0.2, pixel_threshold=0.3)
    raw = scores_of(engine(tmp_path).predict(AnomalyDINOBatched(**SETTINGS), datamodule=folder(tree)))
    batches = engine(tmp_path).predict(model, datamodule=folder(tree))
    for batch in batches:
        for path, score, label in zip(batch.image_path, batch.pred_score, batch.pred_label, strict=True):
            assert float(score) == pytest.approx(raw[path] / (raw[path] + 0.2), rel=1e-5)
            assert bool(label) == (raw[path] > 0.2)
    with pytest.raises(ConfigError, match="expected both"):
        engine(tmp_path).predict(AnomalyDINOBatched(**SETTINGS, image_threshold=0.2), datamodule=folder(tree))


def test_a_test_set_cut_for_validation_is_pointed_out(model, tree, tmp_path, caplog):
    engine(tmp_path).test(model, datamodule=folder(tree, val_split_mode=ValSplitMode.FROM_TEST))
    assert "same_as_test" in caplog.text


def test_several_devices_are_refused(model, tree, tmp_path, monkeypatch):
    host = engine(tmp_path)
    monkeypatch.setattr("lightning.pytorch.Trainer.world_size", 2)
    with pytest.raises(ConfigError, match="devices=1"):
        host.predict(model, datamodule=folder(tree))


def test_musc_mode(tree, tmp_path, tiny_backbone):
    model = AnomalyDINOBatched(**SETTINGS, mode="musc")
    found = scores_of(engine(tmp_path).predict(model, datamodule=folder(tree)))
    paths = sorted(found)
    detections = BatchedModel(tiny_backbone, resolution=64, masking="off", mode="musc").score_set(paths)
    assert_scores(found, dict(zip(paths, (d.score for d in detections), strict=True)))


def test_found_by_name_and_by_class_path():
    assert type(get_model("anomaly_dino_batched", **SETTINGS)) is AnomalyDINOBatched
    register()
    by_path = get_model({"class_path": "anomalydino_plugin.AnomalyDINOBatched", "init_args": SETTINGS})
    assert type(by_path) is AnomalyDINOBatched


@pytest.mark.thorough
@pytest.mark.parametrize("mode", ["official", pytest.param("musc", marks=pytest.mark.slow)])
def test_exported_graph_scores_its_batch(tree, tmp_path, mode):
    import onnxruntime
    import openvino

    model = AnomalyDINOBatched(**{**SETTINGS, "masking": "on"}, mode=mode, share=0.1 if mode == "official" else None)
    path = engine(tmp_path).export(model, "onnx", export_root=tmp_path)
    session = onnxruntime.InferenceSession(path)
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = ["pred_score", "anomaly_map"]
    runtimes = [
        lambda images: session.run(names, {"input": images}),
        lambda images: [compiled({"input": images})[name] for name in names],
    ]
    for count, size in ((2, (96, 96)), (5, (80, 120))):
        images = torch.stack([torch.from_numpy(textured(seed, size)).permute(2, 0, 1) / 255 for seed in range(count)])
        with torch.inference_mode():
            eager = model.eval()(images)
        for run in runtimes:
            scores, maps = run(images.numpy())
            np.testing.assert_allclose(scores, eager.pred_score.numpy(), rtol=1e-3)
            np.testing.assert_allclose(maps, eager.anomaly_map.numpy(), atol=1e-2 * float(eager.anomaly_map.max()))
    for run in runtimes:
        assert np.isnan(run(images[:1].numpy())[0]).all()  # one image alone


def test_export_without_a_fixed_masking_names_the_alternative(tmp_path):
    model = AnomalyDINOBatched(**{**SETTINGS, "masking": "auto"})
    with pytest.raises(ConfigError, match=r"'on' or 'off'.*Engine\.predict"):
        engine(tmp_path).export(model, "onnx", export_root=tmp_path)
