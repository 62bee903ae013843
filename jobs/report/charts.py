"""Numbers of ``curves`` -> shapes in the pixels of an SVG chart, as the template draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.report.curves import Curve, Histogram

WIDTH, HEIGHT = 340, 210  # of a chart, with its margins
LEFT, RIGHT, TOP, BOTTOM = 40, 12, 12, 34
_ACROSS, _DOWN = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
_TICKS = 4
Shape = dict[str, Any]


def histogram_chart(histogram: Histogram, threshold: float | None) -> Shape:
    """Stacked bars, axes and the threshold's line."""
    highest = max(1, int(np.sum(list(histogram.counts.values()), axis=0).max()))
    width = _ACROSS / len(next(iter(histogram.counts.values())))
    below = np.zeros(len(next(iter(histogram.counts.values()))), np.int64)
    series = []
    for name, counts in histogram.counts.items():
        series.append({"name": name, "total": int(counts.sum()), "path": _bars(counts, below, width, highest)})
        below = below + counts
    span = histogram.high - histogram.low
    return {
        "series": series,
        "x_ticks": [
            (LEFT + _ACROSS * share, f"{histogram.low + span * share:.3g}") for share in np.linspace(0, 1, _TICKS + 1)
        ],
        "y_ticks": [(_height(count / highest), str(count)) for count in _whole_ticks(highest)],
        "threshold": None if threshold is None else LEFT + _ACROSS * (threshold - histogram.low) / span,
    }


def _bars(counts: NDArray[np.int64], below: NDArray[np.int64], width: float, highest: int) -> str:
    shapes = []
    for index in np.flatnonzero(counts):
        bottom, top = (_height(value / highest) for value in (below[index], below[index] + counts[index]))
        left = LEFT + index * width
        shapes.append(f"M{left + 0.4:.1f} {bottom:.1f}V{top:.1f}H{left + width - 0.4:.1f}V{bottom:.1f}Z")
    return "".join(shapes)


def _whole_ticks(highest: int) -> Sequence[int]:
    step = max(1, -(-highest // _TICKS))
    return range(0, highest + 1, step)


def curve_chart(curve: Curve) -> Shape:
    """A line on unit axes, and the point of the run's own threshold."""
    points = "L".join(f"{_across(x):.1f} {_height(y):.1f}" for x, y in zip(curve.x, curve.y, strict=True))
    marks = np.linspace(0, 1, _TICKS + 1)
    point = curve.at_threshold
    return {
        "path": f"M{points}",
        "x_ticks": [(_across(mark), f"{mark:g}") for mark in marks],
        "y_ticks": [(_height(mark), f"{mark:g}") for mark in marks],
        "point": None if point is None else (_across(point[0]), _height(point[1])),
    }


def _across(share: float) -> float:
    return float(LEFT + _ACROSS * share)


def _height(share: float) -> float:
    return float(TOP + _DOWN * (1 - share))
