"""The memory bank as part of a torch module: buffers of any length that survive checkpoints, devices and precisions.

Legend: ``M`` rows, ``D`` features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anomalydino_plugin.errors import BankError
from anomalydino_plugin.exact_buffers import ExactBuffers
from anomalydino_plugin.kernels.rows import Kernel, SearchRows, search_rows
from anomalydino_plugin.memory_bank import MemoryBank


class BankModule(ExactBuffers):
    """Holds at most one ``MemoryBank``.

    Args:
        width: D.

    Attributes:
        rows: (M, D) float32, always: half precision of the encoder does not reach the bank.
        sources: (M, 4) int32.
        foreground: (M,) bool.
    """

    rows: Tensor
    sources: Tensor
    foreground: Tensor
    any_length = ("rows", "sources", "foreground")

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.empty(0, width))
        self.register_buffer("sources", torch.empty(0, 4, dtype=torch.int32))
        self.register_buffer("foreground", torch.empty(0, dtype=torch.bool))
        self._provenance: dict[str, Any] = {}
        self._laid_out: tuple[Tensor, int, Kernel, SearchRows] | None = None

    def __len__(self) -> int:
        return int(self.rows.shape[0])

    def get(self) -> MemoryBank:
        """The bank.

        Raises:
            BankError: it is empty.
        """
        self.require()
        return MemoryBank(self.rows, self.sources, self.foreground, **self._provenance)

    def search_rows(self, kernel: Kernel) -> SearchRows:
        """The rows laid out for a kernel; again only after they have changed."""
        rows = self.rows
        version = 0 if rows.is_inference() else rows._version
        if self._laid_out is None or self._laid_out[0] is not rows or self._laid_out[1:3] != (version, kernel):
            self._laid_out = (rows, version, kernel, search_rows(rows, kernel=kernel))
        return self._laid_out[3]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles lay the rows out again."""
        return {**self.__dict__, "_laid_out": None}

    def require(self) -> None:
        """Raise ``BankError`` if there is no bank."""
        if not len(self):
            raise BankError("memory bank is empty: fit the model on normal images, or load a bank, before scoring.")

    def put(self, bank: MemoryBank) -> None:
        """Install a bank in place of an earlier one."""
        device = self.rows.device
        self.rows, self.sources = bank.rows.to(device, torch.float32), bank.sources.to(device)
        self.foreground = bank.foreground.to(device)
        self._provenance = {
            "image_ids": bank.image_ids,
            "angles": bank.angles,
            "sizes": bank.sizes,
            "fingerprint": bank.fingerprint,
            "notes": bank.notes,
        }

    def clear(self) -> None:
        """Remove the bank."""
        for name in self.any_length:  # new tensors: an empty slice would keep the old rows alive, in files too
            old: Tensor = getattr(self, name)
            setattr(self, name, old.new_empty((0, *old.shape[1:])))
        self._provenance, self._laid_out = {}, None

    # Checkpoints: what is no tensor as plain types

    def get_extra_state(self) -> dict[str, Any]:
        """Provenance as plain types, loadable with ``weights_only=True``."""
        return dict(self._provenance)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Inverse of ``get_extra_state``."""
        self._provenance = dict(state)
