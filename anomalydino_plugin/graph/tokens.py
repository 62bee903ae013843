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
        ConfigError: the backbone computes positions in another way (rotary ones, as DINOv3).
    """
    vit = cast(Any, backbone.vit)
    embedding = getattr(vit, "pos_embed", None)
    if embedding is None or not hasattr(vit, "norm_pre"):
        raise ConfigError(
            f"backbone {backbone.name!r} has no learned absolute positions: export knows DINOv2 and plain vision "
            "transformers. Use one of them, or export to torch."
        )
    patches = vit.patch_embed.norm(vit.patch_embed.proj(images).flatten(2).transpose(1, 2))
    prefix_positions = embedding.shape[1] - _trained_patches(embedding.shape[1])
    patches = patches + _positions(embedding[:, prefix_positions:], grid, backbone)
    prefix = [_class_token(vit, embedding, prefix_positions)] if vit.cls_token is not None else []
    if vit.reg_token is not None:
        prefix.append(vit.reg_token)
    batch = images.shape[0]
    tokens = torch.cat([*(token.expand(batch, -1, -1) for token in prefix), patches], dim=1)
    return cast(Tensor, vit.norm(vit.blocks(vit.norm_pre(tokens)))[:, backbone.prefix_tokens :])


def _trained_patches(positions: int) -> int:
    return int(positions**0.5) ** 2


def _class_token(vit: Any, embedding: Tensor, prefix_positions: int) -> Tensor:
    return cast(Tensor, vit.cls_token + embedding[:, :1] if prefix_positions else vit.cls_token)


def _positions(positions: Tensor, grid: tuple[int, int], backbone: Backbone) -> Tensor:
    """(1, P, D) for the grid; Meta's rule for DINOv2 without registers, antialiased otherwise."""
    side = round(positions.shape[1] ** 0.5)
    square = positions.float().reshape(side, side, -1)
    meta = backbone.dinov2 and not cast(Any, backbone.vit).no_embed_class
    rows, columns = (
        position_axis(side, edge, POSITION_OFFSET, positions.device)
        if meta
        else resize_axis(side, edge, edge, positions.device)
        for edge in grid
    )
    resampled = torch.einsum("hs,std,wt->hwd", rows, square, columns)
    return resampled.reshape(1, grid[0] * grid[1], positions.shape[2])
