"""Calibrate a fitted few-shot model on normal images alone.

Where the normal scores come from, best first:

1. held-out normal images, where given: unbiased;
2. leave-one-image-out over the references (k >= 2): each upright reference against the bank without its image. The
   bank is one image smaller, so thresholds come out slightly high;
3. the rotations of a single reference: each view against the other rotations of the same image. This knows nothing
   of how one part differs from the next, and interpolation makes views differ in ways that test images do not:
   a stopgap until a second normal image is there.

Legend: ``h w`` patch grid.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anomalydino_plugin.calibration import FALSE_ALARM_TARGET, threshold_from_normals
from anomalydino_plugin.detection import Detection
from anomalydino_plugin.errors import BankError
from anomalydino_plugin.few_shot.torch_model import FewShotModel
from anomalydino_plugin.kernels.rows import search_rows
from anomalydino_plugin.matching import nearest
from anomalydino_plugin.memory_bank import MemoryBank
from anomalydino_plugin.preprocessing import RgbImage

CalibrationSource = Literal["held-out", "leave-one-out", "rotations"]


class Calibration(NamedTuple):
    """Thresholds on raw values.

    Attributes:
        image_threshold: for image scores.
        pixel_threshold: for anomaly maps.
        source: where the normal scores came from.
        images: how many there were.
        scores: their image scores.
        peaks: maxima of their anomaly maps.
    """

    image_threshold: float
    pixel_threshold: float
    source: CalibrationSource
    images: int
    scores: tuple[float, ...]
    peaks: tuple[float, ...]


def calibrate(
    model: FewShotModel,
    held_out: Iterable[str | os.PathLike[str] | RgbImage] | None = None,
    *,
    false_alarm: float = FALSE_ALARM_TARGET,
) -> Calibration:
    """Thresholds for a fitted model; see the module docstring.

    Args:
        model: with a bank.
        held_out: normal images that are not in the bank.
        false_alarm: share of normal images that may exceed the image threshold.

    Raises:
        BankError: an empty bank, or a single unrotated reference, from which nothing can be learned.
        InputError: ``held_out`` is empty.
    """
    source: CalibrationSource
    if held_out is not None:
        source, detections = "held-out", [model.score(image) for image in held_out]
    else:
        bank = model.bank
        source = "leave-one-out" if len(bank.image_ids) > 1 else "rotations"
        detections = list(_reference_detections(model, bank, source))
    scores = [detection.score for detection in detections]
    peaks = [float(model.anomaly_map(detection).max()) for detection in detections]
    return Calibration(
        threshold_from_normals(scores, false_alarm=false_alarm),
        threshold_from_normals(peaks, false_alarm=false_alarm),
        source,
        len(scores),
        tuple(scores),
        tuple(peaks),
    )


def _reference_detections(model: FewShotModel, bank: MemoryBank, source: CalibrationSource) -> Iterator[Detection]:
    images, angles = bank.sources[:, 0], bank.sources[:, 1]
    if source == "leave-one-out":
        upright = bank.angles.index(0.0) if 0.0 in bank.angles else 0
        for image in range(len(bank.image_ids)):
            yield _score_rows(model, bank, (images == image) & (angles == upright), images != image)
        return
    if len(bank.angles) < 2:
        raise BankError(
            "cannot calibrate from a single unrotated reference image: expected rotations, a second reference image, "
            "or held-out normal images (calibration images)."
        )
    for angle in range(len(bank.angles)):
        yield _score_rows(model, bank, angles == angle, angles != angle)


def _score_rows(model: FewShotModel, bank: MemoryBank, query: Tensor, reference: Tensor) -> Detection:
    """Score one view of a reference from its rows in the bank against other rows of the bank."""
    view = query.nonzero()[:, 0]
    image = int(bank.sources[view[0], 0])
    height, width = bank.sizes[image]
    plan = model.plan_size(height, width)
    kept = view[bank.foreground[view]] if model.use_mask else view
    others = search_rows(bank.rows[reference], kernel=model.kernel)
    count = min(model.k, len(others.rows))
    match = nearest(bank.rows[kept], others, k=count, block_elements=model.block_elements)
    distances = torch.zeros(plan.grid, dtype=torch.float32)
    row, column = bank.sources[kept, 2].long().cpu(), bank.sources[kept, 3].long().cpu()
    distances[row, column] = match.distances.mean(dim=1).cpu()
    foreground = np.zeros(plan.grid, dtype=bool)
    foreground[row.numpy(), column.numpy()] = True
    unmatched = torch.full(plan.grid, -1, dtype=torch.int64)
    return model.detection(distances.reshape(-1), unmatched, foreground, plan)
