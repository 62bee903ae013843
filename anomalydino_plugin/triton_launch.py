"""What every launch of a Triton kernel needs, whatever it computes; loads no Triton."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whichever its tensors are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def why_it_fails(trial: Callable[[], object], device: torch.device) -> str:
    """Why kernels cannot run on a device; empty if the trial, which compiles them, succeeds."""
    try:
        trial()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # here and not in the first real launch, if it fails
    except Exception as error:  # compilers, drivers and cards have no class in common for what they lack
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
    return ""
