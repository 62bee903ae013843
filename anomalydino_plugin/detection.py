"""What scoring one image yields.

Legend: ``h w`` patch grid, ``P = h * w``, ``k`` neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from anomalydino_plugin.preprocessing import Geometry
from anomalydino_plugin.scoring import DEFAULT_STATISTIC, image_score


class Detection(NamedTuple):
    """Result for one image.

    Attributes:
        score: image score, raw (not normalised).
        distances: (h, w) float32, mean cosine distance to the k nearest bank rows; 0 where masked.
        foreground: (h, w) bool; all true without masking.
        matched_rows: (h, w) int64, nearest bank row; -1 where masked.
        geometry: sizes of image and grid.
    """

    score: float
    distances: NDArray[np.float32]
    foreground: NDArray[np.bool_]
    matched_rows: NDArray[np.int64]
    geometry: Geometry


def detect(
    distances: Tensor,
    rows: Tensor,
    foreground: NDArray[np.bool_],
    plan: Geometry,
    statistic: str = DEFAULT_STATISTIC,
) -> Detection:
    """Patch distances of one image -> its result.

    Args:
        distances: (P,) float32, 0 where masked.
        rows: (P,) int64, what each patch matched; -1 where it matched nothing.
        foreground: (h, w) bool.
        plan: sizes.
        statistic: see ``scoring.image_score``.
    """
    return Detection(
        score=float(image_score(distances, statistic)),
        distances=distances.cpu().numpy().reshape(plan.grid),
        foreground=foreground,
        matched_rows=rows.cpu().numpy().reshape(plan.grid),
        geometry=plan,
    )


class Prediction(NamedTuple):
    """A batch of results in the form anomalib's post-processors expect.

    Attributes:
        pred_score: (B,) float32 raw image scores.
        anomaly_map: (B, 1, H, W) float32.
    """

    pred_score: Tensor
    anomaly_map: Tensor
