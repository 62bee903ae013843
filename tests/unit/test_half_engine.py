"""The float16 engine of a GPU, here on the CPU: Triton's part under its interpreter, in processes of their own."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from anomalydino_plugin import load_backbone
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
        torch.testing.assert_close(found.float(), norm.float()(total), atol=off, rtol=off)
        assert torch.equal(stream, total.to(dtype)), "the sum stays in the stream"
        assert found.dtype == dtype and found.shape == shape
print("compared")
"""


def images(rows, columns, batch=2):
    return torch.randn((batch, 3, 14 * rows, 14 * columns), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg"])
@pytest.mark.parametrize("size", [(3, 5), (4, 2)])
def test_features_are_those_of_the_backbone_rounded(monkeypatch, name, size):
    monkeypatch.setattr(half_gpu, "_add_norm_for", lambda _: half_gpu._add_norm_in_torch)
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
def test_an_autocast_of_the_host_changes_nothing(monkeypatch):
    monkeypatch.setattr(half_gpu, "_add_norm_for", lambda _: half_gpu._add_norm_in_torch)
    engine = half_gpu.HalfEngine(load_backbone("dinov2_vits14", "random:0"))
    expected = engine(images(2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(engine(images(2, 2)), expected)


def test_the_compiled_norm_under_the_interpreter():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout == "compared\n", done.stderr


def test_where_triton_cannot_run_torch_adds_and_normalises(caplog):
    """There is no GPU to launch on for a CPU's tensors."""
    half_gpu._add_norm_for.cache_clear()
    chosen = half_gpu._add_norm_for(torch.device("cpu"))
    half_gpu._add_norm_for.cache_clear()
    assert chosen is half_gpu._add_norm_in_torch
    assert "torch_half is slower" in caplog.text
    norm, stream = nn.LayerNorm(8), torch.randn(2, 8)
    expected = norm(stream + 1)
    assert torch.equal(chosen(stream, torch.ones(2, 8), norm), expected)


def test_a_cpu_and_other_transformers_keep_the_engine_they_had():
    assert isinstance(choice.load_engine("torch_half", load_backbone("dinov2_vits14", "random:0")), choice.TorchEngine)
