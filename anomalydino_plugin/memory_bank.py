"""The memory bank: normalised reference patches, and where each came from.

Legend: ``M`` rows, ``D`` features, ``P`` patches of one view, ``h w`` patch grid. A *view* is one rotation of one
reference image.

A bank is only comparable with queries made the same way, so it carries a fingerprint of backbone, weights and
preprocessing; loading it under another one is an error that says what differs.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anomalydino_plugin.errors import BankError, ResourceError

FORMAT = "anomalydino-bank/1"
_TENSORS = {"rows": "F32", "sources": "I32", "foreground": "BOOL"}  # in the words of safetensors


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
        """Write as safetensors, whole or not at all; provenance and fingerprint go into the metadata.

        Raises:
            ResourceError: no room, or no right to write there.
        """
        target = Path(path)
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
            target.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
            temporary.replace(target)
        except (OSError, SafetensorError) as error:
            raise ResourceError(
                f"cannot write memory bank {os.fspath(path)!r}: {error}. Free space there, or choose another place."
            ) from error
        finally:
            with contextlib.suppress(OSError):  # where nothing can be written, nothing can be removed
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
        name = os.fspath(path)
        try:
            with safe_open(name, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise BankError(
                        f"{name!r} has format {metadata.get('format')!r}: expected {FORMAT!r}. "
                        "Build the bank again from its reference images."
                    )
                _check_header({key: file.get_slice(key) for key in _TENSORS}, name)
                tensors = {key: file.get_tensor(key) for key in _TENSORS}
            bank = cls(**tensors, **_described(metadata))
        except FileNotFoundError:
            raise BankError(
                f"no memory bank {name!r}: expected a file that `save` or `anomalydino fit` wrote."
            ) from None
        except (OSError, SafetensorError) as error:
            raise BankError(f"cannot read memory bank {name!r}: {error}. Build it again.") from error
        except (KeyError, ValueError, TypeError, RecursionError) as error:  # JSONDecodeError is a ValueError
            raise BankError(
                f"memory bank {name!r} has damaged metadata: {type(error).__name__}: {error}. Build it again."
            ) from error
        _check_content(bank, name)
        if expected is not None:
            check_fingerprint(bank.fingerprint, expected, name)
        return bank


def _check_header(found: Mapping[str, Any], name: str) -> None:
    """Shapes and types as the header says them: nothing is allocated before they fit each other.

    Raises:
        BankError: they do not.
    """
    shapes = {key: tuple(found[key].get_shape()) for key in _TENSORS}
    types = {key: found[key].get_dtype() for key in _TENSORS}
    rows = shapes["rows"][0] if len(shapes["rows"]) == 2 else 0
    if not rows or shapes["sources"] != (rows, 4) or shapes["foreground"] != (rows,) or types != _TENSORS:
        raise BankError(
            f"memory bank {name!r} has tensors of shapes {shapes} and types {types}: expected rows (M, D) F32, sources "
            "(M, 4) I32 and foreground (M,) BOOL with at least one row. Build it again."
        )


def _described(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the metadata says of the rows; raises KeyError, ValueError or TypeError where it says nothing sensible."""
    fields = {key: json.loads(metadata[key]) for key in ("image_ids", "angles", "sizes", "fingerprint", "notes")}
    return {
        "image_ids": tuple(_text(value) for value in fields["image_ids"]),
        "angles": tuple(float(value) for value in fields["angles"]),
        "sizes": tuple((int(height), int(width)) for height, width in fields["sizes"]),
        "fingerprint": {key: _text(value) for key, value in dict(fields["fingerprint"]).items()},
        "notes": {key: _text(value) for key, value in dict(fields["notes"]).items()},
    }


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _check_content(bank: MemoryBank, name: str) -> None:
    """Every row names an image and an angle that are there, and is finite: NaN would pass for normal.

    Raises:
        BankError: a row that does not.
    """
    limits = torch.tensor([len(bank.image_ids), len(bank.angles)])
    named = bank.sources[:, :2]
    if len(bank.sizes) != len(bank.image_ids) or bool((named < 0).any()) or bool((named >= limits).any()):
        raise BankError(f"memory bank {name!r}: rows name images or angles that it does not list. Build it again.")
    if not bool(torch.isfinite(bank.rows).all()):
        raise BankError(f"memory bank {name!r} holds rows that are not finite. Build it again.")


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


def require_finite(features: Tensor, image_id: str) -> None:
    """Refuse a reference image that would put NaN or infinite values into a bank.

    Args:
        features: float, any shape.
        image_id: for the message.

    Raises:
        BankError: some are not finite.
    """
    if not bool(torch.isfinite(features).all()):
        raise BankError(f"reference image {image_id!r} gave features that are not finite; check image and weights.")


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
        require_finite(features, image_id)
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
