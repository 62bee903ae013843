"""Export through anomalib: what ONNX Runtime, OpenVINO and the pickled model say equals what the checkpoint says."""

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from generated import TINY, textured

from anomalydino_plugin import AnomalyDINOFewShot, BankError, prepare_image
from anomalydino_plugin.graph.images import plan_sizes, prepare

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("openvino")

SETTINGS = {"backbone": TINY, "weights": "random:0", "resolution": 64}
THRESHOLDS = {"image_threshold": 0.45, "pixel_threshold": 0.42}  # some images above, some below
KINDS = {
    "plain": {"shots": 2, "masking": "off", **THRESHOLDS},
    "masked": {"shots": 1, "masking": "on", "k": 2, "statistic": "mean_top:0.2"},
    "uncalibrated": {"shots": 1, "masking": "off", "rotations": "informed"},
}
F32 = {"INFERENCE_PRECISION_HINT": "f32"}  # without it OpenVINO computes in bfloat16 where the processor can


class Fitted(NamedTuple):
    checkpoint: Path
    model: AnomalyDINOFewShot  # restored from it
    engine: Engine


@pytest.fixture(scope="module")
def fitted(mvtec_tree, tmp_path_factory):
    """Fit through the Engine, restore from its checkpoint; each kind of model once."""
    made: dict[str, Fitted] = {}

    def get(kind: str) -> Fitted:
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            model = AnomalyDINOFewShot(**SETTINGS, **KINDS[kind])
            with torch.no_grad():  # components beyond the foreground threshold, as of trained features
                model.model.backbone.vit.norm.weight.mul_(8)
            engine = Engine(default_root_dir=root, logger=False, accelerator="cpu", enable_progress_bar=False)
            datamodule = Folder(
                name="part",
                root=mvtec_tree / "01",
                normal_dir="train/good",
                normal_test_dir="test/good",
                abnormal_dir="test/spot",
                num_workers=0,
                val_split_mode="none",
            )
            engine.fit(model, datamodule=datamodule)
            checkpoint = Path(engine.trainer.checkpoint_callback.best_model_path)
            restored = AnomalyDINOFewShot.load_from_checkpoint(checkpoint, map_location="cpu").eval()
            made[kind] = Fitted(checkpoint, restored, engine)
        return made[kind]

    return get


@pytest.fixture(scope="module")
def exported(fitted, tmp_path_factory):
    """Export once for each kind, format and input size."""
    made: dict[tuple, Path] = {}

    def get(kind: str, file_format: str, input_size: tuple[int, int] | None = None) -> Path:
        key = (kind, file_format, input_size)
        if key not in made:
            root, (checkpoint, _, engine) = tmp_path_factory.mktemp("export"), fitted(kind)
            overrides = {name: value for name, value in KINDS[kind].items() if name in THRESHOLDS}
            fresh = AnomalyDINOFewShot(**SETTINGS, **overrides)
            made[key] = engine.export(
                fresh, file_format, export_root=root, input_size=input_size, ckpt_path=str(checkpoint)
            )
        return made[key]

    return get


