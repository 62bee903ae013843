"""Mutual scoring of the images of one input batch.

Legend: ``B`` images, ``P`` patches, ``D`` features.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from anomalydino_plugin.mutual import LOWEST_IMAGES, LOWEST_PATCHES, Mode

_OWN = -2.0  # below any cosine similarity


def mutual_distance(rows: Tensor, mode: Mode, share: float | None) -> Tensor:
    """As ``RunningLowest`` over the other images of the batch, (B, P); NaN for a batch of one.

    The graph holds all (B * P)^2 similarities: 268 MB for 8 images of 1024 patches.

    Args:
        rows: (B, P, D) float32, L2-normalised.
        mode: ``"official"`` or ``"musc"``.
        share: see ``mutual.lowest_count``.
    """
    batch, patches, width = rows.shape
    similarity = (rows @ rows.reshape(batch * patches, width).T).reshape(batch, patches, batch, patches)
    image = torch.arange(batch, device=rows.device)
    own = image[:, None, None, None] == image[None, None, :, None]
    similarity = torch.where(own, torch.full_like(similarity, _OWN), similarity)
    if mode == "musc":
        similarity = similarity.amax(dim=3)
        part = Fraction(str(share or LOWEST_IMAGES))
        lowest = (batch - 1) * part.numerator // part.denominator
    else:
        similarity = similarity.flatten(2)
        part = Fraction(str(share or LOWEST_PATCHES))
        lowest = (batch - 1) * patches * part.numerator // part.denominator - 1
    count: Any = torch.sym_max(lowest, 1)
    highest = similarity.topk(count, dim=2).values
    distances = (1.0 - highest).clamp(0.0, 2.0).mean(dim=2)
    alone = torch.ones(batch, device=rows.device).sum() < 2
    return distances.masked_fill(alone, float("nan"))
