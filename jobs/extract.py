"""``anomalydino extract``: images to patch embeddings, for any number of later runs.

Legend: ``P`` patches, ``D`` features, ``h w`` patch grid.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from rich.console import Console

# The driver and writing tasks import this module: what needs torch is imported where it is used.
from jobs import cluster, dataflow, encoder, tables
from jobs.config import ExtractConfig
from jobs.decode import Decoded, Failure, batches
from jobs.inputs import discover
from jobs.shards import cut_shards, joined_shards, shard_size
from jobs.stage import RunSummary, StageRun
from jobs.store import Store

STAGE = "extract"
_KINDS = ("images", "embeddings")


class Extractor:
    """Encodes images and finds their foreground; knows no Ray.

    Args:
        config: the job.
        weights: resolved weights file, or ``"random"``.
        device: ``"cpu"`` or ``"cuda"``.
    """

    def __init__(self, config: ExtractConfig, weights: str, device: str) -> None:
        from anomalydino_plugin import PatchModel, load_backbone

        self.config = config
        self.batch_size = encoder.batch_size(config, device)
        self.model = PatchModel(
            load_backbone(config.backbone, weights, device=device),
            resolution=config.resolution,
            batch_size=self.batch_size,
            engine=config.engine,
        )

    def process(
        self, category: str, decoded: Sequence[Decoded], failures: Sequence[Failure]
    ) -> tuple[dict[str, pa.Table], dict[str, Any]]:
        """Encode the images of a shard.

        Args:
            category: unused; what they show does not matter here.
            decoded: images ready for the backbone.
            failures: images that got no further than decoding.

        Returns:
            Tables by kind, and what goes into the completion record.
        """
        del category
        started = time.perf_counter()
        extracted: list[tables.Extracted] = []
        failed = list(failures)
        for batch in batches(decoded, self.batch_size):
            features = self.model.encode([item.pixels for item in batch]).cpu().numpy()
            for item, own in zip(batch, features, strict=True):
                self._take_in(item, own, extracted, failed)
        extracted.sort(key=lambda item: item.record.image_id)
        failed.sort(key=lambda failure: failure.record.image_id)
        width = self.model.backbone.embed_dim
        result = {
            "images": tables.extracted_images(extracted, failed),
            "embeddings": tables.embeddings_table(extracted, width, self.config.embedding_dtype),
            "failures": tables.failures_table(failed),
        }
        seconds = round(time.perf_counter() - started, 3)
        counts = {"done": len(extracted), "failed": len(failed), "seconds": seconds}
        return result, {**counts, "fingerprint": self.model.fingerprint(), "morphology": self.config.morphology}

    def _take_in(
        self, item: Decoded, features: NDArray[np.float32], extracted: list[tables.Extracted], failed: list[Failure]
    ) -> None:
        import torch

        from anomalydino_plugin import ImageError, foreground_and_test, foreground_or_all, refuse_unusable

        try:
            refuse_unusable(torch.from_numpy(features))
            tables.refuse_overflow(features, self.config.embedding_dtype)
        except ImageError as error:
            failed.append(Failure(item.record, "encode", "ImageError", f"image {item.record.uri!r}: {error}"))
            return
        foreground, passes = np.ones(item.plan.grid, dtype=bool), None
        if self.config.masking != "off":
            mask, decision = foreground_and_test(features, item.plan.grid, self.config.morphology)
            foreground, passes = foreground_or_all(mask).reshape(item.plan.grid), decision.use_mask
        extracted.append(tables.Extracted(item.record, item.plan, features, foreground, passes))


def run(config: ExtractConfig, console: Console | None = None) -> RunSummary:
    """Encode all images of a configuration.

    Raises:
        AnomalyDINOError: bad input or settings, before work starts; or too many failures (finished shards stay).
    """
    console = console or Console()
    cluster.check_jobs_package()
    images = discover(config.images, categories=config.categories, normal=False).images
    weights, checksum = encoder.find_weights(config, console)
    shape = encoder.encoder_shape(config)
    row_bytes = shape.row_bytes(config.embedding_dtype)
    size = config.shard_size or shard_size(shape.patches, row_bytes)
    store = Store(config.out, STAGE, joined_shards(size, shape.patches, row_bytes))
    identity = config.identity(checksum, [f"{record.image_id} {record.uri}" for record in images])
    store.claim(identity, _KINDS, config.effective())
    stage = StageRun(store, config, console)
    with store.exclusive(), cluster.connect(config.ray_address):
        layout = cluster.cluster_resources(config.num_workers, config.gpus_per_worker, config.threads)
        sizes = (config.resolution, shape.patch_size)
        pipeline = dataflow.Pipeline(Extractor, (config, weights), *sizes, store, layout, config.max_pixels)
        if todo := stage.todo(cut_shards(images, size)):
            stage.follow("extracting", todo, dataflow.run(pipeline, todo), config.max_failures)
        return stage.finish(layout, checksum, len(images), embedding_width=shape.width, patch_size=shape.patch_size)
