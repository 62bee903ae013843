"""Buffers that host frameworks may move but not round, and may reload at any length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

Self = TypeVar("Self", bound="ExactBuffers")


class ExactBuffers(nn.Module):
    """A module whose own buffers keep their dtype under ``.half()`` and the like.

    ``precision="16-true"`` converts every buffer of a model. Bank rows and thresholds would lose what the search
    recomputes; the encoder alone shall run in reduced precision. Buffers named in ``any_length`` take the length that
    a state dict holds: how many rows there are is data, not architecture.
    """

    any_length: tuple[str, ...] = ()

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.any_length:
            stored = state_dict.get(prefix + name)
            if stored is not None:
                setattr(self, name, getattr(self, name).new_empty(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
