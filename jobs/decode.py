"""Decode images of a shard: a plain function that knows no Ray.

Legend: ``h w`` patch grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anomalydino_plugin import (
    AnomalyDINOError,
    Geometry,
    ImageError,
    ResourceError,
    plan_geometry,
    prepare_pixels,
    read_image,
)
from jobs.filesystem import image_source
from jobs.inputs import ImageRecord


class Failure(NamedTuple):
    """Why one image could not be processed."""

    record: ImageRecord
    stage: str
    error_type: str
    message: str


class Decoded(NamedTuple):
    """One image ready for the backbone.

    Attributes:
        record: which image.
        plan: its sizes.
        pixels: (h * patch_size, w * patch_size, 3) uint8.
    """

    record: ImageRecord
    plan: Geometry
    pixels: NDArray[np.uint8]


def decode(
    records: Sequence[ImageRecord], resolution: int, patch_size: int, max_pixels: int | None = None
) -> tuple[list[Decoded], list[Failure]]:
    """Read, resize and crop images; what cannot be read becomes a failure and stops nothing.

    Args:
        records: images of one shard.
        resolution: smaller edge, pixels.
        patch_size: pixels.
        max_pixels: see ``read``.

    Raises:
        ResourceError, MemoryError: what the machine has ran out.
    """
    decoded, failures = [], []
    for record in records:
        try:
            image = read(record.uri, max_pixels)
            plan = _plan(image, record.uri, resolution, patch_size)
            decoded.append(Decoded(record, plan, prepare_pixels(image, resolution, patch_size)))
        except ResourceError:
            raise  # no image is at fault: with more room it can be read
        except AnomalyDINOError as error:
            failures.append(Failure(record, "decode", type(error).__name__, str(error)))
    return decoded, failures


def read(uri: str, max_pixels: int | None = None) -> NDArray[np.uint8]:
    """Decode an image by path or URI, (H, W, 3) uint8.

    Args:
        uri: where it is.
        max_pixels: refuse larger images; ``read_image``'s limit if not given.

    Raises:
        ImageError: it cannot be read or decoded.
    """
    limit = {} if max_pixels is None else {"max_pixels": max_pixels}
    return read_image(image_source(uri), name=uri, **limit)


def _plan(image: NDArray[np.uint8], uri: str, resolution: int, patch_size: int) -> Geometry:
    try:
        return plan_geometry(image.shape[0], image.shape[1], resolution, patch_size)
    except ImageError as error:
        raise ImageError(f"cannot use image {uri!r}: {error}") from error


def batches(decoded: Sequence[Decoded], size: int) -> list[list[Decoded]]:
    """Cut images into batches of one grid shape, by order and size alone.

    What is finished, or which worker is free, must not matter: the same batches give the same bytes.
    """
    by_grid: dict[tuple[int, int], list[Decoded]] = {}
    for item in decoded:
        by_grid.setdefault(item.plan.grid, []).append(item)
    return [items[start : start + size] for items in by_grid.values() for start in range(0, len(items), size)]
