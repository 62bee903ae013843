"""How fast a worker compares, reads and writes, measured on the set's own first images before matching starts."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import torch

from anomalydino_plugin import MutualMatch, RunningLowest, SearchRows
from jobs.config import MatchConfig
from jobs.embeddings import ImageFeatures
from jobs.match_cost import Rates
from jobs.matcher import CategoryPlan, Matcher
from jobs.parquet import write_tables
from jobs.store import Store

_QUERIES, _SECONDS = 1024, 1.0
_TRIAL = ".state/match/trial.parquet"


def lowest_of_a_block(count: int, blocks: float) -> int:
    """How many of the n lowest a block brings on average, where they come in random order: the b-th brings n / b.

    Args:
        count: n.
        blocks: how many there are.
    """
    whole = max(1, round(blocks))
    return max(1, round(count * sum(1.0 / number for number in range(1, whole + 1)) / whole))


class RateProbe:
    """Measures a worker.

    The first block of a set costs more than later ones, as all of its n lowest are new: the probe, which has one block,
    keeps as many as a block brings on average.

    Args:
        config: of matching.
        store: where results will go.
        copy_images: as for ``Matcher``.
        count: n, lowest distances kept.
        references: patches that will be compared with each query.
        device: ``"cpu"`` or ``"cuda"``.
    """

    work = "measuring the matching rate"

    def __init__(
        self, config: MatchConfig, store: Store, copy_images: bool, count: int, references: int, device: str
    ) -> None:
        self.config, self.store, self.copy_images = config, store, copy_images
        self.count, self.references, self.device = count, references, device

    @torch.inference_mode()
    def run(self, plan: CategoryPlan) -> Rates:
        """Measure on a category: its first images against each other, as matching will compare them."""
        block, seconds = self._read(plan)
        matcher = Matcher(self.config, {}, self.store, self.copy_images, self.device)
        matcher.lay_out(block)  # warms up, and is let go
        self._wait()
        started = time.perf_counter()
        rows = matcher.lay_out(block)
        self._wait()
        seconds += (time.perf_counter() - started) / _bytes(block)
        flop_per_second, matches = self._compare(rows)
        return Rates(flop_per_second, 1 / seconds, self._write(matcher, plan, block[: len(matches)], matches))

    def _read(self, plan: CategoryPlan) -> tuple[list[ImageFeatures], float]:
        """The first images, and seconds for a byte: of the next ones if there are any, as the first read is slow."""
        blocks = plan.embeddings.blocks()
        started = time.perf_counter()
        block = next(blocks)
        first = time.perf_counter()
        following = next(blocks, None)
        if following is None:
            return block, (first - started) / _bytes(block)
        return block, (time.perf_counter() - first) / _bytes(following)

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def _compare(self, block: SearchRows) -> tuple[float, list[MutualMatch]]:
        """FLOP/s, and what the first patches of each image came out at; of fewer images where one takes long."""
        rows, lengths = block.rows, block.lengths
        count = lowest_of_a_block(self.count, self.references / len(rows))
        queries = [image[:_QUERIES] for image in rows.split(lengths)]
        matches: list[MutualMatch] = []
        seconds, patches = 0.0, 0
        for turn, query in enumerate(itertools.cycle(queries)):
            lowest = RunningLowest(query, count, self.config.mode)
            started = time.perf_counter()
            lowest.update(block, lengths, 0)
            self._wait()
            if turn:  # the first one warms up
                seconds, patches = seconds + time.perf_counter() - started, patches + len(query)
            if turn < len(queries):
                matches.append(lowest.result())
            if seconds > _SECONDS:
                break
        return 2.0 * rows.shape[1] * patches * len(rows) / seconds, matches

    def _write(
        self, matcher: Matcher, plan: CategoryPlan, images: Sequence[ImageFeatures], matches: Sequence[MutualMatch]
    ) -> float:
        """Patches a second, written as one shard; where a match is of fewer patches than its image, they repeat."""
        whole = []
        for image, match in zip(images, matches, strict=True):
            repeated = torch.arange(len(image.features), device=self.device) % len(match.rows)
            whole.append(MutualMatch(match.distances[repeated], match.rows[repeated] % self.references))
        for _ in range(2):  # the first one warms up
            started = time.perf_counter()
            for table in matcher.result_tables(plan, images, whole).values():
                with self.store.folder.writing(_TRIAL) as path:
                    write_tables(path, [table])
            seconds = time.perf_counter() - started
        self.store.folder.remove(_TRIAL)
        return sum(len(image.features) for image in images) / seconds


def _bytes(block: Sequence[ImageFeatures]) -> int:
    return sum(image.features.nbytes for image in block)
