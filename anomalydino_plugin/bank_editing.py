"""Change a memory bank without encoding an image again: merge, drop, subsample; and what one will weigh.

Legend: ``M`` rows, ``D`` features.

A bank remembers its images in the order they came; merging and dropping keep that order, so that the result equals a
bank built from scratch row for row.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anomalydino_plugin.errors import BankError, ConfigError
from anomalydino_plugin.memory_bank import MemoryBank, check_fingerprint

_BYTES_PER_ROW_EXTRA = 4 * 4 + 1  # provenance and foreground flag


def merge_banks(banks: Sequence[MemoryBank]) -> MemoryBank:
    """One bank with the images of all, in order, on the device of the first.

    Args:
        banks: at least one, made with the same settings.

    Raises:
        BankError: none given, settings that differ, or an image in two of them.
    """
    if not banks:
        raise BankError("no bank to merge: expected at least one.")
    first = banks[0]
    for bank in banks[1:]:
        check_fingerprint(bank.fingerprint, first.fingerprint, "to merge")
    image_ids = [image_id for bank in banks for image_id in bank.image_ids]
    doubled = sorted({image_id for image_id in image_ids if image_ids.count(image_id) > 1})
    if doubled:
        raise BankError(f"reference images in more than one bank: {doubled[:3]}. Drop them from one of the banks.")
    angles = tuple(dict.fromkeys(angle for bank in banks for angle in bank.angles))
    sources, offset, device = [], 0, first.rows.device
    for bank in banks:
        moved = bank.sources.to(device, copy=True)
        moved[:, 0] += offset
        known = torch.tensor([angles.index(angle) for angle in bank.angles], dtype=moved.dtype, device=device)
        moved[:, 1] = known[moved[:, 1].long()]
        sources.append(moved)
        offset += len(bank.image_ids)
    return dataclasses.replace(
        first,
        rows=torch.cat([bank.rows.to(device) for bank in banks]),
        sources=torch.cat(sources),
        foreground=torch.cat([bank.foreground.to(device) for bank in banks]),
        image_ids=tuple(image_ids),
        angles=angles,
        sizes=tuple(size for bank in banks for size in bank.sizes),
        notes=_merged_notes(banks),
    )


def _merged_notes(banks: Sequence[MemoryBank]) -> dict[str, str]:
    """Notes that are JSON objects by image are joined; of others the first bank's stays."""
    notes = dict(banks[0].notes)
    for bank in banks[1:]:
        for name, text in bank.notes.items():
            known, more = _by_image(notes.setdefault(name, text)), _by_image(text)
            if known is not None and more is not None:
                notes[name] = json.dumps({**known, **more})
    return notes


def _by_image(note: str) -> dict[str, Any] | None:
    """A note that is a JSON object; ``None`` for any other text."""
    try:
        content = json.loads(note)
    except json.JSONDecodeError:
        return None
    return content if isinstance(content, dict) else None


def drop_images(bank: MemoryBank, image_ids: Iterable[str]) -> MemoryBank:
    """The bank without some of its images.

    Args:
        bank: with these images and others.
        image_ids: which; a lone string is one id.

    Raises:
        BankError: an image that is not in the bank, or nothing would be left.
    """
    dropped = {image_ids} if isinstance(image_ids, str) else set(image_ids)
    unknown = sorted(dropped - set(bank.image_ids))
    if unknown:
        raise BankError(
            f"not in the bank: {unknown[:3]}. It holds {len(bank.image_ids)}: {list(bank.image_ids[:3])}..."
        )
    kept = [index for index, image_id in enumerate(bank.image_ids) if image_id not in dropped]
    if not kept:
        raise BankError(f"dropping {len(dropped)} image(s) would empty the bank: expected at least one to stay.")
    new_index = torch.full((len(bank.image_ids),), -1, dtype=torch.int32)
    new_index[kept] = torch.arange(len(kept), dtype=torch.int32)
    image = new_index[bank.sources[:, 0].cpu().long()].to(bank.sources.device)
    rows = keep_rows(bank, image >= 0)
    sources = rows.sources.clone()
    sources[:, 0] = image[image >= 0]
    return dataclasses.replace(
        rows,
        sources=sources,
        image_ids=tuple(bank.image_ids[index] for index in kept),
        sizes=tuple(bank.sizes[index] for index in kept),
        notes={name: _without(text, dropped) for name, text in bank.notes.items()},
    )


def _without(note: str, dropped: set[str]) -> str:
    content = _by_image(note)
    if content is None:
        return note
    return json.dumps({name: value for name, value in content.items() if name not in dropped})


def keep_rows(bank: MemoryBank, rows: Tensor) -> MemoryBank:
    """The bank with the rows of a mask or an index; every image stays known."""
    return dataclasses.replace(bank, rows=bank.rows[rows], sources=bank.sources[rows], foreground=bank.foreground[rows])


def subsample_randomly(bank: MemoryBank, share: float, seed: int = 0) -> MemoryBank:
    """A random share of the rows, in their order: the baseline for any cleverer choice.

    Args:
        bank: M rows.
        share: of the rows, in (0, 1]; at least one row stays.
        seed: of the choice.

    Raises:
        ConfigError: a share outside (0, 1].
    """
    count = rows_of_share(bank, share)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(bank), generator=generator)[:count].sort().values
    return keep_rows(bank, chosen.to(bank.rows.device))


def rows_of_share(bank: MemoryBank, share: float) -> int:
    """How many rows a share is.

    Raises:
        ConfigError: a share outside (0, 1].
    """
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"share={share}: expected more than 0 and at most 1.")
    return max(1, int(len(bank) * share))


class BankEstimate(NamedTuple):
    """What a bank will weigh.

    Attributes:
        rows: M, without reference masking.
        bytes: of rows and provenance.
    """

    rows: int
    bytes: int


def estimate_bank(images: int, views: int, grid: tuple[int, int], width: int) -> BankEstimate:
    """Rows and bytes of a bank before it is built.

    Args:
        images: references.
        views: rotations of each.
        grid: (h, w).
        width: D.
    """
    rows = images * views * grid[0] * grid[1]
    return BankEstimate(rows, rows * (4 * width + _BYTES_PER_ROW_EXTRA))
