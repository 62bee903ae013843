"""Mutual scoring of a whole set at once, where it fits into memory.

Legend: ``P`` patches of an image, ``N`` images, ``D`` features, ``n`` lowest distances kept.

Image by image, each pair of images is compared twice, once from either side. Here all images' lowest distances are held
at a time, and each pair is compared once: N P n floats of state for half the products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from anomalydino_plugin.batched.feature_store import BLOCK_ROWS, Block, cut
from anomalydino_plugin.kernels.rows import Kernel, search_rows
from anomalydino_plugin.mutual import Mode, MutualMatch, RunningLowest, SetBlock, lowest_count, update_each_other

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
    """Memory that ``match_blocks`` takes beside them: the rows laid out, and the n lowest of every patch."""
    counts = set_counts(lengths, mode, share)
    return sum(4 * length * (width + count) for length, count in zip(lengths, counts, strict=True))


def match_set(
    images: Sequence[Tensor] | Tensor,
    *,
    mode: Mode = "official",
    share: float | None = None,
    kernel: Kernel = "auto",
    steps: Steps = iter,
) -> list[MutualMatch]:
    """Match every image against all others; the same result as image by image.

    Args:
        images: (P, D) float32 each, L2-normalised, at least two, on one device. They are copied; one (N, P, D) tensor
            of them is not.
        mode: see ``lowest_count``.
        share: see there.
        kernel: see ``search_rows``.
        steps: wraps the sequence of steps, for a progress bar.

    Raises:
        InputError: fewer than two images.
        ConfigError: a setting out of range, or a kernel that cannot run here.
    """
    return match_blocks(list(_joined(images)), mode, share, kernel, steps)


def match_blocks(
    blocks: Sequence[Block], mode: Mode, share: float | None, kernel: Kernel, steps: Steps
) -> list[MutualMatch]:
    """``match_set`` for images that lie one after the other already, in blocks of ``BLOCK_ROWS`` at most."""
    lengths = [length for block in blocks for length in block.lengths]
    counts = set_counts(lengths, mode, share)
    done: list[SetBlock] = []
    first_row = 0
    for number in steps(range(len(blocks))):
        block = blocks[number]
        wanted = counts[block.first : block.first + len(block.lengths)]
        queries = torch.split(block.rows, block.lengths)
        running = [RunningLowest(own, count, mode) for own, count in zip(queries, wanted, strict=True)]
        added = SetBlock(search_rows(block.rows, block.lengths, kernel), first_row, running)
        for place, lowest in enumerate(running):
            lowest.update(added.rows, added.rows.lengths, first_row, place)
        for other in done:
            update_each_other(other, added)
        done.append(added)
        first_row += len(block.rows)
    # Each is let go with its n lowest distances, in whose place the next one's are sorted.
    return [block.running.pop(0).result() for block in done for _ in block.rows.lengths]


def _joined(images: Sequence[Tensor] | Tensor) -> Iterator[Block]:
    for part in cut([len(image) for image in images], BLOCK_ROWS):
        own = images[part.start : part.stop]
        rows = own.flatten(0, 1) if isinstance(own, Tensor) else torch.cat(list(own))
        yield Block(part.start, [len(image) for image in own], rows)
