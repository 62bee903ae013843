"""Twice float32's digits, as unevaluated sums of two float32: OpenVINO turns every float64 of a graph into float32.

Legend: a pair (high, low) stands for high + low, |low| at most half a unit in the last place of high. Dekker's and
Knuth's error-free operations; contracted multiply-adds change nothing, as the products of halves are exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_SPLITTER = 4097.0  # 2^12 + 1: halves of 12 bits


class Pair(NamedTuple):
    """high + low, float32 of the same shape."""

    high: Tensor
    low: Tensor

    def where(self, condition: Tensor, other: Pair) -> Pair:
        """This where the condition holds, else the other."""
        return Pair(torch.where(condition, self.high, other.high), torch.where(condition, self.low, other.low))


def add(x: Pair, y: Pair | float) -> Pair:
    """Sum of both."""
    y_high, y_low = y if isinstance(y, Pair) else (torch.zeros_like(x.high) + y, torch.zeros_like(x.high))
    high, error = _two_sum(x.high, y_high)
    return _normal(high, error + (x.low + y_low))


def multiply(x: Pair, y: Pair) -> Pair:
    """Product of both."""
    high, error = _two_product(x.high, y.high)
    return _normal(high, error + (x.high * y.low + x.low * y.high))


def times(x: Pair, power: float) -> Pair:
    """A pair times a power of two, or times its negative."""
    return Pair(x.high * power, x.low * power)


def divide(x: Pair, y: Pair) -> Pair:
    """First over second."""
    high = x.high / y.high
    product = multiply(Pair(high, torch.zeros_like(high)), y)
    rest = add(x, times(product, -1.0))
    return _normal(high, (rest.high + rest.low) / y.high)


def _normal(high: Tensor, low: Tensor) -> Pair:
    total = high + low
    return Pair(total, low - (total - high))


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    total = a + b
    second = total - a
    return total, (a - (total - second)) + (b - second)


def _two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    product = a * b
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, error


def _halves(a: Tensor) -> tuple[Tensor, Tensor]:
    scaled = a * _SPLITTER
    high = scaled - (scaled - a)
    return high, a - high
