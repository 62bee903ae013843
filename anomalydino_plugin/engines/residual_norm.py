"""What stands between two products of a transformer: a branch added to the residual stream, and the norm of the sum.

One pass over the tokens in place of two: on a GPU in float16 it is memory, not arithmetic, that both wait for. Runs
under Triton's interpreter too (``TRITON_INTERPRET=1``), which is how it is tested where there is no GPU.

Legend: ``D`` features.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from anomalydino_plugin.triton_launch import on_device_of

_TOKENS = 4  # of one program


@triton.jit
def _add_norm(  # pragma: no cover - compiled
    stream,
    branch,
    weight,
    bias,
    normed,
    token_count,
    width: tl.constexpr,
    padded_width: tl.constexpr,
    tokens_at_once: tl.constexpr,
    eps: tl.constexpr,
):
    own = tl.program_id(0).to(tl.int64) * tokens_at_once + tl.arange(0, tokens_at_once)
    features = tl.arange(0, padded_width)
    known = features < width
    inside = (own < token_count)[:, None] & known[None, :]
    places = own[:, None] * width + features[None, :]
    total = tl.load(stream + places, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(branch + places, mask=inside, other=0.0).to(tl.float32)
    total = total.to(stream.dtype.element_ty)
    tl.store(stream + places, total, mask=inside)
    total = total.to(tl.float32)  # as rounded: so that a batch for which torch does it differs no more than by its sums
    centred = tl.where(inside, total - (tl.sum(total, axis=1) / width)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
    gain = tl.load(weight + features, mask=known, other=0.0).to(tl.float32)
    shift = tl.load(bias + features, mask=known, other=0.0).to(tl.float32)
    found = centred * scale[:, None] * gain[None, :] + shift[None, :]
    tl.store(normed + places, found.to(normed.dtype.element_ty), mask=inside)


def add_norm(stream: Tensor, branch: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Add a branch to the residual stream, in place, and normalise the sum.

    Args:
        stream: (..., D) of one floating type, contiguous; updated.
        branch: of the same shape and type, contiguous.
        norm: over D.

    Returns:
        The same shape and type.
    """
    width = stream.shape[-1]
    token_count = stream.numel() // width
    normed = torch.empty_like(stream)
    with on_device_of(stream):
        _add_norm[(triton.cdiv(token_count, _TOKENS),)](
            stream,
            branch,
            norm.weight,
            norm.bias,
            normed,
            token_count,
            width=width,
            padded_width=triton.next_power_of_2(width),
            tokens_at_once=_TOKENS,
            eps=norm.eps,
            num_warps=4,
        )
    return normed
