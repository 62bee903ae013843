"""Batched zero-shot scores of stored embeddings: the body of work of ``anomalydino match``, knowing no Ray.

Legend: ``P`` patches of an image, ``D`` features, ``n`` lowest distances kept, ``R`` patches of a block.

A query shard's features are in memory; the other images stream past, a row group at a time. Of each only the n lowest
distances of every query patch are kept. n grows with the set, so the shard is gone through in rounds of as many query
patches as the budget holds: memory follows from the configuration, whatever the number of images.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from anomalydino_plugin import (
    MutualMatch,
    RunningLowest,
    SearchRows,
    block_rows,
    detect,
    foreground_or_all,
    lowest_count,
    search_rows,
)
from jobs import tables
from jobs.config import MatchConfig
from jobs.embeddings import EmbeddingSet, ImageFeatures, StoredImage
from jobs.filesystem import checksum
from jobs.parquet import write_tables
from jobs.shards import Shard
from jobs.store import Store, folder_name
from jobs.worker import peak_bytes

_STATE_SHARE = 0.25  # of the budget: the n lowest distances of a round; joining them with a block's needs as much again
_STATE_BYTES = 3 * 4  # of one kept distance: itself, and its copies while a block is joined
_FEATURE_SHARE = 0.2  # of the budget: a query shard's features
_BLOCK_SHARE = 0.25  # of the budget: reference patches compared at a time
_BLOCK_COPIES = 3  # as read, normalised, and laid out for the kernel


class CategoryPlan(NamedTuple):
    """What is compared in one category.

    Attributes:
        embeddings: of all its images.
        images: all of them, sorted by id.
        references: ids of those that images are compared with; ``None`` for all.
        use_mask: whether foreground masks hide query patches.
        sampled: embeddings of the references alone, where they are a choice.
    """

    embeddings: EmbeddingSet
    images: list[StoredImage]
    references: frozenset[str] | None
    use_mask: bool
    sampled: EmbeddingSet | None = None

    def reference_images(self) -> list[StoredImage]:
        """Images that others are compared with."""
        if self.references is None:
            return self.images
        return [image for image in self.images if image.record.image_id in self.references]


class Sampler:
    """Copies the chosen references of a category into one file, so that each round reads them alone.

    Args:
        store: where it goes, hidden.
        device: unused.
    """

    work = "copying sampled references"

    def __init__(self, store: Store, device: str) -> None:
        del device
        self.store = store

    def run(self, item: tuple[str, CategoryPlan]) -> EmbeddingSet:
        """Copy one category's references, and index the copy."""
        category, plan = item
        name = sampled_name(category)
        with self.store.folder.writing(name) as path:
            write_tables(path, plan.embeddings.tables(plan.references or ()))
            size = checksum(path).size
        return EmbeddingSet.of_files(self.store.folder, [name], size)


def sampled_name(category: str) -> str:
    """Name of the copy below OUT."""
    return f".state/match/sampled/{folder_name(category)}.parquet"


def patches_of(image: StoredImage) -> int:
    """P."""
    return image.plan.grid[0] * image.plan.grid[1]


def query_images(config: MatchConfig, patches: int, width: int) -> int:
    """Images of a query shard: what the budget holds, at most 64 so that a lost worker loses little."""
    budget = config.memory_per_worker * 1e9 * _FEATURE_SHARE
    return max(1, min(64, int(budget / (patches * width * 4))))


def round_rows(config: MatchConfig, count: int) -> int:
    """Query patches of a round: what the budget holds of their ``count`` lowest distances."""
    return max(1, int(config.memory_per_worker * 1e9 * _STATE_SHARE / (count * _STATE_BYTES)))


def reference_rows(config: MatchConfig, width: int, device: str) -> int:
    """Reference patches compared at a time: as many as the kernel likes and the budget holds."""
    budget = config.memory_per_worker * 1e9 * _BLOCK_SHARE
    return max(1, min(block_rows(config.kernel, device, width), int(budget / (width * 4 * _BLOCK_COPIES))))


