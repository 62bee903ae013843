"""The memory bank: normalised reference patches, and where each came from.

Legend: ``M`` rows, ``D`` features, ``P`` patches of one view, ``h w`` patch grid. A *view* is one rotation of one
reference image.

A bank is only comparable with queries made the same way, so it carries a fingerprint of backbone, weights and
preprocessing; loading it under another one is an error that says what differs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anomalydino_plugin.errors import BankError

FORMAT = "anomalydino-bank/1"


class PatchSource(NamedTuple):
    """Where a bank row came from: reference image, rotation in degrees, and position on its patch grid."""

    image_id: str
    rotation: float
    row: int
    column: int


@dataclass(frozen=True)
class MemoryBank:
    """Reference patches with provenance.

    Attributes:
        rows: (M, D) float32, L2-normalised.
        sources: (M, 4) int32: index of the image, index of the angle, grid row, grid column.
        foreground: (M,) bool, the patch lies on the object (all true without masking).
        image_ids: reference images in the order they were added.
        angles: rotations in degrees.
        sizes: for each image its (height, width) in pixels.
        fingerprint: what the rows were made with; see ``check_fingerprint``.
        notes: anything worth keeping beside the rows; never compared.
    """

    rows: Tensor
    sources: Tensor
    foreground: Tensor
    image_ids: tuple[str, ...]
    angles: tuple[float, ...]
    sizes: tuple[tuple[int, int], ...]
    fingerprint: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.rows.shape[0])

    def source(self, row: int) -> PatchSource:
        """Provenance of one row.

        Raises:
            BankError: no such row.
        """
        if not 0 <= row < len(self):
            raise BankError(f"bank row {row}: expected 0 to {len(self) - 1}.")
        image, angle, patch_row, patch_column = (int(value) for value in self.sources[row])
        return PatchSource(self.image_ids[image], self.angles[angle], patch_row, patch_column)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as safetensors, whole or not at all; provenance and fingerprint go into the metadata."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        tensors = {"rows": self.rows, "sources": self.sources, "foreground": self.foreground}
        metadata = {
            "format": FORMAT,
            "image_ids": json.dumps(self.image_ids),
            "angles": json.dumps(self.angles),
            "sizes": json.dumps(self.sizes),
            "fingerprint": json.dumps(self.fingerprint, sort_keys=True),
            "notes": json.dumps(self.notes, sort_keys=True),
        }
        try:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], expected: Mapping[str, str] | None = None) -> MemoryBank:
        """Read a bank back.

        Args:
            path: a file written by ``save``.
            expected: fingerprint of the model that will use it; ``None`` skips the comparison.

        Raises:
            BankError: missing, damaged or foreign file, or a fingerprint that differs.
        """
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise BankError(
                        f"{os.fspath(path)!r} has format {metadata.get('format')!r}: expected {FORMAT!r}. "
                        "Build the bank again from its reference images."
                    )
                tensors = {name: file.get_tensor(name) for name in ("rows", "sources", "foreground")}
        except (OSError, SafetensorError) as error:
            raise BankError(f"cannot read memory bank {os.fspath(path)!r}: {error}. Build it again.") from error
        bank = cls(
            **tensors,
            image_ids=tuple(json.loads(metadata["image_ids"])),
            angles=tuple(json.loads(metadata["angles"])),
            sizes=tuple((height, width) for height, width in json.loads(metadata["sizes"])),
            fingerprint=json.loads(metadata["fingerprint"]),
            notes=json.loads(metadata["notes"]),
        )
        if expected is not None:
            check_fingerprint(bank.fingerprint, expected, os.fspath(path))
        return bank


def check_fingerprint(actual: Mapping[str, str], expected: Mapping[str, str], name: str) -> None:
    """Compare two fingerprints.

    Raises:
        BankError: naming each setting that differs with both of its values.
    """
    keys = sorted(set(actual) | set(expected))
    differing = [key for key in keys if actual.get(key) != expected.get(key)]
    if differing:
        lines = "; ".join(f"{key}: bank {actual.get(key)!r}, model {expected.get(key)!r}" for key in differing)
        raise BankError(
            f"memory bank {name!r} was made with other settings ({lines}). Use the settings of the bank, or build it "
            "again from its reference images."
        )


class BankBuilder:
    """Collects views of reference images and freezes them into a ``MemoryBank``."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._sources: list[Tensor] = []
        self._foreground: list[Tensor] = []
        self._images: dict[str, tuple[int, int]] = {}
        self._angles: dict[float, int] = {}

    def add(
        self,
        features: Tensor,
        grid: tuple[int, int],
        *,
        image_id: str,
        size: tuple[int, int],
        angle: float = 0.0,
        foreground: Tensor | None = None,
        keep_background: bool = True,
    ) -> None:
        """Add one view.

        Args:
            features: (P, D) float32, not normalised.
            grid: (h, w), h * w = P.
            image_id: stable name of the reference image.
            size: (height, width) of the image, pixels.
            angle: rotation, degrees.
            foreground: (P,) bool; ``None`` for all.
            keep_background: whether background patches enter the bank.

        Raises:
            BankError: features that do not fit the grid or are not finite, or no foreground left.
        """
        patches = grid[0] * grid[1]
        if features.shape[:1] != (patches,):
            raise BankError(f"{features.shape[0]} features for a grid of {grid}: expected {patches}.")
        if not bool(torch.isfinite(features).all()):
            raise BankError(f"reference image {image_id!r} gave features that are not finite; check image and weights.")
        mask = torch.ones(patches, dtype=torch.bool) if foreground is None else foreground.cpu()
        kept = torch.arange(patches) if keep_background else mask.nonzero()[:, 0]
        if kept.numel() == 0:
            raise BankError(
                f"reference image {image_id!r} has no foreground: expected at least one patch. "
                "Turn reference masking off, or choose another reference image."
            )
        image = self._index(image_id, size)
        angle_index = self._angles.setdefault(float(angle), len(self._angles))
        view = torch.tensor([image, angle_index]).expand(kept.numel(), 2)
        position = torch.stack([kept // grid[1], kept % grid[1]], dim=1)
        self._rows.append(torch.nn.functional.normalize(features.float().cpu()[kept], dim=1))
        self._sources.append(torch.cat([view, position], dim=1).to(torch.int32))
        self._foreground.append(mask[kept])

    def _index(self, image_id: str, size: tuple[int, int]) -> int:
        self._images.setdefault(image_id, (int(size[0]), int(size[1])))
        return list(self._images).index(image_id)

    def freeze(self, fingerprint: Mapping[str, str]) -> MemoryBank:
        """Make the bank.

        Raises:
            BankError: nothing was added.
        """
        if not self._rows:
            raise BankError("memory bank is empty: expected at least one reference image. Add normal images first.")
        return MemoryBank(
            rows=torch.cat(self._rows),
            sources=torch.cat(self._sources),
            foreground=torch.cat(self._foreground),
            image_ids=tuple(self._images),
            angles=tuple(self._angles),
            sizes=tuple(self._images.values()),
            fingerprint=dict(fingerprint),
        )
