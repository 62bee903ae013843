"""The few-shot stage's body of work, knowing no Ray: build banks, score shards."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa

from anomalydino_plugin import (
    AnomalyDINOError,
    BankError,
    FewShotModel,
    Geometry,
    calibrate,
    load_backbone,
    read_image,
)
from jobs import tables
from jobs.config import ScoreConfig
from jobs.extract import Decoded, Failure, batches
from jobs.inputs import ImageRecord
from jobs.store import REFERENCE_SHARD, Store

_CPU_BATCH, _GPU_BATCH = 4, 32


class Scorer:
    """Encodes and scores; holds one model and the bank in use.

    Args:
        config: the job.
        weights: resolved weights file, or ``"random"``.
        device: ``"cpu"`` or ``"cuda"``.
    """

    def __init__(self, config: ScoreConfig, weights: str, device: str) -> None:
        self.config = config
        self.store = Store(config.out)
        self.model = FewShotModel(
            load_backbone(config.backbone, weights, device=device),
            resolution=config.resolution,
            rotations=config.rotations,
            masking=cast(Literal["auto", "on", "off"], config.masking),  # no boolean after __post_init__
            reference_masking=config.reference_masking,
            morphology=config.morphology,
            k=config.k,
            statistic=config.statistic,
            batch_size=config.batch_size or (_CPU_BATCH if device == "cpu" else _GPU_BATCH),
        ).to(device)
        self._category: str | None = None
        self._threshold: float | None = None

    # Banks

    def build_bank(self, category: str, references: Sequence[ImageRecord], held_out: Sequence[str]) -> dict[str, Any]:
        """Build, calibrate and store a category's bank.

        Args:
            category: whose.
            references: normal images for the bank.
            held_out: normal images for the threshold; the references serve where there are none.

        Returns:
            What ``job.json`` says about the bank.

        Raises:
            ImageError, BankError: a reference that cannot be used; nothing is written then.
        """
        started = time.perf_counter()
        self.model.clear()
        plans = [self._add(record) for record in references]
        self.model.freeze()
        summary = {
            "category": category,
            "references": [record.uri for record in references],
            "rows": len(self.model.memory.rows),
            **self._masking_summary(),
            **self._calibrate(held_out),
        }
        self.model.save_bank(self.store.bank_path(category))
        summary["seconds"] = round(time.perf_counter() - started, 3)
        table = tables.references_table([_as_reference(record, category) for record in references], plans)
        self.store.commit(category, REFERENCE_SHARD, {"images": table}, {"bank": summary})
        return summary

    def _add(self, record: ImageRecord) -> Geometry:
        image = read_image(record.uri)
        self.model.add_reference(image, record.image_id)
        return self.model.plan(image)

    def _masking_summary(self) -> dict[str, Any]:
        decision = self.model.masking_decision
        evidence = {} if decision is None else {"masking_test": decision._asdict()}
        return {"masked": self.model.use_mask, **evidence}

    def _calibrate(self, held_out: Sequence[str]) -> dict[str, Any]:
        try:
            calibration = calibrate(self.model, held_out or None, false_alarm=self.config.false_alarm)
        except BankError as error:  # one unrotated reference teaches nothing: scores without a threshold
            return {"threshold": None, "threshold_reason": str(error)}
        return {
            "threshold": calibration.image_threshold,
            "pixel_threshold": calibration.pixel_threshold,
            "threshold_source": calibration.source,
            "threshold_images": calibration.images,
        }

    def _use(self, category: str) -> None:
        if category == self._category:
            return
        self.model.load_bank(self.store.bank_path(category))
        record = json.loads(self.store.record_path(category, REFERENCE_SHARD).read_text())
        self._threshold = record["bank"]["threshold"]
        self._category = category

    # Shards

    def score_shard(
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
            "images": tables.images_table(scored, failed),
            "scores": tables.scores_table(scored, self._threshold, self.config.statistic, self.model.use_mask),
            "patch_scores": tables.patch_scores_table(scored, self.model.bank),
            "failures": tables.failures_table(failed),
        }
        if self.config.write_embeddings:
            width = self.model.backbone.embed_dim
            result["embeddings"] = tables.embeddings_table(scored, width, self.config.embedding_dtype)
        seconds = round(time.perf_counter() - started, 3)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
        record = {"scored": len(scored), "failed": len(failed), "seconds": seconds, "peak_bytes": peak}
        return result, record

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


def _as_reference(record: ImageRecord, category: str) -> ImageRecord:
    return ImageRecord(record.image_id, record.uri, category, "train", record.label, None)
