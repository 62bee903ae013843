"""Patch distances -> image score and anomaly map.

Legend: ``P`` patches, ``h w`` patch grid, ``H W`` pixels.

The map is linear in the distances and separable, so bilinear upsampling and Gaussian smoothing are folded into
one small matrix for each axis: ``map = A_rows @ distances @ A_columns.T``. SciPy makes the matrices once for each
size; two matrix products then replace the resize and the 33-tap filter over the full image.
"""

import functools
import math
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from anomalydino_plugin.errors import ConfigError

SIGMA = 4.0  # pixels of the original image; official code, dists2map
TOP_FRACTION = 0.01  # paper, section 3.3: mean of the 1 % largest patch distances
DEFAULT_STATISTIC = "mean_top:0.01"


def image_score(distances: Tensor, statistic: str = DEFAULT_STATISTIC) -> Tensor:
    """Aggregate patch distances (masked patches count as 0) to one score for each image (paper, equation 3).

    Args:
        distances: (..., P) float.
        statistic: ``"mean_top:F"`` (mean of the floor(F * P) largest, at least one), ``"max"``, or
            ``"quantile:F"`` (linear interpolation).

    Returns:
        (...) float.

    Raises:
        ConfigError: an unknown statistic or a fraction outside (0, 1].
    """
    name, fraction = parse_statistic(statistic)
    if name == "max":
        return distances.amax(dim=-1)
    if name == "quantile":
        return torch.quantile(distances, fraction, dim=-1)
    # as written: 0.29 * 100 is 28.999... in floating point
    top = max(1, math.floor(distances.shape[-1] * Fraction(str(fraction))))
    return distances.topk(top, dim=-1).values.mean(dim=-1)


def parse_statistic(statistic: str) -> tuple[str, float]:
    """Split ``"name:fraction"``; see ``image_score``."""
    name, _, text = statistic.partition(":")
    if name == "max" and not text:
        return name, 1.0
    try:
        fraction = float(text)
    except ValueError:
        fraction = math.nan
    if name not in {"mean_top", "quantile"} or not 0.0 < fraction <= 1.0:
        raise ConfigError(
            f"statistic={statistic!r}: expected 'max', 'mean_top:F' or 'quantile:F' with 0 < F <= 1, "
            f"for example {DEFAULT_STATISTIC!r}."
        )
    return name, fraction


def anomaly_map(
    distances: Tensor,
    size: tuple[int, int],
    *,
    sigma: float = SIGMA,
    coverage: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Upsample patch distances bilinearly to pixels and smooth them (paper, section 3.3).

    Args:
        distances: (..., h, w) float32.
        size: (H, W) of the image the map is for, pixels.
        sigma: standard deviation of the Gaussian, pixels; 0 turns it off.
        coverage: share of the image's height and width that the grid covers; the rest repeats the edge. The
            default stretches the grid over the whole image, as the official code does.

    Returns:
        (..., H, W) float32.

    Raises:
        ConfigError: an empty size or grid, a negative sigma, or a coverage outside (0, 1].
    """
    h, w = distances.shape[-2:]
    rows, columns = (
        torch.from_numpy(_axis_matrix(patches, pixels, sigma, share)).to(distances.device)
        for patches, pixels, share in zip((h, w), size, coverage, strict=True)
    )
    return rows @ distances.float() @ columns.T


@functools.lru_cache(maxsize=64)
def _axis_matrix(patches: int, pixels: int, sigma: float, coverage: float) -> NDArray[np.float32]:
    return _make_axis_matrix(patches, pixels, sigma, coverage)


def _make_axis_matrix(patches: int, pixels: int, sigma: float, coverage: float) -> NDArray[np.float32]:
    """(pixels, patches): bilinear interpolation at pixel centres, then Gaussian smoothing along the axis."""
    if patches < 1 or pixels < 1 or sigma < 0 or not 0.0 < coverage <= 1.0:
        raise ConfigError(
            f"anomaly map of {pixels} pixels from {patches} patches with sigma={sigma}, coverage={coverage}: expected "
            "positive sizes, sigma >= 0 and 0 < coverage <= 1."
        )
    position = (np.arange(pixels) + 0.5) * patches / (pixels * coverage) - 0.5
    position = np.clip(position, 0, patches - 1)
    low = np.minimum(np.floor(position).astype(np.int64), max(patches - 2, 0))
    matrix = np.zeros((pixels, patches))
    index = np.arange(pixels)
    matrix[index, low] = 1.0 - (position - low)
    if patches > 1:
        matrix[index, low + 1] = position - low
    if sigma > 0:
        # SciPy's defaults (truncate=4, reflected edge) are those of the official code.
        matrix = gaussian_filter1d(matrix, sigma, axis=0)
    return np.ascontiguousarray(matrix, dtype=np.float32)
