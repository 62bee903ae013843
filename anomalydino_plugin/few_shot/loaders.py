"""Questions to a host framework's datasets, asked without importing it: which images, how large, which to take.

A dataset is anything with a ``samples`` table that has a column ``image_path`` (anomalib's), or a list
``image_filenames`` (its prediction dataset).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from anomalydino_plugin.errors import ConfigError, InputError
from anomalydino_plugin.host_images import image_paths


def reference_indices(
    paths: Sequence[str], shots: int | None, seed: int, calibration_shots: int = 0
) -> tuple[list[int], list[int]]:
    """Indices of reference and held-out images by the official rule: sorted paths, slice by seed.

    Args:
        paths: of the training images.
        shots: how many references; ``None`` for all.
        seed: which slice.
        calibration_shots: how many images after the slice are held out.

    Raises:
        InputError: there are fewer images.
    """
    order = sorted(range(len(paths)), key=lambda index: paths[index])
    if not order:
        raise InputError("the training set is empty: expected at least one normal image.")
    first, last = (0, len(order)) if shots is None else (seed * shots, (seed + 1) * shots)
    if last + calibration_shots > len(order):
        raise InputError(
            f"shots={shots}, seed={seed} and calibration_shots={calibration_shots} need {last + calibration_shots} "
            f"training images, found {len(order)}. Lower them, or add images."
        )
    return order[first:last], order[last : last + calibration_shots]


def only_these_images(dataset: Any, indices: list[int]) -> Any:
    """A copy of an anomalib dataset with some of its images."""
    return dataset.subsample(indices)


def refuse_mixed_sizes(loaders: Any) -> None:
    """Refuse loaders whose batches would hold images of several sizes: anomalib squashes them to one.

    Reads file headers, decodes nothing. Loaders of batch size 1 and datasets that resize are fine.

    Raises:
        ConfigError: naming two files with their sizes.
    """
    for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
        dataset = getattr(loader, "dataset", None)
        if dataset is None or (getattr(loader, "batch_size", 1) or 1) == 1 or getattr(dataset, "augmentations", None):
            continue
        _check_sizes(image_paths(dataset) if hasattr(dataset, "samples") or hasattr(dataset, "image_filenames") else [])


def _check_sizes(paths: Sequence[str]) -> None:
    first: tuple[str, tuple[int, int]] | None = None
    for path in paths:
        try:
            with Image.open(path) as image:
                size = image.size
        except OSError:
            continue  # the reader will say what is wrong with this file
        if first is None:
            first = path, size
        elif size != first[1]:
            raise ConfigError(
                f"images of several sizes in batches of several: {first[0]!r} is {first[1][0]} x {first[1][1]} and "
                f"{path!r} is {size[0]} x {size[1]} pixels; anomalib would squash them to one size. Set the batch "
                "size to 1 (eval_batch_size=1, train_batch_size=1)."
            )
