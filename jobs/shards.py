"""Shards: the units of work, cut from the sorted images by size alone, and how many of them share a file.

Nothing here depends on what is finished or who works: the same settings give the same shards and files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from jobs.inputs import ImageRecord

FILE_BYTES = 192_000_000  # aimed at; long images make files up to 2.6 times as large before they leave 512 MB
_LARGEST_SHARD = 512  # images; beyond it a killed worker loses too much
_MOST_JOINED = 4096  # shards in a file
_ROW_BYTES = 300  # of an image's row in images, scores or failures, compressed
_PATCH_BYTES = 6  # of a patch's row in patch_scores, compressed: 5.3 measured on bottle
_SMALL = ("images", "scores", "failures")


class Shard(NamedTuple):
    """A unit of work: some images of one category, in order."""

    category: str
    name: str
    records: tuple[ImageRecord, ...]


def cut_shards(images: Sequence[ImageRecord], size: int) -> list[Shard]:
    """Cut images, sorted by category and id, into shards; names are zero-padded and sort in order."""
    shards = []
    for category in sorted({record.category for record in images}):
        own = tuple(record for record in images if record.category == category)
        shards += [
            Shard(category, f"{start // size:06d}", own[start : start + size]) for start in range(0, len(own), size)
        ]
    return shards


def shard_size(patches: int, row_bytes: int) -> int:
    """Images whose embeddings make one file.

    Args:
        patches: of a square image.
        row_bytes: of one embedding.
    """
    return min(_LARGEST_SHARD, max(1, FILE_BYTES // (patches * row_bytes)))


def joined_shards(size: int, patches: int, row_bytes: int) -> dict[str, int]:
    """Shards in one file, by kind of rows; 1 where a shard fills a file by itself.

    Args:
        size: images in a shard.
        patches: of a square image.
        row_bytes: of one embedding.
    """
    weights = dict.fromkeys(_SMALL, _ROW_BYTES)
    weights["patch_scores"] = patches * _PATCH_BYTES
    weights["embeddings"] = patches * row_bytes
    return {
        kind: min(_MOST_JOINED, max(1, math.floor(FILE_BYTES / (size * weight)))) for kind, weight in weights.items()
    }
