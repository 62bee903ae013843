"""Few-shot scores of stored embeddings, the body of ``anomalydino score --embeddings``: no backbone, no image."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from anomalydino_plugin import MemoryBank, SearchRows, detect, foreground_or_all, search_bank, search_rows
from jobs import tables
from jobs.bank_builder import masks_by, threshold_of
from jobs.config import ScoreConfig
from jobs.embeddings import EmbeddingSet, StoredImage
from jobs.shards import Shard
from jobs.store import Store


class EmbeddingScorer:
    """Scores shards of stored images against banks.

    Args:
        config: the job.
        sources: embeddings and images by category; all are sorted by id.
        bank_of: gives the bank of a category.
        store: where results go.
        device: ``"cpu"`` or ``"cuda"``.
    """

    work = "scoring embeddings"

    def __init__(
        self,
        config: ScoreConfig,
        sources: dict[str, tuple[EmbeddingSet, dict[str, StoredImage]]],
        bank_of: Callable[[str], MemoryBank],
        store: Store,
        device: str,
    ) -> None:
        self.config, self.sources, self.bank_of, self.store, self.device = config, sources, bank_of, store, device
        self._category: str | None = None
        self._bank: MemoryBank | None = None
        self._rows: SearchRows | None = None

    def run(self, shard: Shard) -> dict[str, Any]:
        """Score one shard and write its results."""
        started = time.perf_counter()
        bank, rows = self._bank_of(shard.category)
        use_mask = masks_by(self.config, bank)
        embeddings, images = self.sources[shard.category]
        scored = []
        for found in embeddings.images({record.image_id for record in shard.records}):
            image = images[found.image_id]
            foreground = foreground_or_all(found.foreground) if use_mask else np.ones_like(found.foreground)
            grid = foreground.reshape(image.plan.grid)
            features = torch.tensor(found.features, device=self.device)
            distances, matched = search_bank(features, rows, grid, k=self.config.k)
            scored.append(
                tables.Scored(image.record, detect(distances, matched, grid, image.plan, self.config.statistic))
            )
        result = {
            "scores": tables.scores_table(scored, threshold_of(bank), self.config.statistic, use_mask),
            "patch_scores": tables.patch_scores_table(scored, tables.bank_source(bank)),
        }
        if self.store.location != embeddings.folder.location:
            result["images"] = tables.scored_images(scored, [])
        record = {"done": len(scored), "failed": 0, "seconds": round(time.perf_counter() - started, 3)}
        self.store.commit(shard.category, shard.name, result, record)
        return record

    def _bank_of(self, category: str) -> tuple[MemoryBank, SearchRows]:
        if self._bank is None or self._rows is None or category != self._category:
            self._bank, self._category = self.bank_of(category), category
            self._rows = search_rows(self._bank.rows.to(self.device), kernel=self.config.kernel)
        return self._bank, self._rows