def passes(config: MatchConfig, queries: int, count: int) -> int:
    """How often all references are read for so many query patches, at least."""
    return -(-queries // round_rows(config, count))


class Matcher:
    """Scores query shards.

    Args:
        config: the job.
        plans: by category.
        store: where results go.
        copy_images: whether ``images`` rows are written too, as the embeddings lie elsewhere.
        device: ``"cpu"`` or ``"cuda"``.
    """

    work = "matching"

    def __init__(
        self, config: MatchConfig, plans: dict[str, CategoryPlan], store: Store, copy_images: bool, device: str
    ) -> None:
        self.config, self.plans, self.store = config, plans, store
        self.copy_images, self.device = copy_images, device
        self.ready = time.time()

    @torch.inference_mode()
    def run(self, shard: Shard) -> dict[str, Any]:
        """Score one shard and write its results."""
        started = time.perf_counter()
        plan = self.plans[shard.category]
        queries = list(plan.embeddings.images({record.image_id for record in shard.records}))
        result = self.result_tables(plan, queries, self._match(plan, queries))
        seconds = round(time.perf_counter() - started, 3)
        record = {
            "done": len(queries),
            "failed": 0,
            "seconds": seconds,
            "peak_bytes": peak_bytes(),
            "worker_ready": round(self.ready, 3),
        }
        self.store.commit(shard.category, shard.name, result, record)
        return record

    def result_tables(
        self, plan: CategoryPlan, queries: Sequence[ImageFeatures], matches: Sequence[MutualMatch]
    ) -> dict[str, pa.Table]:
        """What is written of matched images, by kind.

        Args:
            plan: of their category.
            queries: images.
            matches: of all patches of each, in the same order.
        """
        images = {image.record.image_id: image for image in plan.images}
        scored = [
            self._scored(images[query.image_id], query, match, plan.use_mask)
            for query, match in zip(queries, matches, strict=True)
        ]
        result = {
            "scores": tables.scores_table(scored, None, self.config.statistic, plan.use_mask, self.config.mode),
            "patch_scores": tables.patch_scores_table(scored, match_source(plan.reference_images())),
        }
        if self.copy_images:
            result["images"] = tables.scored_images(scored, [])
        return result

    def _scored(self, image: StoredImage, query: ImageFeatures, match: MutualMatch, use_mask: bool) -> tables.Scored:
        foreground = foreground_or_all(query.foreground) if use_mask else np.ones_like(query.foreground)
        kept = torch.from_numpy(foreground)
        distances, rows = match.distances.cpu() * kept, match.rows.cpu().masked_fill(~kept, -1)
        grid = foreground.reshape(image.plan.grid)
        return tables.Scored(image.record, detect(distances, rows, grid, image.plan, self.config.statistic))

    def _match(self, plan: CategoryPlan, queries: Sequence[ImageFeatures]) -> list[MutualMatch]:
        counts = self._counts(plan, queries)
        pieces = [piece for query in queries for piece in self._pieces(query, counts[query.image_id])]
        done: list[MutualMatch] = []
        for round_ in self._rounds(pieces, counts):
            done += self._one_round(plan, round_, counts)
        joined: dict[str, list[MutualMatch]] = {}
        for piece, match in zip(pieces, done, strict=True):
            joined.setdefault(piece.image_id, []).append(match)
        return [MutualMatch(*map(torch.cat, zip(*joined[query.image_id], strict=True))) for query in queries]

    def _counts(self, plan: CategoryPlan, queries: Sequence[ImageFeatures]) -> dict[str, int]:
        """N of each query image: its own patches are no references."""
        references = {image.record.image_id: patches_of(image) for image in plan.reference_images()}
        images, patches = len(references), sum(references.values())
        return {
            query.image_id: lowest_count(
                self.config.mode,
                images - (query.image_id in references),
                patches - references.get(query.image_id, 0),
                self.config.share,
            )
            for query in queries
        }

    def _pieces(self, query: ImageFeatures, count: int) -> Iterator[ImageFeatures]:
        """A query image, cut where even one does not fit a round."""
        rows = round_rows(self.config, count)
        for start in range(0, len(query.features), rows):
            part = slice(start, start + rows)
            yield ImageFeatures(query.image_id, query.features[part], query.foreground[part])

    def _rounds(self, pieces: Sequence[ImageFeatures], counts: dict[str, int]) -> Iterator[list[ImageFeatures]]:
        round_: list[ImageFeatures] = []
        for piece in pieces:
            rows = sum(len(other.features) for other in round_) + len(piece.features)
            if round_ and rows > round_rows(self.config, max(counts[other.image_id] for other in [*round_, piece])):
                yield round_
                round_ = []
            round_.append(piece)
        if round_:
            yield round_

    def _one_round(
        self, plan: CategoryPlan, pieces: Sequence[ImageFeatures], counts: dict[str, int]
    ) -> list[MutualMatch]:
        queries = self._rows(pieces).split([len(piece.features) for piece in pieces])
        running = [
            (piece.image_id, RunningLowest(rows, counts[piece.image_id], self.config.mode))
            for piece, rows in zip(pieces, queries, strict=True)
        ]
        first_row = 0
        for block in self._blocks(plan):
            rows = self.lay_out(block)
            places = {image.image_id: place for place, image in enumerate(block)}
            for own, lowest in running:
                lowest.update(rows, rows.lengths, first_row, places.get(own))
            first_row += len(rows.rows)
            del rows  # before the next block is laid out beside it
        return [lowest.result() for _, lowest in running]

    def _blocks(self, plan: CategoryPlan) -> Iterator[list[ImageFeatures]]:
        """Reference images, ``reference_rows`` patches at a time, whatever the row groups of the files."""
        block: list[ImageFeatures] = []
        most = 0
        for group in (plan.sampled or plan.embeddings).blocks():
            for image in group:
                most = most or reference_rows(self.config, image.features.shape[1], self.device)
                if block and sum(len(other.features) for other in block) + len(image.features) > most:
                    yield block
                    block = []
                block.append(image)
        if block:
            yield block

    def lay_out(self, images: Sequence[ImageFeatures]) -> SearchRows:
        """Reference images as the kernel wants them."""
        return search_rows(self._rows(images), [len(image.features) for image in images], self.config.kernel)

    def _rows(self, images: Sequence[ImageFeatures]) -> Tensor:
        """(R, D) float32 of some images, L2-normalised: all at once, as a thread is waited for in every step."""
        rows = torch.from_numpy(np.concatenate([image.features for image in images])).to(self.device)
        return torch.nn.functional.normalize(rows, dim=1, out=rows)


def match_source(images: Sequence[StoredImage]) -> tables.MatchSource:
    """Numbers of patches, counted over reference images sorted by id -> image and place."""
    starts = np.cumsum([0, *map(patches_of, images)][:-1])
    columns = np.array([image.plan.grid[1] for image in images], np.int64)

    def sources(rows: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
        index = np.searchsorted(starts, rows, side="right") - 1
        inside = rows - starts[index]
        return np.stack([index, np.zeros_like(index), inside // columns[index], inside % columns[index]], axis=1)

    return tables.MatchSource([image.record.image_id for image in images], sources, [0.0])
