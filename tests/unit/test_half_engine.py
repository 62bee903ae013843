"""The float16 engine of a GPU, here on the CPU: Triton's part under its interpreter, in processes of their own."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from triton_interpreter import printed_by

from anomalydino_plugin import ConfigError, load_backbone
from anomalydino_plugin.engines import choice, half_gpu

INTERPRETED = """
import torch
from torch import nn
from anomalydino_plugin.engines.residual_norm import add_norm

torch.manual_seed(0)
norm = nn.LayerNorm(96, eps=1e-6)
nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
for shape in ((3, 7, 96), (1, 96), (2, 4, 96)):
    for dtype, off in ((torch.float32, 1e-5), (torch.float16, 1e-2)):
        stream, branch = 5 * torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        total = stream.float() + branch.float()
        found = add_norm(stream, branch, norm.to(dtype))
        expected = norm.float()(total.to(dtype).float())
        torch.testing.assert_close(found.float(), expected, atol=off, rtol=off)
        assert torch.equal(stream, total.to(dtype)), "the sum stays in the stream"
        assert found.dtype == dtype and found.shape == shape
print("compared")
"""


def images(rows, columns, batch=2):
    return torch.randn((batch, 3, 14 * rows, 14 * columns), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def _in_torch(monkeypatch):
    monkeypatch.setattr(half_gpu, "_add_norm_for", lambda _: half_gpu._add_norm_in_torch)


@torch.inference_mode()
@pytest.mark.usefixtures("_in_torch")
@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg"])
@pytest.mark.parametrize("size", [(3, 5), (4, 2)])
def test_features_are_those_of_the_backbone_rounded(name, size):
    backbone = load_backbone(name, "random:0")
    for block in backbone.vit.blocks:  # as they are trained; 1e-5 as they are drawn would hide every branch
        block.ls1.gamma.fill_(0.3), block.ls2.gamma.fill_(0.7)
    expected = backbone(images(*size))
    found = half_gpu.HalfEngine(backbone)(images(*size))
    assert (found.dtype, found.shape) == (torch.float32, expected.shape)
    assert float((found - expected).norm() / expected.norm()) < 3e-3
    assert torch.equal(backbone(images(*size)), expected), "the backbone itself is left as it was"


@torch.inference_mode()
@pytest.mark.parametrize(("many", "calls"), [(2 * 5, 24), (2 * 5 + 1, 0)])
def test_few_tokens_are_not_worth_a_launch_of_triton(monkeypatch, many, calls):
    done = []

    def counted(*arguments):
        done.append(1)
        return half_gpu._add_norm_in_torch(*arguments)

    monkeypatch.setattr(half_gpu, "_add_norm_for", lambda _: counted)
    monkeypatch.setattr(half_gpu, "_MANY_TOKENS", many)
    half_gpu.HalfEngine(load_backbone("dinov2_vits14", "random:0"))(images(2, 2))  # four patches and a class token each
    assert len(done) == calls


@torch.inference_mode()
@pytest.mark.usefixtures("_in_torch")
def test_an_autocast_of_the_host_changes_nothing():
    engine = half_gpu.HalfEngine(load_backbone("dinov2_vits14", "random:0"))
    expected = engine(images(2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(engine(images(2, 2)), expected)


def test_the_compiled_norm_under_the_interpreter():
    pytest.importorskip("triton")
    assert printed_by(INTERPRETED) == "compared"


@pytest.fixture
def _untried():
    half_gpu._add_norm_for.cache_clear()
    yield
    half_gpu._add_norm_for.cache_clear()


@pytest.mark.usefixtures("_untried")
def test_without_triton_torch_adds_and_normalises(monkeypatch):
    monkeypatch.setattr(half_gpu.importlib.util, "find_spec", lambda name: None)
    assert half_gpu._add_norm_for(torch.device("cpu")) is half_gpu._add_norm_in_torch


@pytest.mark.usefixtures("_untried")
def test_where_triton_cannot_run_torch_adds_and_normalises(monkeypatch, caplog):
    def refuse(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(pytest.importorskip("anomalydino_plugin.engines.residual_norm"), "add_norm", refuse)
    chosen = half_gpu._add_norm_for(torch.device("cpu"))
    assert chosen is half_gpu._add_norm_in_torch
    assert "torch_half is slower: Triton cannot run on cpu: RuntimeError" in caplog.text
    norm, stream = nn.LayerNorm(8), torch.randn(2, 8)
    expected = norm(stream + 1)
    assert torch.equal(chosen(stream, torch.ones(2, 8), norm), expected)


@pytest.mark.parametrize(
    ("name", "device", "dinov2", "kind"),
    [
        ("torch_half", "cuda", True, "HalfEngine"),
        ("torch_half", "cuda", False, "TorchEngine"),
        ("torch_half", "cpu", True, "TorchEngine"),
        ("torch", "cuda", True, "TorchEngine"),
    ],
)
def test_dinov2_in_half_precision_on_a_gpu_and_nothing_else_runs_here(monkeypatch, name, device, dinov2, kind):
    """No GPU is needed to choose."""
    backbone = SimpleNamespace(dinov2=dinov2)
    backbone.parameters = lambda: iter([SimpleNamespace(device=torch.device(device))])
    for module, engine in ((half_gpu, "HalfEngine"), (choice, "TorchEngine")):
        monkeypatch.setattr(module, engine, lambda *_, made=engine, **__: made)
    assert choice.load_engine(name, backbone) == kind


@pytest.mark.usefixtures("_in_torch")
def test_sizes_that_are_no_multiple_of_the_patch():
    with pytest.raises(ConfigError, match="images of 28 x 30 pixels"):
        half_gpu.HalfEngine(load_backbone("dinov2_vits14", "random:0"))(torch.zeros(1, 3, 28, 30))
