"""Mutual scoring of a whole set at once, where it fits into memory.

Legend: ``P`` patches of an image, ``N`` images, ``D`` features, ``n`` lowest distances kept.

Image by image, each pair of images is compared twice, once from either side. Here all images' lowest distances are held
at a time, and each pair is compared once: N P n floats of state for half the products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from anomalydino_plugin.batched.feature_store import cut
from anomalydino_plugin.kernels.rows import Kernel, search_rows
from anomalydino_plugin.mutual import Mode, MutualMatch, RunningLowest, SetBlock, lowest_count, update_each_other

_BLOCK_ROWS = 8192  # of two blocks, 16 MB of maxima are held
Steps = Callable[[Sequence[int]], Iterable[int]]


def set_counts(lengths: Sequence[int], mode: Mode, share: float | None) -> list[int]:
    """How many lowest distances are kept of each image's patches: the others are its references.

    Args:
        lengths: patches of each image, at least two of them.
        mode: see ``lowest_count``.
        share: see there.
    """
    patches = sum(lengths)
    return [lowest_count(mode, len(lengths) - 1, patches - length, share) for length in lengths]


def set_bytes(lengths: Sequence[int], width: int, mode: Mode, share: float | None) -> int:
    """Memory that ``match_set`` takes beside the features: the rows laid out, and the n lowest of every patch."""
    counts = set_counts(lengths, mode, share)
    return sum(4 * length * (2 * width + count) for length, count in zip(lengths, counts, strict=True))


def match_set(
    images: Sequence[Tensor],
    *,
    mode: Mode = "official",
    share: float | None = None,
    kernel: Kernel = "auto",
    steps: Steps = iter,
) -> list[MutualMatch]:
    """Match every image against all others; the same result as image by image.

    Args:
        images: (P, D) float32 each, L2-normalised, at least two, on one device.
        mode: see ``lowest_count``.
        share: see there.
        kernel: see ``search_rows``.
        steps: wraps the sequence of steps, for a progress bar.

    Raises:
        InputError: fewer than two images.
        ConfigError: a setting out of range, or a kernel that cannot run here.
    """
    counts = set_counts([len(image) for image in images], mode, share)
    running = [RunningLowest(image, count, mode) for image, count in zip(images, counts, strict=True)]
    blocks = _blocks(images, running, kernel)
    for number in steps(range(len(blocks))):
        own = blocks[number]
        for place, lowest in enumerate(own.running):
            lowest.update(own.rows, own.rows.lengths, own.first_row, place)
        for other in blocks[:number]:
            update_each_other(other, own)
    return [lowest.result() for lowest in running]


def _blocks(images: Sequence[Tensor], running: Sequence[RunningLowest], kernel: Kernel) -> list[SetBlock]:
    blocks: list[SetBlock] = []
    first_row = 0
    for part in cut([len(image) for image in images], _BLOCK_ROWS):
        own = images[part.start : part.stop]
        rows = search_rows(torch.cat(list(own)), [len(image) for image in own], kernel)
        blocks.append(SetBlock(rows, first_row, list(running[part.start : part.stop])))
        first_row += len(rows.rows)
    return blocks
