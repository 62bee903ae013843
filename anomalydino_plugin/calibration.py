"""Thresholds from normal images alone, and the display normalisation around them.

Few-shot users have no defects to tune on. The scores of normal images say how high a normal score gets; the
threshold is put above them.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from anomalydino_plugin.errors import ConfigError, InputError

FALSE_ALARM_TARGET = 0.05

Value = TypeVar("Value", float, Tensor)


def threshold_from_normals(scores: Sequence[float], *, false_alarm: float = FALSE_ALARM_TARGET) -> float:
    """Smallest threshold that normal images should exceed with at most the given probability.

    With n scores of exchangeable normal images, the ceil((n + 1)(1 - a))-th smallest is exceeded by a further
    normal image with probability at most a (split conformal prediction; Vovk et al. 2005). That needs
    n >= 1 / a - 1. Below it no distribution-free statement is possible, and a Gumbel distribution, the limit law of
    maxima such as the top-1 % mean, is fitted by moments and its 1 - a quantile taken, never below the largest score.

    Args:
        scores: image scores of normal images, or the maxima of their anomaly maps.
        false_alarm: a, in (0, 1).

    Returns:
        The threshold; an image is anomalous if its score is greater.

    Raises:
        InputError: no score, or one that is not finite.
        ConfigError: a target outside (0, 1).
    """
    values = np.sort(np.asarray(scores, dtype=np.float64))
    if values.size == 0 or not np.isfinite(values).all():
        raise InputError(
            f"{values.size} normal scores of which {int(np.isfinite(values).sum())} are finite: expected >= 1."
        )
    if not 0.0 < false_alarm < 1.0:
        raise ConfigError(f"false_alarm={false_alarm}: expected a probability between 0 and 1, for example 0.05.")
    rank = math.ceil((values.size + 1) * (1.0 - false_alarm))
    if rank <= values.size:
        return float(values[rank - 1])
    return max(float(values[-1]), _gumbel_quantile(values, 1.0 - false_alarm))


_EULER_GAMMA = 0.5772156649015329
_MIN_SPREAD = 0.15  # relative: normal scores of one object vary at least so much; docs/calibration.md


def _gumbel_quantile(values: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]", probability: float) -> float:
    mean = float(values.mean())
    spread = float(values.std(ddof=1)) if values.size > 1 else 0.0
    spread = max(spread, _MIN_SPREAD * mean)
    scale = spread * math.sqrt(6.0) / math.pi
    return mean - _EULER_GAMMA * scale - scale * math.log(-math.log(probability))


def normalise_score(score: Value, threshold: float | Tensor) -> Value:
    """Map [0, inf) to [0, 1) with 0.5 at the threshold: ``s / (s + t)``.

    Strictly increasing and never clamped, so that every ranking metric is the same before and after. With t = 0, which
    references without any difference give, 0 becomes 0.5 (it is at the threshold) and everything above it 1.

    Args:
        score: image scores or anomaly maps, >= 0.
        threshold: t >= 0.
    """
    total = score + threshold
    if isinstance(total, Tensor):
        return torch.where(total > 0, score / total, 0.5)  # type: ignore[return-value]
    if isinstance(total, np.ndarray):
        return np.divide(score, total, out=np.full_like(total, 0.5), where=total > 0)  # type: ignore[return-value]
    return score / total if total > 0 else 0.5  # type: ignore[return-value]
