"""The first pass over a host framework's loader: every image once, one by one, at its own size.

Iterating the trainer's own loader would leave nothing for the second pass, and its batches may hold images squashed to
one size. So a second loader reads the same dataset; the passes are joined by image path, or by a hash of the pixels
where a dataset has no paths.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from anomalydino_plugin.errors import ConfigError
from anomalydino_plugin.image_tensors import to_uint8
from anomalydino_plugin.preprocessing import RgbImage

Transform = Callable[[Tensor], Tensor]


def image_key(path: str | None, pixels: RgbImage) -> str:
    """What joins the two passes: the path, or a hash of the pixels."""
    return path if path else hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def read_all(loader: Any, limit: float, transform: Transform | None) -> Iterator[tuple[str, RgbImage]]:
    """Key and (H, W, 3) uint8 of every image that the loader's batches will hold.

    Args:
        loader: a ``DataLoader``; its dataset's items have ``image`` (3, H, W) in [0, 1] and perhaps ``image_path``.
        limit: batches that the second pass will read, as ``limit_test_batches`` sets it. It counts where the loader
            keeps the dataset's order; a shuffled one is read as a whole, as it may show any of its images.
        transform: what the host applies to images before the model.

    Raises:
        ConfigError: no ``DataLoader``, or items without an image.
    """
    for item in _items(loader, limit):
        image = getattr(item, "image", None)
        if image is None:
            raise ConfigError(
                f"the dataset yields {type(item).__name__} without an image: expected anomalib's items, as Folder, "
                "MVTecAD and PredictDataset yield."
            )
        images = image[None] if transform is None else transform(image[None])
        pixels = to_uint8(images)[0]
        yield image_key(getattr(item, "image_path", None), pixels), pixels


def count_images(loader: Any, limit: float) -> int | None:
    """How many images ``read_all`` will yield, for a progress bar; ``None`` where the loader does not know."""
    try:
        return min(len(_sampler(loader)), _limited(loader, limit) or len(_sampler(loader)))
    except TypeError:
        return None


def _items(loader: Any, limit: float) -> Iterable[Any]:
    if not isinstance(loader, DataLoader):
        raise ConfigError(
            f"{type(loader).__name__} as a loader: expected torch's DataLoader, whose dataset can be read twice."
        )
    streamed = isinstance(loader.dataset, IterableDataset)
    own: DataLoader[Any] = DataLoader(
        loader.dataset,
        batch_size=None if streamed else 1,
        sampler=None if streamed else _sampler(loader),
        num_workers=loader.num_workers,
        collate_fn=None if streamed else _only,
        multiprocessing_context=loader.multiprocessing_context,
    )
    return itertools.islice(own, _limited(loader, limit))


def _only(items: list[Any]) -> Any:
    """Collate of batches of one: the item itself."""
    return items[0]


def _sampler(loader: Any) -> Any:
    """The sampler below batching; Lightning puts its own batch sampler around it in prediction."""
    return getattr(loader.batch_sampler, "sampler", loader.sampler)


def _limited(loader: Any, limit: float) -> int | None:
    """Images in the first ``limit`` batches; ``None`` for all."""
    batch_size = getattr(loader.batch_sampler, "batch_size", None) or loader.batch_size or 1
    in_order = isinstance(_sampler(loader), SequentialSampler)
    try:
        shortened = limit < len(loader)
    except TypeError:
        shortened = limit != float("inf")
        in_order = True
    return int(limit) * batch_size if shortened and in_order else None
