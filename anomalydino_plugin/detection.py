"""What scoring one image yields.

Legend: ``h w`` patch grid, ``k`` neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from anomalydino_plugin.preprocessing import Geometry


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


class Prediction(NamedTuple):
    """A batch of results in the form anomalib's post-processors expect.

    Attributes:
        pred_score: (B,) float32 raw image scores.
        anomaly_map: (B, 1, H, W) float32.
    """

    pred_score: Tensor
    anomaly_map: Tensor
