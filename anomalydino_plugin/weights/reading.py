"""A weights file -> tensors that fit a backbone, or one clear error."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from anomalydino_plugin.errors import WeightsError
from anomalydino_plugin.weights.known import BACKBONES
from anomalydino_plugin.weights.layouts import to_timm_layout

if TYPE_CHECKING:
    from anomalydino_plugin.weights.resolve import WeightsFile

_SUFFIXES = {".safetensors", ".pth", ".pt"}
_NAMED = 3  # tensors named in a message


def load_weights(file: WeightsFile | str | os.PathLike[str], backbone: str) -> dict[str, Tensor]:
    """Read a weights file and check that it fits.

    Args:
        file: from ``resolve_weights``, or a path.
        backbone: name of the backbone.

    Returns:
        Tensors under timm's names, exactly those of the architecture.

    Raises:
        WeightsError: unreadable or truncated file, missing or superfluous tensors, or wrong shapes.
    """
    path = Path(file if isinstance(file, str | os.PathLike) else file.path)
    tensors = to_timm_layout(read_tensors(path))
    _check(tensors, expected_shapes(backbone), path, backbone)
    return tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a ``.safetensors`` or ``.pth`` file; pickles are never executed.

    Raises:
        WeightsError: missing, of another kind, damaged, or holding anything but tensors.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise WeightsError(f"weights {str(path)!r}: expected a file ending in {', '.join(sorted(_SUFFIXES))}.")
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        size = path.stat().st_size if path.is_file() else 0
        raise WeightsError(
            f"cannot read weights {str(path)!r} ({size} bytes): {_first_line(error)}. Expected a complete safetensors "
            "file, or a .pth with nothing but tensors. Fetch it again."
        ) from error
    if isinstance(content, dict):
        content = next((content[key] for key in ("model", "state_dict", "teacher") if key in content), content)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"weights {str(path)!r} hold {type(content).__name__}: expected a dictionary of tensors.")
    return content


def expected_shapes(backbone: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the architecture's tensors, without allocating them."""
    import timm  # heavy

    architecture = BACKBONES[backbone].timm_name if backbone in BACKBONES else backbone
    with torch.device("meta"):
        model = timm.create_model(architecture, pretrained=False, num_classes=0)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _check(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], path: Path, backbone: str) -> None:
    missing = sorted(expected.keys() - tensors.keys())
    superfluous = sorted(tensors.keys() - expected.keys())
    wrong = [name for name in sorted(expected.keys() & tensors.keys()) if tuple(tensors[name].shape) != expected[name]]
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing ({_some(missing)})")
    if superfluous:
        problems.append(f"{len(superfluous)} do not belong to it ({_some(superfluous)})")
    if wrong:
        shapes = [f"{name} is {tuple(tensors[name].shape)}, expected {expected[name]}" for name in wrong]
        problems.append(f"{len(wrong)} have another shape ({_some(shapes)})")
    if problems:
        raise WeightsError(
            f"weights {str(path)!r} do not fit backbone {backbone!r}: {'; '.join(problems)}. Expected "
            f"{len(expected)} tensors. Give the weights of this backbone, or the backbone of these weights."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0][:200] or type(error).__name__
