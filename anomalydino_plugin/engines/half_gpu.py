"""DINOv2 in float16 on a GPU.

In a small transformer the products and attention take little more than half of the time (S/14 at 448 on an H200: of
8.0 ms without layer scale, layer norms are 1.3, the patch embedding 0.8 and sums 0.4). Here the layer scale is part of
the weights that come before it, the patch embedding is a product, and what is added to the residual stream is
normalised in the same pass.

Legend: ``B`` images, ``h w`` patch grid, ``P = h * w``, ``D`` features.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalydino_plugin.backbone import Backbone
from anomalydino_plugin.triton_launch import why_it_fails

logger = logging.getLogger(__name__)
_ALIGNED = 8  # float16 values: rows of a matrix that start at multiples of 16 bytes are read fastest
_MANY_TOKENS = 16_384  # of a batch; Triton's launches take longer than torch's, and few tokens do not make up for it
AddNorm = Callable[[Tensor, Tensor, nn.LayerNorm], Tensor]


class HalfEngine:
    """Runs a backbone in float16, from a copy of its parameters.

    Args:
        backbone: DINOv2, on a GPU (elsewhere it works, but slowly).
    """

    def __init__(self, backbone: Backbone) -> None:
        own = _without_layer_scale(backbone)
        embedding = cast(Any, own.vit).patch_embed.proj
        values = embedding.weight.permute(0, 2, 3, 1).flatten(1)
        padding = -values.shape[1] % _ALIGNED
        self._embedding = F.pad(values, (0, padding)).half(), embedding.bias.half()
        self._backbone = own.half()
        self._add_norm = _add_norm_for(embedding.weight.device)

    def __call__(self, images: Tensor) -> Tensor:
        """See ``Engine``; raises as ``Backbone.forward`` does."""
        self._backbone.require_whole_patches(images)
        with torch.autocast(images.device.type, enabled=False):
            features: Tensor = self._tokens(images).float()
            return features

    def _tokens(self, images: Tensor) -> Tensor:
        """(B, P, D) float16."""
        vit, prefix_tokens = cast(Any, self._backbone.vit), self._backbone.prefix_tokens
        rows, columns = (edge // self._backbone.patch_size for edge in images.shape[-2:])
        prefix, positions = self._backbone.positions(rows, columns)
        stream = positions.new_empty((len(images), prefix_tokens + rows * columns, positions.shape[2]))
        stream[:, :prefix_tokens] = prefix
        stream[:, prefix_tokens:] = self._patches(images, rows, columns) + positions
        add_norm = self._add_norm if stream.shape[0] * stream.shape[1] >= _MANY_TOKENS else _add_norm_in_torch
        blocks = list(vit.blocks)
        normed = blocks[0].norm1(stream)
        for block, norm_after in zip(blocks, [*(block.norm1 for block in blocks[1:]), vit.norm], strict=True):
            normed = add_norm(stream, block.attn(normed), block.norm2)
            normed = add_norm(stream, block.mlp(normed), norm_after)
        return cast(Tensor, normed[:, prefix_tokens:])

    def _patches(self, images: Tensor, rows: int, columns: int) -> Tensor:
        """(B, P, D): each patch's values times the weights of the embedding's convolution."""
        batch, size = len(images), self._backbone.patch_size
        weight, bias = self._embedding
        values = weight.new_zeros((batch, rows, columns, weight.shape[1]))
        # Colours last, as pixels come: then what is copied lies together.
        cut = images.permute(0, 2, 3, 1).view(batch, rows, size, columns, size, 3).transpose(2, 3)
        values[..., : size * size * 3].view(batch, rows, columns, size, size, 3).copy_(cut)
        return F.linear(values.view(batch, rows * columns, -1), weight, bias)


def _without_layer_scale(backbone: Backbone) -> Backbone:
    """A copy that computes the same: the scale of a branch is that of its last product's weights."""
    own = copy.deepcopy(backbone)
    for block in cast(Any, own.vit).blocks:
        for scale, product in ((block.ls1, block.attn.proj), (block.ls2, block.mlp.fc2)):
            if isinstance(scale, nn.Identity):
                continue
            product.weight = nn.Parameter(product.weight * scale.gamma[:, None], requires_grad=False)
            product.bias = nn.Parameter(product.bias * scale.gamma, requires_grad=False)
        block.ls1 = block.ls2 = nn.Identity()
    return own


@functools.cache
def _add_norm_for(device: torch.device) -> AddNorm:
    """Triton's where it runs on the device; compiles it, once."""
    if importlib.util.find_spec("triton") is None:
        return _add_norm_in_torch
    from anomalydino_plugin.engines.residual_norm import add_norm  # loads triton

    example, norm = torch.zeros((1, 64), dtype=torch.float16, device=device), nn.LayerNorm(64).half().to(device)
    if reason := why_it_fails(lambda: add_norm(example, example.clone(), norm), device):
        logger.warning("torch_half is slower: Triton cannot run on %s: %s", device, reason)
        return _add_norm_in_torch
    return add_norm


def _add_norm_in_torch(stream: Tensor, branch: Tensor, norm: nn.LayerNorm) -> Tensor:
    return cast(Tensor, norm(stream.add_(branch)))
