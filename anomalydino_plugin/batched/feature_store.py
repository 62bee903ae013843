"""Patch features of a whole set: in memory up to a budget, then on disk.

Legend: ``P`` patches of an image, ``D`` features.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anomalydino_plugin.errors import ConfigError
from anomalydino_plugin.mutual import MutualMatch
from anomalydino_plugin.preprocessing import Geometry

FeatureType = Literal["float32", "float16"]
DEFAULT_BUDGET = 4_000_000_000  # bytes: 2,600 images of S/14 at 448 in float32
BLOCK_ROWS = 8192  # of a block in memory, which a whole set is matched in


class StoredImage(NamedTuple):
    """What is known of an image beside its features.

    Attributes:
        key: its path, or a hash of its pixels.
        foreground: (h, w) bool.
        masking: whether the masking test on this image says that masks help; ``None`` where it was not run.
        geometry: sizes.
        first_row: number of its first patch over the whole set.
    """

    key: str
    foreground: NDArray[np.bool_]
    masking: bool | None
    geometry: Geometry
    first_row: int


class Block(NamedTuple):
    """Neighbouring images.

    Attributes:
        first: index of the first image.
        lengths: patches of each.
        rows: (sum of lengths, D) float32.
    """

    first: int
    lengths: list[int]
    rows: Tensor


def cut(lengths: Sequence[int], max_rows: int) -> Iterator[range]:
    """Neighbouring images, as many at a time as have at most ``max_rows`` patches together, at least one.

    Args:
        lengths: patches of each image.
        max_rows: of a block.
    """
    first, rows = 0, 0
    for index, length in enumerate(lengths):
        if index > first and rows + length > max_rows:
            yield range(first, index)
            first, rows = index, 0
        rows += length
    if first < len(lengths):
        yield range(first, len(lengths))


class _Memory:
    """Images one after the other in blocks, the same as ``cut`` makes of them for ``BLOCK_ROWS``.

    Args:
        width: D.
        dtype: of the features.
    """

    def __init__(self, width: int, dtype: np.dtype[Any]) -> None:
        self._width, self._dtype = width, dtype
        self._blocks: list[NDArray[np.floating]] = []
        self._places: list[tuple[int, int, int]] = []  # of each image: block, its first row, the one after its last
        self.patches = 0

    def add(self, features: NDArray[np.floating]) -> None:
        """(P, D) of one more image, copied."""
        start = self._places[-1][2] if self._places else 0
        if not self._blocks or start + len(features) > len(self._blocks[-1]):
            # what is not filled is not touched, and takes no memory
            self._blocks.append(np.empty((max(BLOCK_ROWS, len(features)), self._width), self._dtype))
            start = 0
        self._places.append((len(self._blocks) - 1, start, start + len(features)))
        self._blocks[-1][start : start + len(features)] = features
        self.patches += len(features)

    def rows(self, images: range) -> NDArray[np.floating] | None:
        """Of neighbouring images, as they lie there; ``None`` where these are not in one block."""
        if images.stop > len(self._places):
            return None
        (block, start, _), (last_block, _, stop) = self._places[images.start], self._places[images.stop - 1]
        return self._blocks[block][start:stop] if block == last_block else None


class FeatureStore:
    """L2-normalised patch features in the order they were added.

    Args:
        width: D.
        feature_type: how they are kept. float16 halves memory and moves distances by up to 5e-4.
        memory_budget: bytes kept in memory; what goes beyond lies in a temporary file that vanishes with the store.
        folder: for that file; by default the system's.

    Raises:
        ConfigError: an unknown feature type or a negative budget.
    """

    def __init__(
        self,
        width: int,
        feature_type: FeatureType = "float32",
        memory_budget: int = DEFAULT_BUDGET,
        folder: str | None = None,
    ) -> None:
        if feature_type not in ("float32", "float16"):
            raise ConfigError(f"feature_type={feature_type!r}: expected 'float32' or 'float16'.")
        if memory_budget < 0:
            raise ConfigError(f"memory_budget={memory_budget}: expected 0 or more bytes.")
        self._width = width
        self._dtype = np.dtype(feature_type)
        self._budget = memory_budget
        self._folder = folder
        self._memory = _Memory(width, self._dtype)
        self._file: tempfile._TemporaryFileWrapper[bytes] | None = None
        self._patches = 0
        self.images: list[StoredImage] = []
        self._by_key: dict[str, int] = {}
        self.matches: list[MutualMatch] | None = None  # of every image, where all were matched at once

    def __len__(self) -> int:
        return len(self.images)

    @property
    def patches(self) -> int:
        """Patches of all images."""
        return self._patches

    @property
    def bytes_on_disk(self) -> int:
        """Size of the temporary file."""
        return (self._patches - self._memory.patches) * self._row_bytes

    @property
    def bytes_to_copy(self) -> int:
        """What float32 blocks of at most ``BLOCK_ROWS`` rows take beside the store: nothing where it holds them."""
        held = self._dtype == np.float32 and self._file is None
        return 0 if held else 4 * self._width * self._patches

    def add(
        self, key: str, features: Tensor, foreground: NDArray[np.bool_], masking: bool | None, geometry: Geometry
    ) -> None:
        """Add an image.

        Args:
            key: see ``StoredImage``; the first of equal keys is found by ``find``.
            features: (P, D) float32, L2-normalised.
            foreground: (h, w) bool.
            masking: see ``StoredImage``.
            geometry: sizes.
        """
        rows = features.cpu().numpy().astype(self._dtype, copy=False)
        self._by_key.setdefault(key, len(self.images))
        self.images.append(StoredImage(key, foreground, masking, geometry, self._patches))
        fits = self._file is None and (self._patches + len(rows)) * self._row_bytes <= self._budget
        if fits:
            self._memory.add(rows)
        else:  # once on disk, everything after it, so that offsets stay simple
            self._write(rows)
        self._patches += len(rows)
        self.matches = None

    def find(self, key: str) -> int | None:
        """Index of the image with this key; ``None`` if there is none."""
        return self._by_key.get(key)

    def features(self, index: int) -> Tensor:
        """(P, D) float32 of one image."""
        held = self._memory.rows(range(index, index + 1))
        if held is not None:
            return torch.from_numpy(held.astype(np.float32, copy=False))
        image = self.images[index]
        count = image.geometry.grid[0] * image.geometry.grid[1]
        offset = (image.first_row - self._memory.patches) * self._row_bytes
        if self._file is None:
            raise ConfigError("the feature store was closed")
        data = os.pread(self._file.fileno(), count * self._row_bytes, offset)
        rows = np.frombuffer(data, self._dtype).reshape(count, self._width)
        return torch.from_numpy(rows.astype(np.float32))

    def blocks(self, max_rows: int, device: torch.device | str = "cpu") -> Iterator[Block]:
        """All images in order, as many at a time as have at most ``max_rows`` patches, at least one.

        Rows on the CPU may be the store's own: they are for reading.

        Args:
            max_rows: see above.
            device: where the rows go, image by image: what a GPU holds at a time need not fit beside the store.
        """
        for part in cut([image.foreground.size for image in self.images], max_rows):
            yield self._block(part, device)  # unnamed here, or it would be held while the next one is made

    def _block(self, part: range, device: torch.device | str) -> Block:
        lengths = [self.images[index].foreground.size for index in part]
        held = self._memory.rows(part)
        if held is not None and self._dtype == np.float32 and torch.device(device).type == "cpu":
            return Block(part.start, lengths, torch.from_numpy(held))
        rows, first = torch.empty((sum(lengths), self._width), dtype=torch.float32, device=device), 0
        for index, length in zip(part, lengths, strict=True):
            rows[first : first + length] = self.features(index)
            first += length
        return Block(part.start, lengths, rows)

    def close(self) -> None:
        """Forget everything and remove the temporary file."""
        if self._file is not None:
            self._file.close()
        self._file = None
        self._memory = _Memory(self._width, self._dtype)
        self.images, self._by_key = [], {}
        self._patches = 0
        self.matches = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle takes the settings along, never the images of a set."""
        empty = FeatureStore(self._width, self._dtype.name, self._budget, self._folder)  # type: ignore[arg-type]
        return empty.__dict__

    @property
    def _row_bytes(self) -> int:
        return self._width * self._dtype.itemsize

    def _write(self, rows: NDArray[np.floating]) -> None:
        if self._file is None:
            # open as long as the store is; closing removes it
            self._file = tempfile.NamedTemporaryFile(  # noqa: SIM115
                prefix="anomalydino-", suffix=".features", dir=self._folder
            )
        self._file.seek(0, os.SEEK_END)
        self._file.write(rows.tobytes())
        self._file.flush()
