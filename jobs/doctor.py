"""``anomalydino doctor``: what is installed and would be used, to be pasted into a bug report.

Asks no network, starts no Ray, and says no secret: of the environment only whether a variable is set.
"""

from __future__ import annotations

import os
import platform
import uuid
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any

from rich.console import Console

from anomalydino_plugin import AnomalyDINOError, __version__
from jobs.filesystem import Folder
from jobs.schema import SCHEMA_VERSION
from jobs.settings import check_text

_PACKAGES = (
    *("anomalib", "torch", "torchvision", "lightning", "timm", "ray", "pyarrow", "numpy", "scipy", "pillow"),
    *(
        "opencv-python-headless",
        "opencv-python",
        "safetensors",
        "onnx",
        "onnxruntime",
        "openvino",
        "numba",
        "jsonargparse",
    ),
)
_VARIABLES = (
    *("ANOMALYDINO_WEIGHTS", "ANOMALYDINO_CACHE", "RAY_ADDRESS", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"),
    *("AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "HTTPS_PROXY"),
)
_SHOWN = frozenset({"OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"})  # numbers; the others may hold what nobody should read
_PROBE = b"written by anomalydino doctor\n"

Line = tuple[str, str]


def main(options: Any, console: Console) -> int:
    """Print everything.

    Returns:
        0, or 1 where the write test failed.
    """
    status = 0
    lines = [*versions(), *machine(), *weights(options.backbone), *engines(), *ray_address(options.ray_address)]
    for name, value in lines:
        console.print(f"{name}: {value}", markup=False, highlight=False, soft_wrap=True)
    if options.out is not None:
        status, value = write_test(options.out)
        console.print(f"write test: {value}", markup=False, highlight=False, soft_wrap=True)
    return status


def versions() -> Iterator[Line]:
    """Versions of everything whose version matters."""
    yield "anomalydino-plugin", f"{__version__}, Parquet schema {SCHEMA_VERSION}"
    yield "python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "system", platform.platform()
    for name in _PACKAGES:
        yield name, _version(name) or "not installed"


def machine() -> Iterator[Line]:
    """Processors, memory and devices as torch sees them, and variables that change what is used."""
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "processors", f"{usable} usable of {os.cpu_count()}, torch threads {torch.get_num_threads()}"
    if hasattr(os, "sysconf"):
        yield "memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [torch.cuda.get_device_name(number) for number in range(count)]
    yield "cuda", f"{', '.join(found)} (CUDA {torch.version.cuda})" if found else "none"
    for name in _VARIABLES:
        if value := os.environ.get(name):
            yield name, value if name in _SHOWN else "set"


def weights(backbone: str) -> Iterator[Line]:
    """Which weights would be used without a network, and whether they are known."""
    from anomalydino_plugin import WeightsFile
    from anomalydino_plugin.weights.resolve import ENVIRONMENT, cached_path
    from anomalydino_plugin.weights.wheel_source import sha256_of

    for source, place in (("environment", os.environ.get(ENVIRONMENT)), ("cache", str(cached_path(backbone)))):
        file = Path(place).expanduser() if place else None
        if file is not None and file.is_file():
            checksum = sha256_of(file)
            known = "known" if WeightsFile(file, checksum, "cache").known else "not known"
            yield f"weights of {backbone}", f"from the {source}, sha256 {checksum} ({known})"
            return
    yield f"weights of {backbone}", "none here; --weights, the hub or the package index would be asked"


def engines() -> Iterator[Line]:
    """Which engine encodes and which kernel matches where neither is chosen."""
    import torch

    from anomalydino_plugin import kernel_for

    device = "cuda" if torch.cuda.is_available() else "cpu"
    openvino = device == "cpu" and util.find_spec("openvino") is not None
    yield (
        "engine",
        f"{'openvino' if openvino else 'torch'} on {device}, float32 (torch for backbones other than DINOv2)",
    )
    yield "kernel", f"{kernel_for('auto', device)} on {device} (torch where there are few rows)"


def ray_address(given: str | None) -> Iterator[Line]:
    """Where Ray would run."""
    if given is not None:
        yield "ray address", given
    elif os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        yield "ray address", "that of the surrounding job"
    else:
        yield "ray address", "none: Ray would start inside the process"


def write_test(out: str) -> tuple[int, str]:
    """Write, read back and remove a small file.

    Returns:
        0 or 1, and what happened.
    """
    name = f".anomalydino-doctor-{uuid.uuid4().hex[:8]}"
    try:
        check_text("out", out)
        folder = Folder(out)
        made = folder.local is not None and not folder.local.exists()
        folder.write(name, _PROBE)
        same = folder.read(name) == _PROBE
        folder.remove(name)
        if made and folder.local is not None:
            folder.local.rmdir()
    except (AnomalyDINOError, OSError) as error:
        return 1, f"failed: {error}"
    return (0, f"ok under {folder.location!r}") if same else (1, f"failed: {out!r} gave other bytes back")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
