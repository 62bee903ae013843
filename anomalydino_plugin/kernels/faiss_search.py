"""Approximate search for banks too large for exact search: faiss looks into the nearest cells of an inverted file.

What it misses depends on the bank: tests/benchmarks/faiss_recall.py measures it. Distances of the rows it finds are
recomputed in float64 as everywhere.

Legend: ``Q`` queries, ``M`` reference rows, ``D`` features.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

PROBED = 32  # cells looked into
_CELLS = 4  # times the square root of M: faiss's own advice
_LEARNT_FROM = 64  # rows of each cell's centre; more changes little
_CANDIDATES = 4  # of float16 rows kept for each neighbour, before distances are recomputed


class FaissRows(NamedTuple):
    """Reference rows in cells, in float16. A ``Layout``.

    Attributes:
        rows: (M, D) float32.
        index: of faiss, inner products.
    """

    rows: Tensor
    index: Any

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor | None, Tensor]:
        """See ``Layout``; a row that lies in a cell not looked into is missed."""
        wanted = min(len(self.rows), _CANDIDATES * k)
        values = np.ascontiguousarray(queries.numpy(), dtype=np.float32)
        _, found = self.index.search(values, wanted)
        # Fewer rows than asked for in the cells: the first ones stand in, and lose unless they are near.
        places = torch.from_numpy(np.where(found < 0, np.arange(wanted)[None], found))
        similarity = torch.einsum("qd,qcd->qc", queries, self.rows[places])
        similarity = similarity.masked_fill(_repeated(places), -math.inf)
        return None, places.gather(1, similarity.topk(k, dim=1).indices)

    def take_in(self, *_: object, by_image: bool) -> bool:
        """No: the n lowest distances of a whole set are not the nearest few."""
        del by_image
        return False

    def take_in_each_other(self, *_: object) -> bool:
        """No, as ``take_in``."""
        return False


def faiss_rows(rows: Tensor, *, probed: int = PROBED) -> FaissRows:
    """Sort rows of unit length into cells.

    The centres are learnt from evenly spaced rows with faiss's fixed seed: the same rows give the same cells.

    Args:
        rows: (M, D) float32 on the CPU.
        probed: cells that a search looks into; more find more.
    """
    import faiss

    values = np.ascontiguousarray(rows.numpy(), dtype=np.float32)
    count, width = values.shape
    cells = max(1, min(round(_CELLS * math.sqrt(count)), count // 39 or 1))  # faiss wants 39 rows to learn a centre
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(width), width, cells, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    step = max(1, count // (_LEARNT_FROM * cells))
    index.train(np.ascontiguousarray(values[::step]))
    index.add(values)
    index.nprobe = min(probed, cells)
    return FaissRows(rows, index)


def _repeated(places: Tensor) -> Tensor:
    """(Q, c) bool: whether the row stands further left already."""
    order = places.sort(dim=1, stable=True)
    same = torch.zeros_like(places, dtype=torch.bool)
    same[:, 1:] = order.values[:, 1:] == order.values[:, :-1]
    return torch.zeros_like(same).scatter(1, order.indices, same)
