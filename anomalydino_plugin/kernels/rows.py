"""Reference rows, laid out for the kernel that will search them; and which kernel that is.

Legend: ``M`` rows, ``D`` features.

========== ==================================================================== ============================
kernel     search                                                               needs
========== ==================================================================== ============================
torch      blocked float32 matrix products                                      nothing; any device
tiles_f32  float32 products that end in what reaches a limit                    numba; AVX-512
tiles_bf16 the same in bfloat16                                                 numba; AVX-512 with BF16
tiles_int8 the same in eight bits                                               numba; AVX-512 with VNNI
triton     float16 products that end in maxima, or in the rows within reach     triton; a GPU
           of the n nearest; ``"musc"`` matching stays with torch
faiss_ivf  approximate, for banks beyond ten million rows; few-shot alone       faiss-cpu
========== ==================================================================== ============================

All report distances of float32 or better for the rows found; see the package's docstring. All but ``faiss_ivf`` find
the nearest rows.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from anomalydino_plugin.errors import ConfigError

logger = logging.getLogger(__name__)
Precision = Literal["float32", "bfloat16", "int8"]
Kernel = Literal["auto", "torch", "tiles_f32", "tiles_bf16", "tiles_int8", "triton", "faiss_ivf"]
KERNELS: tuple[Kernel, ...] = ("auto", "torch", "tiles_f32", "tiles_bf16", "tiles_int8", "triton", "faiss_ivf")
# fastest first, with what it needs of the processor, and its precision
_TILES: dict[str, tuple[str, Precision]] = {
    "tiles_int8": ("avx512vnni", "int8"),
    "tiles_bf16": ("avx512bf16", "bfloat16"),
    "tiles_f32": ("avx512f", "float32"),
}
_WORTHWHILE = 4096  # rows: fewer are searched in a few milliseconds by any kernel
# rows laid out at a time where they stream past; torch writes their similarities
_BLOCK_ROWS = {"torch": 8192, "faiss_ivf": 8192, "triton": 1 << 20} | dict.fromkeys(_TILES, 16384)
_GPU_SHARE = 0.25  # of a GPU's memory
_LAID_OUT_BYTES = 7  # of one feature: float32, float16, and the sample

NEVER = -2.0  # below any cosine similarity
SUM_ERROR = 2.0**-23  # of float32 sums, for each feature


class Lowest(NamedTuple):
    """The n highest similarities, that is the lowest distances, of every query so far; kernels update them in place.

    Attributes:
        highest: (Q, n) float32, each row ascending or a heap with its lowest first, on a GPU in any order; -2 where
            nothing is yet.
        best: (Q,) float32, the highest.
        rows: (Q,) int64, row of ``best``.
    """

    highest: Tensor
    best: Tensor
    rows: Tensor


class Layout(Protocol):
    """Rows as a kernel wants them, and its search."""

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor | None, Tensor]:
        """(Q, k) float32 distances, where the search has computed them, and (Q, k) int64 rows of (Q, D) queries."""

    def take_in(self, queries: Tensor, lowest: Lowest, offset: int, left_out: int, *, by_image: bool) -> bool:
        """Take all rows into the n highest similarities of (Q, D) queries, if the kernel can.

        Args:
            queries: float32.
            lowest: updated.
            offset: number of the first row.
            left_out: image whose rows do not count; -1 for none.
            by_image: an image counts with its highest similarity alone.

        Returns:
            Whether it was done; if not, nothing was changed.
        """

    def take_in_each_other(
        self, other: Any, lowest: Sequence[Lowest], other_lowest: Sequence[Lowest], offsets: tuple[int, int]
    ) -> bool:
        """Take the patches of two blocks of different images into each other's n highest similarities, if it can.

        Args:
            other: layout of the other block.
            lowest: of each image of this block; updated.
            other_lowest: of each image of the other; updated.
            offsets: numbers of the first rows of this and the other block.

        Returns:
            As for ``take_in``.
        """


class SearchRows(NamedTuple):
    """What is searched.

    Attributes:
        rows: (M, D) float32, L2-normalised.
        lengths: rows of each image, summing to M.
        kernel: the one that will search them.
        layout: the rows as that kernel wants them; ``None`` for torch.
    """

    rows: Tensor
    lengths: tuple[int, ...]
    kernel: str
    layout: Layout | None = None


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
        return SearchRows(rows, own, "torch")
    if chosen == "triton":
        from anomalydino_plugin.kernels.gpu_search import half_rows, why_not  # loads triton

        if reason := why_not(rows.device):
            if kernel != "auto":
                raise ConfigError(f"kernel={kernel!r} cannot run on {str(rows.device)!r}: {reason}. Use 'torch'.")
            logger.warning("searching in torch, which is slower: Triton cannot run on %s: %s", rows.device, reason)
            return SearchRows(rows, own, "torch")
        return SearchRows(rows, own, chosen, half_rows(rows, own))
    if chosen == "faiss_ivf":
        from anomalydino_plugin.kernels.faiss_search import faiss_rows  # loads faiss

        return SearchRows(rows, own, chosen, faiss_rows(rows))
    try:
        from anomalydino_plugin.kernels.search import tile_rows  # loads numba
    except (ImportError, OSError, RuntimeError) as error:  # the last where numba finds no folder for compiled code
        if kernel != "auto":
            raise ConfigError(
                f"kernel={kernel!r} cannot run here: {error}. Set NUMBA_CACHE_DIR to a folder that can be written, or "
                "use 'torch'."
            ) from error
        logger.warning("searching in torch, which is slower: the compiled search cannot be loaded: %s", error)
        return SearchRows(rows, own, "torch")
    return SearchRows(rows, own, chosen, tile_rows(rows, own, _TILES[chosen][1]))


def kernel_for(kernel: str, device: str = "cpu", width: int = 2) -> str:
    """The kernel that will run.

    Args:
        kernel: one of ``KERNELS``; ``"auto"`` takes the fastest that can run on the device.
        device: ``"cpu"`` or another.
        width: D.

    Raises:
        ConfigError: an unknown one, or one that cannot run here.
    """
    if kernel not in KERNELS:
        raise ConfigError(f"kernel={kernel!r}: expected one of {', '.join(map(repr, KERNELS))}.")
    missing = {name: reason for name in _TILES if (reason := _missing(name, device, width))}
    if kernel == "auto":
        on_gpu = device == "cuda" and not _no_triton(device)
        return "triton" if on_gpu else next((name for name in _TILES if name not in missing), "torch")
    if kernel == "triton":
        missing[kernel] = _no_triton(device)
    if kernel == "faiss_ivf":
        missing[kernel] = _no_faiss(device)
    if missing.get(kernel):
        raise ConfigError(f"kernel={kernel!r} cannot run here: {missing[kernel]}. Use 'auto' or 'torch'.")
    return kernel


def block_rows(kernel: str, device: str = "cpu", width: int = 2) -> int:
    """Reference rows to lay out at a time where they stream past.

    On a GPU as many as a quarter of its memory holds, whoever uses the rest, so that the same machine cuts alike: a
    block's lowest distances are those of the set only once all blocks were seen, so that the rows compared again grow
    with the number of blocks.

    Args:
        kernel: see ``kernel_for``.
        device: with its number where there are several.
        width: D.
    """
    kind = device.partition(":")[0]
    chosen = kernel_for(kernel, kind, width)
    if chosen != "triton" or kind != "cuda":
        return _BLOCK_ROWS[chosen]
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(_BLOCK_ROWS["torch"], int(_GPU_SHARE * memory) // (_LAID_OUT_BYTES * width))


def _missing(kernel: str, device: str, width: int) -> str:
    """Why it cannot run; empty if it can."""
    if device != "cpu":
        return f"it runs on the CPU, not on {device!r}"
    if width % 2:
        return f"it takes features in pairs, not {width}"
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed (pip install 'anomalydino-plugin[fast]')"
    try:
        feature, _ = _TILES[kernel]
        return "" if _cpu_has(feature) else f"the processor lacks {feature}"
    except (ImportError, OSError) as error:  # short of memory, for one
        return f"llvmlite cannot be loaded: {str(error).splitlines()[0]}"


def _no_triton(device: str) -> str:
    """Why Triton cannot run; empty if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    interpreted = bool(os.environ.get("TRITON_INTERPRET"))
    return "" if device == "cuda" or interpreted else f"it runs on a GPU, not on {device!r}"


def _no_faiss(device: str) -> str:
    """Why faiss cannot run; empty if it can."""
    if importlib.util.find_spec("faiss") is None:
        return "faiss is not installed (pip install 'anomalydino-plugin[faiss]')"
    return "" if device == "cpu" else f"it runs on the CPU, not on {device!r}"


@functools.cache
def _cpu_has(feature: str) -> bool:
    from llvmlite import binding

    features: Any = binding.get_host_cpu_features()
    return bool(features.get(feature))
