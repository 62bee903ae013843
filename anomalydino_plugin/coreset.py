"""Coreset subsampling of a memory bank by anomalib's ``KCenterGreedy``."""

from __future__ import annotations

import torch
from anomalib.models.components import KCenterGreedy

from anomalydino_plugin.bank_editing import keep_rows, rows_of_share
from anomalydino_plugin.memory_bank import MemoryBank


def subsample_coreset(bank: MemoryBank, share: float, seed: int = 0) -> MemoryBank:
    """Rows that cover the bank best, chosen greedily; in their order.

    Args:
        bank: M rows.
        share: of the rows, in (0, 1]; at least one row stays.
        seed: of anomalib's random projection and starting row.

    Raises:
        ConfigError: a share outside (0, 1].
    """
    count = rows_of_share(bank, share)
    if count >= len(bank):
        return bank
    sampler = KCenterGreedy(embedding=bank.rows, sampling_ratio=(count + 0.5) / len(bank))
    sampler.model.random_state = seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        chosen = sampler.select_coreset_idxs()
    return keep_rows(bank, torch.as_tensor(sorted(int(row) for row in chosen), device=bank.rows.device))
