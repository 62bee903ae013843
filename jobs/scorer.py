"""Few-shot scores of images: the body of work of ``anomalydino score --images``, knowing no Ray."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from anomalydino_plugin import (
    Detection,
    Geometry,
    ImageError,
    MemoryBank,
    PatchModel,
    SearchRows,
    detect,
    foreground_or_all,
    load_backbone,
    patch_foreground,
    refuse_unusable,
    search_bank,
    search_rows,
)
from jobs import encoder, tables
from jobs.bank_builder import masks_by, read_bank, threshold_of
from jobs.config import ScoreConfig
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
        self.model = PatchModel(
            load_backbone(config.backbone, weights, device=device),
            resolution=config.resolution,
            batch_size=encoder.batch_size(config, device),
            engine=config.engine,
        )
        self._category: str | None = None
        self._bank: MemoryBank | None = None
        self._rows: SearchRows | None = None

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
        bank, rows = self._bank_of(category)
        use_mask = masks_by(self.config, bank)
        scored: list[tables.Scored] = []
        failed = list(failures)
        for batch in batches(decoded, self.model.batch_size):
            self._score_batch(batch, rows, use_mask, scored, failed)
        scored.sort(key=lambda item: item.record.image_id)
        failed.sort(key=lambda failure: failure.record.image_id)
        result = {
            "images": tables.scored_images(scored, failed),
            "scores": tables.scores_table(scored, threshold_of(bank), self.config.statistic, use_mask),
            "patch_scores": tables.patch_scores_table(scored, tables.bank_source(bank)),
            "failures": tables.failures_table(failed),
        }
        if self.config.write_embeddings:
            width = self.model.backbone.embed_dim
            result["embeddings"] = tables.scored_embeddings(scored, width, self.config.embedding_dtype)
        seconds = round(time.perf_counter() - started, 3)
        return result, {"done": len(scored), "failed": len(failed), "seconds": seconds, "peak_bytes": peak_bytes()}

    def _bank_of(self, category: str) -> tuple[MemoryBank, SearchRows]:
        if self._bank is None or self._rows is None or category != self._category:
            self._bank, self._category = read_bank(self.banks, category), category
            rows = self._bank.rows.to(next(self.model.parameters()).device)
            self._rows = search_rows(rows, kernel=self.config.kernel)
        return self._bank, self._rows

    def _score_batch(
        self,
        batch: Sequence[Decoded],
        rows: SearchRows,
        use_mask: bool,
        scored: list[tables.Scored],
        failed: list[Failure],
    ) -> None:
        features = self.model.encode([item.pixels for item in batch])
        for item, own in zip(batch, features, strict=True):
            kept = own.float().cpu().numpy().astype(np.float32) if self.config.write_embeddings else None
            try:
                refuse_unusable(own)
                if kept is not None:
                    tables.refuse_overflow(kept, self.config.embedding_dtype)
            except ImageError as error:
                message = f"image {item.record.uri!r}: {error}"
                failed.append(Failure(item.record, "score", type(error).__name__, message))
                continue
            detection = self._detect(own, rows, item.plan, use_mask)
            scored.append(tables.Scored(item.record, detection, kept))

    def _detect(self, features: Tensor, bank: SearchRows, plan: Geometry, use_mask: bool) -> Detection:
        foreground = np.ones(plan.grid, dtype=bool)
        if use_mask:
            own = features.float().cpu().numpy()
            found = patch_foreground(own, plan.grid, self.config.morphology)
            foreground = foreground_or_all(found).reshape(plan.grid)
        distances, rows = search_bank(features, bank, foreground, k=self.config.k)
        return detect(distances, rows, foreground, plan, self.config.statistic)
