"""Which engine runs where; features and scores of each are compared in tests/reference/test_engine_parity.py."""

import copy
import importlib.util

import pytest
import torch

from anomalydino_plugin import ConfigError, FewShotModel, engine_for, load_backbone, reduced_precision
from anomalydino_plugin.engines import choice


class Likeness:
    """As much of a backbone as the choice looks at."""

    def __init__(self, name="dinov2_vits14", sha256="1512", dtype=torch.float32, device="cpu"):
        self.name, self.weights_sha256, self.dinov2 = name, sha256, name.startswith("dinov2")
        self._parameter = torch.empty(1, dtype=dtype, device=device)

    def parameters(self):
        return iter([self._parameter])


needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs openvino")


@needs_openvino
@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        (Likeness(), "openvino"),
        (Likeness(sha256="random:0"), "torch"),
        (Likeness(name="test_vit"), "torch"),
        (Likeness(dtype=torch.float16), "torch"),
        (Likeness(device="meta"), "torch"),
    ],
)
def test_auto(backbone, expected):
    assert engine_for("auto", backbone) == expected


@needs_openvino
def test_auto_leaves_reduced_precision_that_the_host_asks_for_to_torch():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert engine_for("auto", Likeness()) == "torch"


@pytest.mark.parametrize(
    ("name", "backbone", "message"),
    [
        ("tensorrt", Likeness(), "expected one of 'auto', 'torch'"),
        ("openvino", Likeness(name="test_vit"), "DINOv2 backbones, not 'test_vit'"),
        ("openvino_bf16", Likeness(dtype=torch.float16), "float32 backbones on the CPU"),
    ],
)
def test_what_cannot_run_says_why(name, backbone, message):
    with pytest.raises(ConfigError, match=message):
        engine_for(name, backbone)


@needs_openvino
@pytest.mark.parametrize("capable", [True, False])
def test_bfloat16_is_refused_where_openvino_would_take_float32_for_it(monkeypatch, capable):
    monkeypatch.setattr(choice, "rounds_in_openvino", lambda: capable)
    if capable:
        assert engine_for("openvino_bf16", Likeness()) == "openvino_bf16"
    else:
        with pytest.raises(ConfigError, match="the processor has no bfloat16"):
            engine_for("openvino_bf16", Likeness())


@needs_openvino
def test_openvino_says_whether_the_processor_rounds():
    assert isinstance(choice.rounds_in_openvino(), bool)


def test_without_openvino(monkeypatch):
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda _: None)
    assert engine_for("auto", Likeness()) == "torch"
    with pytest.raises(ConfigError, match="openvino is not installed"):
        engine_for("openvino", Likeness())


def test_reduced_features_are_marked_and_others_are_not(tiny_backbone):
    assert "precision" not in FewShotModel(tiny_backbone, resolution=64).fingerprint()
    assert FewShotModel(tiny_backbone, resolution=64, engine="torch_half").fingerprint()["precision"] == "half"
    assert reduced_precision("openvino_bf16") == "bfloat16"


def test_the_engine_follows_the_backbone(tiny_backbone):
    model = FewShotModel(copy.deepcopy(tiny_backbone), resolution=64, engine="torch_half")
    first = model._loaded_engine()
    assert model._loaded_engine() is first
    assert copy.deepcopy(model)._engines == {}
    model.load_state_dict(model.state_dict())
    assert model._loaded_engine() is not first


@needs_openvino
def test_one_traced_graph_serves_every_grid_batch_and_layout_of_tokens():
    from anomalydino_plugin.engines.openvino_engine import OpenVINOEngine

    backbone = load_backbone("dinov2_vits14_reg", "random:1")
    engine = OpenVINOEngine(backbone)
    for shape in ((1, 3, 28, 42), (3, 3, 56, 28)):
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            torch.testing.assert_close(engine(images), backbone(images), rtol=1e-4, atol=1e-4)


@pytest.mark.thorough
@needs_openvino
def test_a_folder_that_cannot_be_written_costs_time_alone(monkeypatch, tmp_path, caplog):
    from anomalydino_plugin.engines import openvino_engine

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ANOMALYDINO_CACHE", str(tmp_path / "file"))
    openvino_engine.OpenVINOEngine(load_backbone("dinov2_vits14_reg", "random:1"))
    assert "could not be kept" in caplog.text
