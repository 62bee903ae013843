"""Few-shot scores of images: the body of work of ``anomalydino score --images``, knowing no Ray."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from anomalydino_plugin import AnomalyDINOError
from jobs import tables
from jobs.bank_builder import few_shot_model, read_bank, threshold_of
from jobs.config import FitConfig, ScoreConfig, part_of
from jobs.decode import Decoded, Failure, batches
from jobs.store import Store
from jobs.worker import peak_bytes


class Scorer:
    """Encodes and scores; holds one model and the bank in use.

    Args:
        config: the job.
        weights: resolved weights file, or ``"random"``.
        banks: where the banks are.
        device: ``"cpu"`` or ``"cuda"``.
    """

    def __init__(self, config: ScoreConfig, weights: str, banks: Store, device: str) -> None:
        self.config, self.banks = config, banks
        self.model = few_shot_model(part_of(config, FitConfig, images=""), weights, device)
        self._category: str | None = None
        self._threshold: float | None = None

    def process(
        self, category: str, decoded: Sequence[Decoded], failures: Sequence[Failure]
    ) -> tuple[dict[str, pa.Table], dict[str, Any]]:
        """Score the images of a shard.

        Args:
            category: whose bank.
            decoded: images ready for the backbone.
            failures: images that got no further than decoding.

        Returns:
            Tables by kind, and what goes into the completion record.
        """
        started = time.perf_counter()
        self._use(category)
        scored: list[tables.Scored] = []
        failed = list(failures)
        for batch in batches(decoded, self.model.batch_size):
            self._score_batch(batch, scored, failed)
        scored.sort(key=lambda item: item.record.image_id)
        failed.sort(key=lambda failure: failure.record.image_id)
        result = {
            "images": tables.scored_images(scored, failed),
            "scores": tables.scores_table(scored, self._threshold, self.config.statistic, self.model.use_mask),
            "patch_scores": tables.patch_scores_table(scored, tables.bank_source(self.model.bank)),
            "failures": tables.failures_table(failed),
        }
        if self.config.write_embeddings:
            width = self.model.backbone.embed_dim
            result["embeddings"] = tables.scored_embeddings(scored, width, self.config.embedding_dtype)
        seconds = round(time.perf_counter() - started, 3)
        return result, {"done": len(scored), "failed": len(failed), "seconds": seconds, "peak_bytes": peak_bytes()}

    def _use(self, category: str) -> None:
        if category == self._category:
            return
        bank = read_bank(self.banks, category)
        self.model.set_bank(bank)
        self._threshold = threshold_of(bank)
        self._category = category

    def _score_batch(self, batch: Sequence[Decoded], scored: list[tables.Scored], failed: list[Failure]) -> None:
        features = self.model.encode([item.pixels for item in batch])
        for item, own in zip(batch, features, strict=True):
            try:
                detection = self.model.score_features(own, item.plan)
            except AnomalyDINOError as error:
                failed.append(Failure(item.record, "score", type(error).__name__, str(error)))
                continue
            kept = own.float().cpu().numpy().astype(np.float32) if self.config.write_embeddings else None
            scored.append(tables.Scored(item.record, detection, kept))
