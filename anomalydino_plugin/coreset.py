"""Coreset subsampling of a memory bank by anomalib's ``KCenterGreedy``."""

from __future__ import annotations

import numpy as np
import torch
from anomalib.models.components import KCenterGreedy

from anomalydino_plugin.bank_editing import keep_rows, rows_of_share
from anomalydino_plugin.memory_bank import MemoryBank


class _InPlace(KCenterGreedy):  # type: ignore[misc]  # anomalib has no types here
    """anomalib's selection with one buffer for the differences.

    A new one for each centre leaves holes in the heap that the centres' small tensors keep apart: 24 GB were held for
    24,576 rows.
    """

    min_distances: torch.Tensor | None

    def select_coreset_idxs(self) -> list[int]:
        self._differences: torch.Tensor | None = None
        chosen: list[int] = super().select_coreset_idxs()
        return chosen

    def update_distances(self, cluster_center: int | torch.Tensor | None) -> None:
        if cluster_center is None:
            return
        if self._differences is None:
            self._differences = torch.empty_like(self.features)
        torch.sub(self.features, self.features[cluster_center].squeeze(), out=self._differences)
        distances = torch.linalg.vector_norm(self._differences, dim=1, keepdim=True)
        if self.min_distances is None:
            self.min_distances = distances
        else:
            torch.minimum(self.min_distances, distances, out=self.min_distances)


def subsample_coreset(bank: MemoryBank, share: float, seed: int = 0) -> MemoryBank:
    """Rows that cover the bank best, chosen greedily; in their order.

    Args:
        bank: M rows.
        share: of the rows, in (0, 1]; at least one row stays, and fewer than the share where rows repeat.
        seed: of anomalib's random projection and starting row.

    Raises:
        ConfigError: a share outside (0, 1].
    """
    count = rows_of_share(bank, share)
    if count >= len(bank):
        return bank
    sampler = _InPlace(embedding=bank.rows, sampling_ratio=(count + 0.5) / len(bank))
    # A generator, not the number: the number would start every row of the projection at the same few features.
    sampler.model.random_state = np.random.RandomState(seed)
    with torch.random.fork_rng(devices=[bank.rows.device] if bank.rows.is_cuda else []):
        torch.manual_seed(seed)
        chosen = {int(row) for row in sampler.select_coreset_idxs()}
    return keep_rows(bank, torch.as_tensor(sorted(chosen), device=bank.rows.device))
