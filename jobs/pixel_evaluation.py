"""Pixel metrics of one category of a run: maps from stored patch distances, masks from their files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from anomalydino_plugin import AnomalousLevels, AnomalyDINOError, InputError, PixelCounts, PixelMetrics
from jobs.inputs import GOOD
from jobs.progress import ImageProgress
from jobs.scored_run import ScoredImage, ScoredRun
from jobs.truth import read_mask


class PixelResult(NamedTuple):
    """Pixel metrics of one category.

    Attributes:
        images: that are in the metrics.
        metrics: ``None`` where no pixel is anomalous, or none is normal.
        problems: masks or maps that could not be used, a message for each.
    """

    images: int
    metrics: PixelMetrics | None
    problems: tuple[str, ...]


def usable(images: Sequence[ScoredImage]) -> list[ScoredImage]:
    """Images whose truth is known for each pixel: those with a mask, and good ones."""
    return [image for image in images if image.mask_uri is not None or image.label == GOOD]


def passes(images: Sequence[ScoredImage]) -> int:
    """Maps that will be made: two for an image with a mask; 0 where no image has one."""
    masked = sum(image.mask_uri is not None for image in images)
    return masked + len(usable(images)) if masked else 0


def evaluate_pixels(run: ScoredRun, category: str, progress: ImageProgress) -> PixelResult:
    """Pixel metrics of one category at full resolution.

    Args:
        run: read back.
        category: which.
        progress: advanced for each map.
    """
    with _one_thread():
        return _evaluate(run, category, progress)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A map is a product of a millisecond: waiting for a second thread takes longer, and sums in another order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _evaluate(run: ScoredRun, category: str, progress: ImageProgress) -> PixelResult:
    images = {image.image_id: image for image in usable(run.images[category])}
    levels, problems = AnomalousLevels(), _Problems()
    for image_id, distances in run.distances(category):
        image = images.get(image_id)
        if image is not None and image.mask_uri is not None:
            with problems.of(image):
                levels.add(run.anomaly_map(image, distances), read_mask(image.mask_uri, image.size))
            progress.advance(1)
    if not levels.regions:
        return PixelResult(0, None, tuple(problems.messages))
    counts = PixelCounts(levels)
    for image_id, distances in run.distances(category):
        if image_id in images and image_id not in problems.ids:
            with problems.of(images[image_id]):
                counts.add(run.anomaly_map(images[image_id], distances))
        progress.advance(int(image_id in images))
    try:
        return PixelResult(len(images) - len(problems.ids), counts.metrics(), tuple(problems.messages))
    except InputError as error:  # every pixel is anomalous
        return PixelResult(0, None, (*problems.messages, f"category {category!r}: {error}"))


class _Problems:
    """Images that are left out, and why."""

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self.messages: list[str] = []
        self._image: ScoredImage | None = None

    def of(self, image: ScoredImage) -> _Problems:
        self._image = image
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, AnomalyDINOError) or self._image is None:
            return False
        self.ids.add(self._image.image_id)
        self.messages.append(f"{self._image.uri}: {error}")
        return True
