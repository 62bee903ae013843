"""Patch features of one image against a memory bank, without the model that made either.

Legend: ``P`` patches of the image, ``D`` features, ``M`` bank rows, ``h w`` patch grid.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anomalydino_plugin.kernels.rows import SearchRows
from anomalydino_plugin.matching import BLOCK_ELEMENTS, nearest


@torch.inference_mode()
def search_bank(
    features: Tensor,
    bank_rows: Tensor | SearchRows,
    foreground: NDArray[np.bool_],
    *,
    k: int = 1,
    block_elements: int = BLOCK_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """Patch distances (paper, equations 1 and 2), and what each patch matched.

    Args:
        features: (P, D) float32, not normalised.
        bank_rows: (M, D) float32, L2-normalised, on the same device; ``search_rows`` of them is faster.
        foreground: (h, w) bool; patches outside get distance 0 and row -1.
        k: neighbours averaged.
        block_elements: similarities held at a time.

    Returns:
        (P,) float32 and (P,) int64.
    """
    kept = torch.from_numpy(foreground.reshape(-1)).to(features.device)
    distances = torch.zeros(len(kept), dtype=torch.float32, device=features.device)
    rows = torch.full((len(kept),), -1, device=features.device)
    queries = torch.nn.functional.normalize(features[kept].float(), dim=1)
    match = nearest(queries, bank_rows, k=k, block_elements=block_elements)
    distances[kept] = match.distances.mean(dim=1)
    rows[kept] = match.rows[:, 0]
    return distances, rows