def batch_of(*images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255


def batches(size: tuple[int, int], count: int) -> torch.Tensor:
    """Normal and defective images by turns, none of them a reference."""
    return batch_of(*(textured(100 + number, size, spot=number % 2 == 1) for number in range(count)))


def by_onnxruntime(path: Path, images: torch.Tensor) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    values = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return dict(zip([output.name for output in session.get_outputs()], values, strict=True))


def by_openvino(path: Path, images: torch.Tensor) -> dict[str, np.ndarray]:
    from anomalib.deploy import OpenVINOInferencer

    return arrays_of(OpenVINOInferencer(path, device="CPU", config=F32).predict(images))


def by_torch(path: Path, images: torch.Tensor) -> dict[str, np.ndarray]:
    from anomalib.deploy import TorchInferencer

    with torch.inference_mode():
        return arrays_of(TorchInferencer(path, device="cpu").predict(images))


def arrays_of(prediction) -> dict[str, np.ndarray]:
    names = ("pred_score", "pred_label", "anomaly_map", "pred_mask")
    return {name: np.asarray(getattr(prediction, name)) for name in names if getattr(prediction, name) is not None}


def expect_equal(found: dict[str, np.ndarray], model: AnomalyDINOFewShot, images: torch.Tensor) -> None:
    with torch.inference_mode():
        expected = {name: value.numpy() for name, value in model(images)._asdict().items() if value is not None}
    assert found.keys() == expected.keys()
    count, (height, width) = len(images), images.shape[2:]
    scores, maps = found["pred_score"].reshape(-1), found["anomaly_map"].reshape(count, height, width)
    assert expected["pred_score"].min() > 1e-3  # a comparison of zeros would say nothing
    assert scores == pytest.approx(expected["pred_score"].reshape(-1), rel=1e-3)
    reference = expected["anomaly_map"].reshape(count, height, width)
    assert np.abs(maps - reference).max() <= 1e-2 * np.ptp(reference)
    if "pred_label" in expected:
        assert np.array_equal(found["pred_label"].reshape(-1), expected["pred_label"].reshape(-1))
        sure = np.abs(reference - 0.5) > 1e-2 * np.ptp(reference)
        assert np.array_equal(
            found["pred_mask"].reshape(maps.shape)[sure], expected["pred_mask"].reshape(maps.shape)[sure]
        )


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # OpenVINOInferencer makes a cache folder where it stands
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")  # TorchInferencer unpickles


RUNTIMES = {"onnx": by_onnxruntime, "openvino": by_openvino, "torch": by_torch}
SLOW = pytest.mark.slow  # an export takes half a minute: one of each question is not marked so
ANY_SIZE = [((80, 130), 2), *(pytest.param(*case, marks=SLOW) for case in [((96, 96), 1), ((131, 77), 3)])]


@pytest.mark.thorough
@pytest.mark.parametrize(("size", "count"), ANY_SIZE, ids=str)
@pytest.mark.parametrize("kind", ["masked", pytest.param("plain", marks=SLOW)])
@pytest.mark.parametrize("file_format", ["onnx", *(pytest.param(name, marks=SLOW) for name in ("openvino", "torch"))])
def test_any_size_and_batch(fitted, exported, file_format, kind, size, count):
    path = exported(kind, file_format)
    images = batches(size, count)
    expect_equal(RUNTIMES[file_format](path, images), fitted(kind).model, images)


def test_the_cases_are_not_trivial(fitted):
    """Masks keep part of the patches, and both labels occur."""
    masked = fitted("masked").model.model
    shares = [masked.score(textured(100 + number, (80, 130), spot=True)).foreground.mean() for number in range(4)]
    assert any(0 < share < 1 for share in shares)
    plain = fitted("plain").model
    with torch.inference_mode():
        labels = plain(batches((96, 96), 4)).pred_label
    assert labels.any()
    assert not labels.all()


@SLOW
@pytest.mark.parametrize("file_format", ["onnx", "openvino"])
def test_fixed_size_takes_any_batch(fitted, exported, file_format):
    path = exported("plain", file_format, (96, 96))
    for count in (1, 3):
        images = batches((96, 96), count)
        expect_equal(RUNTIMES[file_format](path, images), fitted("plain").model, images)


class Prepared(torch.nn.Module):
    """What the encoder of an exported model sees."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return prepare(images, plan_sizes(images.shape[2], images.shape[3], 448, 14), 14)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "sizes", [[(1000, 700), (448, 611), (672, 900), (97, 131)], [(300, 400)]], ids=["any", "fixed"]
)
def test_runtimes_resize_as_pillow_does(tmp_path, sizes):
    """Noise, the hardest image to round alike, at any size and at a fixed one: no grey level differs."""
    import openvino

    dynamic = len(sizes) > 1
    axes = {0: "batch_size", 2: "height", 3: "width"} if dynamic else {0: "batch_size"}
    torch.onnx.export(
        Prepared(),
        (torch.zeros(2, 3, *((32, 32) if dynamic else sizes[0])),),
        str(tmp_path / "prepared.onnx"),
        dynamo=True,
        verbose=False,
        input_names=["input"],
        dynamic_shapes=({axis: torch.export.Dim(name) for axis, name in axes.items()},),
    )
    session = onnxruntime.InferenceSession(tmp_path / "prepared.onnx", providers=["CPUExecutionProvider"])
    compiled = openvino.Core().compile_model(tmp_path / "prepared.onnx", "CPU", F32)
    for size in sizes:
        noise = np.random.default_rng(size[0]).integers(0, 256, (*size, 3), dtype=np.uint8)
        images = batch_of(noise).numpy()
        expected = prepare_image(noise, 448, 14).numpy()
        for found in (session.run(None, {"input": images})[0], compiled({"input": images})[0]):
            assert np.abs(found - expected).max() < 1e-3  # a grey level is 0.017


@SLOW
def test_fixed_size_is_fixed(exported):
    path = exported("plain", "onnx", (96, 96))
    with pytest.raises(Exception, match="invalid dimensions"):
        by_onnxruntime(path, batches((80, 130), 1))


@SLOW
@pytest.mark.parametrize("file_format", ["onnx", "torch"])
def test_uncalibrated_model_gives_raw_scores_and_no_labels(fitted, exported, file_format):
    images = batches((96, 96), 2)
    found = RUNTIMES[file_format](exported("uncalibrated", file_format), images)
    assert found.keys() == {"pred_score", "anomaly_map"}
    expect_equal(found, fitted("uncalibrated").model, images)


@SLOW
def test_files_are_read_alike(fitted, exported, mvtec_tree):
    """Inferencers given a path decode and scale by themselves."""
    from anomalib.deploy import OpenVINOInferencer, TorchInferencer

    path = mvtec_tree / "01" / "test" / "spot" / "000.png"
    images = batch_of(textured(20, spot=True))
    openvino = OpenVINOInferencer(exported("plain", "openvino"), device="CPU", config=F32)
    for inferencer in (openvino, TorchInferencer(exported("plain", "torch"), device="cpu")):
        expect_equal(arrays_of(inferencer.predict(path)), fitted("plain").model, images)


@SLOW
def test_methods_of_the_model(fitted, tmp_path):
    model = fitted("plain").model
    images = batches((96, 96), 2)
    expect_equal(by_torch(model.to_torch(tmp_path, "part"), images), model, images)
    path = model.to_onnx(tmp_path, "part", input_size=(96, 96))
    assert path.name == "part.onnx"
    expect_equal(by_onnxruntime(path, images), model, images)


@SLOW
def test_thresholds_given_later_are_exported(fitted, tmp_path):
    model = AnomalyDINOFewShot.load_from_checkpoint(
        fitted("plain").checkpoint, image_threshold=0.01, pixel_threshold=0.02, map_location="cpu"
    ).eval()
    images = batches((96, 96), 2)
    found = by_onnxruntime(model.to_onnx(tmp_path, input_size=(96, 96)), images)
    raw = torch.tensor([model.model.score(textured(100 + n, spot=n == 1)).score for n in range(2)])
    assert found["pred_score"].reshape(-1) == pytest.approx((raw / (raw + 0.01)).numpy(), rel=1e-3)
    expect_equal(found, model, images)


class StoppedError(Exception):
    """Before the slow part."""


@pytest.mark.parametrize("method", ["to_torch", "to_onnx", "to_openvino"])
def test_a_large_bank_is_announced(fitted, tmp_path, monkeypatch, caplog, method):
    def stop(*args, **kwargs):
        raise StoppedError

    model = fitted("plain").model
    monkeypatch.setattr("anomalydino_plugin.host._LARGE_EXPORT_BYTES", 1000)
    monkeypatch.setattr(torch, "save", stop)
    monkeypatch.setattr(torch.onnx, "export", stop)
    with caplog.at_level(logging.WARNING), pytest.raises(StoppedError):
        getattr(model, method)(tmp_path)
    (message,) = [text for text in caplog.messages if "goes into the exported file" in text]
    size = sum(buffer.numel() * buffer.element_size() for buffer in model.model.buffers())
    assert f"{size / 1e9:.1f} GB" in message


def test_a_small_bank_is_not_announced(fitted, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        fitted("plain").model.to_torch(tmp_path)
    assert "exported file" not in caplog.text


@pytest.mark.parametrize("file_format", ["onnx", "openvino", "torch"])
def test_unfitted_model(fitted, tmp_path, file_format):
    with pytest.raises(BankError, match="fit the model"):
        fitted("plain").engine.export(AnomalyDINOFewShot(**SETTINGS), file_format, export_root=tmp_path)


@pytest.mark.thorough
def test_rotary_positions_are_refused(tmp_path):
    model = AnomalyDINOFewShot(**{**SETTINGS, "backbone": "vit_small_patch16_dinov3", "masking": "off"})
    model.model.fit([textured(0)])
    with pytest.raises(Exception) as caught:  # noqa: PT011  # torch wraps it
        model.to_onnx(tmp_path)
    chain, error = [], caught.value
    while error is not None:
        chain.append(str(error))
        error = error.__cause__ or error.__context__
    assert any("vit_small_patch16_dinov3" in text and "export to torch" in text for text in chain)
    assert model.to_torch(tmp_path).exists()
