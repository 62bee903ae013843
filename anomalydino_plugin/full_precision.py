"""Products in float32, whatever precision the host framework allows itself for its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def full_precision(device: str) -> Iterator[None]:
    """Switch off autocast and the reduced products that torch was allowed.

    Lightning recommends ``torch.set_float32_matmul_precision("high")`` to its users. TF32's error of 1e-3 would find
    other rows and report other distances.

    Args:
        device: type of the tensors' device.
    """
    with torch.autocast(device, enabled=False), _highest():
        yield


@contextlib.contextmanager
def _highest() -> Iterator[None]:
    try:
        allowed = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by backend, which torch keeps apart since 2.9
        backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
        return
    if allowed == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)
