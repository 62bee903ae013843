"""Patch features with position embeddings that are resampled inside the graph.

Legend: ``B`` images, ``h w`` patch grid, ``P = h * w``, ``D`` features.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from anomalydino_plugin.backbone import POSITION_OFFSET, Backbone
from anomalydino_plugin.errors import ConfigError
from anomalydino_plugin.graph.axes import position_axis, resize_axis


def patch_features(backbone: Backbone, images: Tensor, grid: tuple[int, int]) -> Tensor:
    """As ``Backbone.forward``.

    Args:
        backbone: a DINOv2 or another vision transformer with learned absolute positions.
        images: (B, 3, h * patch_size, w * patch_size) float32.
        grid: (h, w).

    Returns:
        (B, P, D) float32.

    Raises:
        ConfigError: not a plain vision transformer, but one with rotary positions (DINOv3, EVA), a distillation token
            or a convolutional stem.
    """
    vit = cast(Any, backbone.vit)
    _require_known(vit, backbone.name)
    embedding = vit.pos_embed
    prefix_positions = 0 if vit.no_embed_class else backbone.prefix_tokens
    patches = vit.patch_embed.norm(vit.patch_embed.proj(images).flatten(2).transpose(1, 2))
    patches = patches + _positions(embedding[:, prefix_positions:], grid, backbone)
    batch = images.shape[0]
    prefix = [token.expand(batch, -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
    if prefix and prefix_positions:
        prefix = [torch.cat(prefix, dim=1) + embedding[:, :prefix_positions]]
    tokens = torch.cat([*prefix, patches], dim=1)
    return cast(Tensor, vit.norm(vit.blocks(vit.norm_pre(tokens)))[:, backbone.prefix_tokens :])


def _require_known(vit: Any, name: str) -> None:
    """Subclasses and other families add positions, tokens or stems of their own: they would be traced wrongly."""
    from timm.layers import PatchEmbed  # loaded already: it built the backbone
    from timm.models.vision_transformer import VisionTransformer

    if type(vit) is not VisionTransformer or type(vit.patch_embed) is not PatchEmbed or vit.pos_embed is None:
        raise ConfigError(
            f"backbone {name!r} is no plain vision transformer with learned absolute positions: export knows DINOv2 "
            "and plain vision transformers. Use one of them, or export to torch."
        )


def _positions(positions: Tensor, grid: tuple[int, int], backbone: Backbone) -> Tensor:
    """(1, P, D) for the grid; Meta's rule for DINOv2 without registers, antialiased otherwise."""
    vit = cast(Any, backbone.vit)
    trained: tuple[int, int] = vit.patch_embed.grid_size
    square = positions.float().reshape(*trained, -1)
    if backbone.dinov2 and not vit.no_embed_class:
        offset = POSITION_OFFSET * _differs(grid, trained, positions.device)
        axes = [position_axis(side, edge, offset, positions.device) for side, edge in zip(trained, grid, strict=True)]
    else:
        halves = [resize_axis(side, edge, edge, positions.device) for side, edge in zip(trained, grid, strict=True)]
        axes = [coarse + fine for coarse, fine in halves]
    resampled = torch.einsum("hs,std,wt->hwd", axes[0], square, axes[1])
    return resampled.reshape(1, grid[0] * grid[1], positions.shape[2])


def _differs(grid: tuple[int, int], trained: tuple[int, int], device: torch.device) -> Tensor:
    """1.0 or 0.0: the trained grid keeps its positions as they are. A tensor, as the sizes may be symbols."""
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    return ((zero + grid[0] != trained[0]) | (zero + grid[1] != trained[1])).float()
