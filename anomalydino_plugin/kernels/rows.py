"""Reference rows, laid out for the kernel that will search them; and which kernel that is.

Legend: ``M`` rows, ``D`` features.

========== ==================================================================== ============================
kernel     search                                                               needs
========== ==================================================================== ============================
torch      blocked float32 matrix products                                      nothing; any device
tiles_f32  float32 products that end in maxima of tiles                         numba; AVX-512
tiles_bf16 the same in bfloat16                                                 numba; AVX-512 with BF16
========== ==================================================================== ============================

All report distances of float32 or better for the rows found; see the package's docstring.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Tensor

from anomalydino_plugin.errors import ConfigError

if TYPE_CHECKING:
    from anomalydino_plugin.kernels.search import TiledRows

Kernel = Literal["auto", "torch", "tiles_f32", "tiles_bf16"]
KERNELS: tuple[Kernel, ...] = ("auto", "torch", "tiles_f32", "tiles_bf16")
_TILES: dict[str, str] = {"tiles_bf16": "avx512bf16", "tiles_f32": "avx512f"}  # fastest first, with what it needs
_WORTHWHILE = 4096  # rows: fewer are searched in a few milliseconds by any kernel
_BLOCK_ROWS = {"torch": 8192, "tiles_f32": 32768, "tiles_bf16": 32768}  # torch writes their similarities


class SearchRows(NamedTuple):
    """What is searched.

    Attributes:
        rows: (M, D) float32, L2-normalised.
        lengths: rows of each image, summing to M.
        kernel: the one that will search them.
        tiled: their layout for it; ``None`` for torch.
    """

    rows: Tensor
    lengths: tuple[int, ...]
    kernel: str
    tiled: TiledRows | None


def search_rows(rows: Tensor, lengths: Sequence[int] | None = None, kernel: Kernel = "auto") -> SearchRows:
    """Lay out reference rows, once for many searches.

    Args:
        rows: (M, D) float32, L2-normalised.
        lengths: rows of each image; all of one if not given.
        kernel: see ``kernel_for``.

    Raises:
        ConfigError: a kernel that cannot run here.
    """
    own = tuple(lengths) if lengths is not None else (len(rows),)
    chosen = kernel_for(kernel, rows.device.type, rows.shape[1])
    if chosen == "torch" or (kernel == "auto" and len(rows) < _WORTHWHILE) or not len(rows):
        return SearchRows(rows, own, "torch", None)
    from anomalydino_plugin.kernels.search import tile_rows  # loads numba

    return SearchRows(rows, own, chosen, tile_rows(rows, own, bfloat16=chosen == "tiles_bf16"))


def kernel_for(kernel: str, device: str = "cpu", width: int = 2) -> str:
    """The kernel that will run.

    Args:
        kernel: one of ``KERNELS``; ``"auto"`` takes the fastest that can run.
        device: ``"cpu"`` or another.
        width: D.

    Raises:
        ConfigError: an unknown one, or one that cannot run here.
    """
    if kernel not in KERNELS:
        raise ConfigError(f"kernel={kernel!r}: expected one of {', '.join(map(repr, KERNELS))}.")
    missing = {name: reason for name in _TILES if (reason := _missing(name, device, width))}
    if kernel == "auto":
        return next((name for name in _TILES if name not in missing), "torch")
    if kernel in missing:
        raise ConfigError(f"kernel={kernel!r} cannot run here: {missing[kernel]}. Use 'auto' or 'torch'.")
    return kernel


def block_rows(kernel: str, device: str = "cpu", width: int = 2) -> int:
    """Reference rows to lay out at a time where they stream past."""
    return _BLOCK_ROWS[kernel_for(kernel, device, width)]


def _missing(kernel: str, device: str, width: int) -> str:
    """Why it cannot run; empty if it can."""
    if device != "cpu":
        return f"it runs on the CPU, not on {device!r}"
    if width % 2:
        return f"it takes features in pairs, not {width}"
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed (pip install 'anomalydino-plugin[fast]')"
    return "" if _cpu_has(_TILES[kernel]) else f"the processor lacks {_TILES[kernel]}"


@functools.cache
def _cpu_has(feature: str) -> bool:
    from llvmlite import binding

    features: Any = binding.get_host_cpu_features()
    return bool(features.get(feature))
