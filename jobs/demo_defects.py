"""Realistic defects for the demo: each changes an image inside a soft mask and returns the mask.

Legend: ``H W`` pixels. Every function takes an (H, W, 3) float32 image in [0, 1] and a seeded generator, and returns
the damaged image and an alpha in [0, 1]; nothing changes where alpha is 0.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]
Defect = Callable[[Image, np.random.Generator], tuple[Image, Image]]


def scratch(image: Image, rng: np.random.Generator) -> tuple[Image, Image]:
    """A curved groove: dark in its depth, bright along one edge."""
    height, width = image.shape[:2]
    start = rng.uniform(0.2, 0.8, 2) * (width, height)
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 0.5) * width
    steps = np.linspace(0, 1, 40)
    bend = rng.uniform(-0.15, 0.15) * length
    direction, normal = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    points = start + steps[:, None] * length * direction + (bend * np.sin(np.pi * steps))[:, None] * normal
    thickness = max(3, int(rng.uniform(0.012, 0.02) * width))
    groove = _stroke(image.shape[:2], points, thickness)
    edge = _stroke(image.shape[:2], points + normal * thickness * 0.8, max(1, thickness // 2))
    alpha = np.maximum(groove, edge)
    damaged = image * (1 - 0.65 * groove[..., None])
    return _blend(image, damaged + 0.35 * (edge * (1 - groove))[..., None], alpha), alpha


def stain(image: Image, rng: np.random.Generator) -> tuple[Image, Image]:
    """A brown liquid stain with a darker rim."""
    alpha = _blob(image.shape[:2], rng, rng.uniform(0.10, 0.17))
    rim = np.clip(1 - np.abs(alpha - 0.5) * 4, 0, 1)
    tint = np.array([0.55, 0.36, 0.16], dtype=np.float32)
    wet = image * (0.35 + 0.65 * tint) * (1 - 0.3 * rim[..., None])
    return _blend(image, wet, alpha), alpha


def hole(image: Image, rng: np.random.Generator) -> tuple[Image, Image]:
    """A hole with a shadow on its inner side."""
    alpha = np.clip((_blob(image.shape[:2], rng, rng.uniform(0.06, 0.10)) - 0.3) * 6, 0, 1)
    shadow = np.clip(alpha - np.roll(alpha, (4, 4), (0, 1)), 0, 1)
    depth = 0.10 + 0.12 * (1 - shadow)
    return _blend(image, np.repeat(depth[..., None], 3, 2).astype(np.float32), alpha), alpha


def paint(image: Image, rng: np.random.Generator) -> tuple[Image, Image]:
    """A splash of glossy paint."""
    alpha = np.clip((_blob(image.shape[:2], rng, rng.uniform(0.07, 0.12)) - 0.25) * 4, 0, 1)
    colours = np.array([[0.75, 0.1, 0.1], [0.1, 0.25, 0.7], [0.9, 0.8, 0.15]], dtype=np.float32)
    colour = colours[rng.integers(len(colours))]
    light = cv2.GaussianBlur(alpha, (0, 0), 3)
    relief = np.clip(light - np.roll(light, (-3, -3), (0, 1)), -0.4, 0.4)
    return _blend(image, np.clip(colour + 0.8 * relief[..., None], 0, 1), alpha), alpha


def warp(image: Image, rng: np.random.Generator) -> tuple[Image, Image]:
    """A region whose structure is twisted, as after a dent."""
    height, width = image.shape[:2]
    centre = rng.uniform(0.3, 0.7, 2) * (width, height)
    radius = rng.uniform(0.16, 0.22) * width
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    dx, dy = x - centre[0], y - centre[1]
    inside = np.clip(1 - np.hypot(dx, dy) / radius, 0, 1).astype(np.float32)
    turn = (rng.choice([-1, 1]) * rng.uniform(2.0, 2.8) * inside**1.2).astype(np.float32)
    map_x = (centre[0] + dx * np.cos(turn) - dy * np.sin(turn)).astype(np.float32)
    map_y = (centre[1] + dx * np.sin(turn) + dy * np.cos(turn)).astype(np.float32)
    twisted = cv2.remap(image, map_x, map_y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101)
    alpha = (np.clip(inside * 6, 0, 1)).astype(np.float32)
    return _blend(image, np.clip(twisted, 0, 1) * (1 - 0.15 * alpha[..., None]), alpha), alpha


DEFECTS: dict[str, Defect] = {"scratch": scratch, "stain": stain, "hole": hole, "paint": paint, "dent": warp}


def _stroke(shape: tuple[int, int], points: NDArray[np.float64], thickness: int) -> Image:
    canvas = np.zeros(shape, np.uint8)
    cv2.polylines(canvas, [np.round(points).astype(np.int32)], False, 255, thickness, cv2.LINE_AA)
    return np.asarray(canvas / 255, dtype=np.float32)


def _blob(shape: tuple[int, int], rng: np.random.Generator, radius: float) -> Image:
    """A smooth irregular spot in [0, 1]; ``radius`` as a share of the width."""
    height, width = shape
    angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    wobble = sum(rng.uniform(0.05, 0.18) / n * np.cos(n * angles + rng.uniform(0, 6.3)) for n in (1, 2, 3, 5))
    edge = radius * width * (1 + wobble)
    centre = rng.uniform(0.25, 0.75, 2) * (width, height)
    points = centre + np.stack([edge * np.cos(angles), edge * np.sin(angles)], 1)
    canvas = np.zeros(shape, np.uint8)
    cv2.fillPoly(canvas, [np.round(points).astype(np.int32)], 255)
    soft = cv2.GaussianBlur(canvas.astype(np.float32) / 255, (0, 0), max(1.0, 0.012 * width))
    return np.where(soft < 0.02, 0, soft).astype(np.float32)


def _blend(image: Image, damaged: Image, alpha: Image) -> Image:
    return np.clip(image * (1 - alpha[..., None]) + damaged * alpha[..., None], 0, 1).astype(np.float32)
