import copy
import os
import subprocess
import sys

import pytest
import torch
from generated import TINY

from anomalydino_plugin import ConfigError, load_backbone
from anomalydino_plugin import backbone as backbone_module
from anomalydino_plugin.backbone import Backbone, patch_size_of


@pytest.mark.parametrize(
    ("name", "patch_size"),
    [("vit_small_patch16_dinov3", 16), ("vit_small_patch14_reg4_dinov2", 14), ("test_vit.r160_in1k", 16)],
)
def test_any_timm_vision_transformer(name, patch_size):
    backbone = load_backbone(name, "random")
    assert backbone.patch_size == patch_size == patch_size_of(name)
    with torch.inference_mode():
        features = backbone(torch.randn(2, 3, 2 * patch_size, 3 * patch_size))
    assert features.shape == (2, 6, backbone.embed_dim)
    assert torch.isfinite(features).all()


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "no_such_model"])
def test_what_has_no_patch_tokens_is_refused(name):
    with pytest.raises(ConfigError, match=name):
        load_backbone(name, "random")


def test_sizes_that_are_no_multiple_of_the_patch(tiny_backbone):
    with pytest.raises(ConfigError, match="multiples of the patch size 16"):
        tiny_backbone(torch.zeros(1, 3, 40, 48))


def test_untrained_weights_are_seeded():
    first, again, other = (load_backbone("test_vit.r160_in1k", f"random:{seed}") for seed in (1, 1, 2))
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(first(image), again(image))
    assert not torch.equal(first(image), other(image))


@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "vit_small_patch16_dinov3", "vit_small_patch14_reg4_dinov2"])
def test_a_file_brings_every_parameter(name, tmp_path):
    """Of a model that was built without drawing any; what no file holds (rotary positions) is computed."""
    from safetensors.torch import save_file

    drawn = load_backbone(name, "random:3")
    save_file({key: tensor.contiguous() for key, tensor in drawn.vit.state_dict().items()}, tmp_path / "a.safetensors")
    read = load_backbone(name, tmp_path / "a.safetensors")
    images = torch.rand(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    assert torch.equal(read(images), drawn(images))
    buffers = dict(drawn.vit.named_buffers())
    assert all(torch.equal(tensor, buffers[key]) for key, tensor in read.vit.named_buffers())


def test_batches_equal_single_images(tiny_backbone):
    images = torch.randn(3, 3, 64, 64)
    assert torch.allclose(tiny_backbone(images)[1], tiny_backbone(images[1:2])[0], atol=1e-5)


def test_training_mode_changes_nothing(tiny_backbone):
    assert not tiny_backbone.train().training
    assert not any(module.training for module in tiny_backbone.modules())


@pytest.mark.network
def test_works_with_the_other_opencv_build(tmp_path):
    """anomalib's headless build and opencv-python own the same folder; ours must run on either."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(tmp_path),
        "opencv-python",
    ]
    subprocess.run(command, check=True, capture_output=True)
    program = (
        "import cv2, numpy as np, anomalydino_plugin as a\n"
        "turned = a.rotate_image(np.arange(300, dtype=np.uint8).reshape(10, 10, 3), 45)\n"
        "mask = a.foreground_mask(np.linspace(-50, 50, 100), (10, 10))\n"
        "print(cv2.__file__, turned.sum(), mask.sum())"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": path},
        ).stdout.split()
        for path in (str(tmp_path), "")
    ]
    assert str(tmp_path) in outputs[0][0]
    assert str(tmp_path) not in outputs[1][0]
    assert outputs[0][1:] == outputs[1][1:]


def test_untrained_weights_are_drawn_on_one_thread(monkeypatch):
    import timm

    threads, create = [], timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *args, **more: (threads.append(torch.get_num_threads()), create(*args, **more))[1]
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        load_backbone(TINY, "random:0")
        assert threads == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_positions_of_the_last_grids_alone_are_kept(monkeypatch):
    monkeypatch.setattr(backbone_module, "_POSITION_CACHE", 2)
    backbone = load_backbone("dinov2_vits14", "random:0")
    for columns in (1, 2, 3):
        backbone.positions(1, columns)
    assert [key[:2] for key in backbone._positions] == [(1, 2), (1, 3)]


def test_patches_that_are_not_square_are_refused(tiny_backbone):
    vit = copy.deepcopy(tiny_backbone.vit)
    vit.patch_embed.patch_size = (16, 8)
    with pytest.raises(ConfigError, match=r"patches of \(16, 8\) pixels: expected square ones"):
        Backbone(vit, name="oblong", weights_sha256="random:0", dinov2=False)
