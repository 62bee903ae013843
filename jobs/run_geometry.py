"""Where patches of a finished run lie on their images: from ``job.json`` and the sizes in ``images``.

Legend: ``H W`` pixels, ``h w`` patch grid. A box is ``(y, x, height, width)`` in whole pixels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anomalydino_plugin import AnomalyDINOError, anomaly_map, patch_size_of, plan_geometry
from jobs.store import Store

Box = tuple[int, int, int, int]


class RunGeometry(NamedTuple):
    """How images of a run were resized and cut into patches.

    Attributes:
        resolution: smaller edge after resizing, pixels; ``None`` where no record says so.
        patch_size: pixels; likewise.
    """

    resolution: int | None = None
    patch_size: int | None = None

    @classmethod
    def of(cls, store: Store) -> RunGeometry:
        """Read it from the stages of a run; embeddings elsewhere are followed to their own records."""
        stages = read_stages(store)
        job = stages.get("score") or stages.get("match") or {}
        config = job.get("config", {})
        if config.get("embeddings"):
            extract = stages.get("extract") or read_stages(Store(config["embeddings"])).get("extract", {})
            config = extract.get("config", {})
        try:
            return cls(int(config["resolution"]), job.get("patch_size") or patch_size_of(config["backbone"]))
        except (KeyError, AnomalyDINOError):
            return cls()

    def coverage(self, size: tuple[int, int], grid: tuple[int, int]) -> tuple[float, float]:
        """Share of the image's height and width that the grid covers; (1, 1) where the records do not fit.

        Args:
            size: (H, W).
            grid: (h, w).
        """
        if self.resolution is None or self.patch_size is None:
            return 1.0, 1.0
        try:
            plan = plan_geometry(*size, self.resolution, self.patch_size)
        except AnomalyDINOError:
            return 1.0, 1.0
        return plan.coverage if plan.grid == grid else (1.0, 1.0)

    def anomaly_map(self, size: tuple[int, int], distances: NDArray[np.float32]) -> NDArray[np.float32]:
        """(H, W) float32, the same that ``FewShotModel.anomaly_map`` gives.

        Args:
            size: (H, W).
            distances: (h, w) float32.
        """
        import torch

        grid = (distances.shape[0], distances.shape[1])
        found = anomaly_map(torch.from_numpy(distances), size, coverage=self.coverage(size, grid))
        return np.asarray(found.numpy(), dtype=np.float32)

    def box(self, size: tuple[int, int], grid: tuple[int, int], row: int, col: int) -> Box:
        """Where one patch lies on the image before resizing.

        Args:
            size: (H, W).
            grid: (h, w).
            row: of the patch.
            col: likewise.
        """
        share = self.coverage(size, grid)
        (y, height), (x, width) = (
            _span(index, pixels * covered / patches, pixels)
            for index, pixels, covered, patches in zip((row, col), size, share, grid, strict=True)
        )
        return y, x, height, width


def _span(index: int, step: float, pixels: int) -> tuple[int, int]:
    first = min(round(index * step), pixels - 1)
    return first, max(1, round((index + 1) * step) - first)


def read_stages(store: Store) -> dict[str, Any]:
    """What ``job.json`` says of each stage of a run; nothing where there is none."""
    if not store.folder.has("job.json"):
        return {}
    stages: dict[str, Any] = store.read_json("job.json")["stages"]
    return stages
