"""Exported models with real DINOv2 weights: the checkpoint, ONNX Runtime, OpenVINO and the pickled model agree."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from anomalydino_plugin import read_image

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("openvino")
pytestmark = (
    pytest.mark.slow
)  # real backbones through three exporters; small ones are in tests/integration/test_export.py


class Case(NamedTuple):
    """One model, exported for one input size; images with the golden stage that has their score, or none."""

    root: str
    defects: str
    masking: str
    input_size: tuple[int, int] | None
    images: dict[str, str | None]


CASES = {
    "screw": Case(
        "mvtec/screw",
        "test/scratch_head",
        "on",
        None,
        {
            "good/000.png": "screw_good_000_448",
            "scratch_head/000.png": "screw_scratch_head_000_448",
            "good/003.png": None,
            "thread_top/011.png": None,
        },
    ),
    "bottle": Case(
        "mvtec/bottle",
        "test/broken_large",
        "off",
        (900, 900),
        {"good/000.png": "bottle_good_000_448", "broken_large/000.png": "bottle_broken_large_000_448"},
    ),
    "cookie": Case("cookie_nonsquare", "test/anomaly", "off", None, {"anomaly/anomaly-1.jpg": "cookie_nonsquare_448"}),
}
IMAGES = [(name, image) for name, case in CASES.items() for image in case.images]
GOLDEN = [(name, image, stage) for name, case in CASES.items() for image, stage in case.images.items() if stage]
RUNTIMES = ("onnxruntime", "openvino", "torch")


class Deployed(NamedTuple):
    """A model restored from its checkpoint, and what was exported from it."""

    model: Any
    runtimes: dict[str, Any]  # name -> callable: (1, 3, H, W) tensor -> dict of arrays


@pytest.fixture(scope="module")
def deployed(assets, weights_file, tmp_path_factory):
    """Fit, restore and export each case once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))  # OpenVINOInferencer makes a cache folder where it stands
        patch.setenv("TRUST_REMOTE_CODE", "1")  # TorchInferencer unpickles
        yield functools.cache(lambda name: _deploy(CASES[name], assets, weights_file, tmp_path_factory.mktemp(name)))


def _deploy(case: Case, assets: Path, weights: Path, root: Path) -> Deployed:
    from anomalib.data import Folder
    from anomalib.deploy import OpenVINOInferencer, TorchInferencer
    from anomalib.engine import Engine

    from anomalydino_plugin import AnomalyDINOFewShot

    engine = Engine(default_root_dir=root, logger=False, accelerator="cpu", enable_progress_bar=False)
    datamodule = Folder(
        name=case.root,
        root=assets / "data" / case.root,
        normal_dir="train/good",
        abnormal_dir=case.defects,
        num_workers=0,
        normal_split_ratio=0.0,  # else a fifth of train/good, drawn by chance, leaves: the golden reference, too
        val_split_mode="none",
    )
    engine.fit(AnomalyDINOFewShot(weights=str(weights), masking=case.masking), datamodule=datamodule)
    checkpoint = engine.trainer.checkpoint_callback.best_model_path
    model = AnomalyDINOFewShot.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    onnx = engine.export(model, "onnx", export_root=root, input_size=case.input_size)
    # one conversion through anomalib; elsewhere OpenVINO reads the ONNX file
    intermediate = engine.export(model, "openvino", export_root=root) if case.masking == "on" else onnx
    session = onnxruntime.InferenceSession(str(onnx), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    openvino = OpenVINOInferencer(intermediate, device="CPU", config={"INFERENCE_PRECISION_HINT": "f32"})
    pickled = TorchInferencer(engine.export(model, "torch", export_root=root), device="cpu")
    runtimes = {
        "onnxruntime": lambda images: dict(zip(names, session.run(None, {"input": images.numpy()}), strict=True)),
        "openvino": lambda images: _arrays(openvino.predict(images)),
        "torch": lambda images: _arrays(torch.inference_mode()(pickled.predict)(images)),
    }
    return Deployed(model, runtimes)


def _arrays(prediction) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(getattr(prediction, name)) for name in ("pred_score", "pred_label", "anomaly_map", "pred_mask")
    }


@pytest.fixture(scope="module")
def results(assets, deployed):
    """Outputs of one way on one image, each computed once; "checkpoint" is the restored model."""

    @functools.cache
    def get(name: str, image: str, way: str) -> dict[str, np.ndarray]:
        pixels = read_image(assets / "data" / CASES[name].root / "test" / image)
        batch = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
        model, runtimes = deployed(name)
        if way != "checkpoint":
            return runtimes[way](batch)
        with torch.inference_mode():
            return {key: value.numpy() for key, value in model(batch)._asdict().items()}

    return get


@pytest.mark.parametrize("way", RUNTIMES)
@pytest.mark.parametrize(("name", "image"), IMAGES)
def test_outputs_equal_the_checkpoints(results, name, image, way):
    expected, found = results(name, image, "checkpoint"), results(name, image, way)
    assert found.keys() == expected.keys()
    assert found["pred_score"].item() == pytest.approx(expected["pred_score"].item(), rel=1e-3)
    assert found["pred_label"].item() == expected["pred_label"].item()
    reference = expected["anomaly_map"].squeeze()
    assert found["anomaly_map"].squeeze().shape == reference.shape
    assert np.abs(found["anomaly_map"].squeeze() - reference).max() <= 1e-2 * np.ptp(reference)
    assert (found["pred_mask"].squeeze() != expected["pred_mask"].squeeze()).mean() <= 1e-3


@pytest.mark.parametrize("way", ["checkpoint", *RUNTIMES])
@pytest.mark.parametrize(("name", "image", "stage"), GOLDEN)
def test_golden_score(results, deployed, assets, name, image, stage, way):
    normalised = results(name, image, way)["pred_score"].item()
    threshold = float(deployed(name).model.post_processor.image_threshold)
    raw = threshold * normalised / (1 - normalised)  # inverse of s / (s + t)
    golden = float(np.load(assets / "golden" / "stages" / f"{stage}.npz")["score"])
    assert raw == pytest.approx(golden, rel=1e-3)


def test_fixed_and_dynamic_sizes_agree(results, deployed, assets, tmp_path):
    """The bottle model again, for any size."""
    path = deployed("bottle").model.to_onnx(tmp_path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    pixels = read_image(assets / "data" / CASES["bottle"].root / "test" / "broken_large/000.png")
    batch = np.stack([pixels, pixels[:, ::-1]]).transpose(0, 3, 1, 2).astype(np.float32) / 255
    score = session.run(["pred_score"], {"input": batch})[0].reshape(-1)
    fixed = results("bottle", "broken_large/000.png", "onnxruntime")["pred_score"].item()
    assert score[0] == pytest.approx(fixed, rel=1e-4)
    assert score[1] != pytest.approx(fixed, rel=1e-4)
