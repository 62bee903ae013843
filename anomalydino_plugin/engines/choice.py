"""Which engine runs the backbone.

============= ======================================================= =========================================
engine        features                                                needs
============= ======================================================= =========================================
torch         float32, or the precision that the host framework sets  nothing; any device
torch_half    float16 on a GPU, bfloat16 on a CPU (autocast there)    hardware with it, else it is slow
openvino      float32, within 1e-5 of torch's                         openvino; a CPU; a DINOv2 backbone
openvino_bf16 bfloat16                                                the same; a CPU with bfloat16
============= ======================================================= =========================================
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from typing import Literal, Protocol

import torch
from torch import Tensor

from anomalydino_plugin.backbone import Backbone
from anomalydino_plugin.errors import ConfigError

EngineName = Literal["auto", "torch", "torch_half", "openvino", "openvino_bf16"]
ENGINES: tuple[EngineName, ...] = ("auto", "torch", "torch_half", "openvino", "openvino_bf16")
_REDUCED = {"torch_half": "half", "openvino_bf16": "bfloat16"}


class Engine(Protocol):
    """Runs a backbone."""

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised float32 on the backbone's device -> (B, P, D) float32."""


def engine_for(name: str, backbone: Backbone) -> str:
    """The engine that will run.

    Args:
        name: one of ``ENGINES``. ``"auto"`` takes OpenVINO in float32 where it can run, as measured on CPUs it is the
            fastest of those that keep float32; untrained backbones stay with torch, they are not worth compiling.
        backbone: where its parameters are, and of which type, counts.

    Raises:
        ConfigError: an unknown one, or one that cannot run here.
    """
    if name not in ENGINES:
        raise ConfigError(f"engine={name!r}: expected one of {', '.join(map(repr, ENGINES))}.")
    if name.startswith("openvino") and (missing := _no_openvino(backbone)):
        raise ConfigError(f"engine={name!r} cannot run here: {missing}. Use 'auto' or 'torch'.")
    if name == "openvino_bf16" and not rounds_in_openvino():
        raise ConfigError(
            f"engine={name!r} cannot run here: the processor has no bfloat16, and OpenVINO would compute in float32 "
            "without a word. Use 'auto' or 'openvino'."
        )
    if name != "auto":
        return name
    untrained = backbone.weights_sha256.startswith("random")
    mixed = torch.is_autocast_enabled("cpu")  # the host framework asked for torch's reduced precision
    return "torch" if untrained or mixed or _no_openvino(backbone) else "openvino"


def reduced_precision(name: str) -> str | None:
    """Precision of an engine's features where it is not float32: they cannot be compared with others."""
    return _REDUCED.get(name)


def load_engine(name: str, backbone: Backbone) -> Engine:
    """Make the engine that ``engine_for`` named."""
    if name in {"openvino", "openvino_bf16"}:
        from anomalydino_plugin.engines.openvino_engine import OpenVINOEngine  # loads openvino

        return OpenVINOEngine(backbone, bfloat16=name == "openvino_bf16")
    on_gpu = next(backbone.parameters()).device.type == "cuda"
    if name == "torch_half" and on_gpu and backbone.dinov2:
        from anomalydino_plugin.engines.half_gpu import HalfEngine  # on CPUs nobody needs it

        return HalfEngine(backbone)
    return TorchEngine(backbone, half=name == "torch_half")


class TorchEngine:
    """The backbone as it is.

    Args:
        backbone: the module.
        half: in float16 on a GPU, from a rounded copy of the parameters (on an H100 1.2 times as fast as autocast);
            under autocast in bfloat16 on a CPU.
    """

    def __init__(self, backbone: Backbone, *, half: bool = False) -> None:
        on_gpu = next(backbone.parameters()).device.type == "cuda"
        self.backbone = copy.deepcopy(backbone).half() if half and on_gpu else backbone
        self.half = half

    def __call__(self, images: Tensor) -> Tensor:
        """See ``Engine``."""
        parameter = next(self.backbone.parameters())
        with self._precision(parameter.device.type):
            features: Tensor = self.backbone(images.to(parameter.dtype))
        return features.float()

    def _precision(self, device: str) -> contextlib.AbstractContextManager[object]:
        """That of the host framework; if half, the engine's own."""
        if not self.half:
            return contextlib.nullcontext()
        return torch.autocast(device, enabled=False) if device == "cuda" else torch.autocast(device, torch.bfloat16)


def rounds_in_openvino() -> bool:
    """Whether OpenVINO computes in bfloat16 on this processor; elsewhere it takes float32 for it."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _no_openvino(backbone: Backbone) -> str:
    """Why OpenVINO cannot run it; empty if it can."""
    parameter = next(backbone.parameters())
    if not backbone.dinov2:
        return f"it runs DINOv2 backbones, not {backbone.name!r}"
    if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
        return f"it runs float32 backbones on the CPU, not {parameter.dtype} on {parameter.device.type!r}"
    if importlib.util.find_spec("openvino") is None:
        return "openvino is not installed (pip install 'anomalydino-plugin[fast]')"
    return ""
