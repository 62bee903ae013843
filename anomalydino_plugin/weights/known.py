"""Backbones by name, and the checksums of weights we have seen."""

from typing import NamedTuple


class BackboneInfo(NamedTuple):
    """One backbone.

    Attributes:
        timm_name: architecture in timm.
        patch_size: pixels.
        embed_dim: features of a patch.
    """

    timm_name: str
    patch_size: int
    embed_dim: int


_SIZES = {"s": ("small", 384), "b": ("base", 768), "l": ("large", 1024), "g": ("giant", 1536)}

BACKBONES: dict[str, BackboneInfo] = {
    f"dinov2_vit{letter}14{suffix}": BackboneInfo(f"vit_{size}_patch14_{registers}dinov2", 14, width)
    for suffix, registers in (("", ""), ("_reg", "reg4_"))
    for letter, (size, width) in _SIZES.items()
}

# sha256 of a weights file -> what it is.
KNOWN_FILES = {
    "1512310e5646babff12b369e5f5f66d998f35c97a9fdb51296b153284cbe226c": "DINOv2 ViT-S/14 by Meta AI (Apache-2.0)",
}
