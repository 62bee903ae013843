"""What a host framework's reader makes of image files: which it cannot read, and which it reads otherwise than we do.

anomalib's datasets open files by themselves (``Image.open(path).convert("RGB")``). Neither its errors nor pixels are
ours: an error in the middle of a file does not name it, and some kinds of files decode to other pixels than
``decoding.read_image`` gives, hence to other scores. Both are said here; ``docs/reliability.md`` has the table.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from anomalydino_plugin.errors import ConfigError, ImageError

logger = logging.getLogger(__name__)
_ORIENTATION = 0x0112  # EXIF
_TURNED = range(2, 9)  # 1 is upright; other values mean nothing
_DEEP = ("I", "F")  # first letters of the modes of 16 and 32 bit and of floats
_SEARCH_SECONDS = 60.0


def image_paths(dataset: Any) -> list[str]:
    """Paths of a dataset's images, in its order.

    Args:
        dataset: anything with a ``samples`` table that has a column ``image_path``, or a list ``image_filenames``.

    Raises:
        ConfigError: the dataset does not name its images.
    """
    samples = getattr(dataset, "samples", None)
    if samples is not None and "image_path" in samples:
        return [str(path) for path in samples["image_path"]]
    if hasattr(dataset, "image_filenames"):
        return [str(path) for path in dataset.image_filenames]
    raise ConfigError(
        f"dataset {type(dataset).__name__} does not name its images: expected an anomalib dataset with a 'samples' "
        "table, as Folder and MVTecAD have."
    )


def paths_of_loaders(loaders: Any) -> list[str]:
    """Paths of all images of one loader or several; none of datasets that do not name theirs."""
    found: list[str] = []
    for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
        try:
            found += image_paths(getattr(loader, "dataset", None))
        except ConfigError:
            continue
    return found


def read_otherwise(path: str) -> str | None:
    """Why a file's pixels differ between the host's reader and ours; ``None`` where they do not, or it is no image.

    Reads the header alone.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if not Path(path).is_file():  # a pipe would be waited for
                return None
            with Image.open(path) as image:
                if image.getexif().get(_ORIENTATION) in _TURNED:
                    return "its EXIF orientation is not applied"
                if image.mode.startswith(_DEEP):
                    return f"its values ({image.mode}: 16 or 32 bit) are cut off at 255, not scaled"
                if image.mode in {"RGBA", "LA", "PA", "La", "RGBa"} or "transparency" in image.info:
                    return "its transparency is dropped, not laid over black"
        except Exception:  # the reader will say what is wrong with this file
            return None
    return None


def warn_of_other_pixels(paths: Iterable[str]) -> None:
    """One warning that counts the files that the host reads otherwise than `anomalydino score` does.

    Raises:
        ImageError: a pipe or a socket, which the host would wait for without end.
    """
    paths = list(paths)
    _refuse_endless(paths)
    found = [(path, reason) for path in paths if (reason := read_otherwise(path)) is not None]
    if found:
        path, reason = found[0]
        logger.warning(
            "%d image(s) are read otherwise by anomalib than by `anomalydino score` and FewShotModel, and score "
            "otherwise: %r, %s. Convert them to 8-bit RGB.",
            len(found),
            path,
            reason,
        )


def _refuse_endless(paths: Iterable[str]) -> None:
    for path in paths:
        place = Path(path)
        if place.is_fifo() or place.is_socket():
            raise ImageError(
                f"cannot read image {path!r}: it is a pipe or socket, expected a regular file. Remove or rename it."
            )


def first_unreadable(paths: Iterable[str]) -> tuple[str, str] | None:
    """The first file that Pillow cannot decode, and what it says; gives up after a minute."""
    until = time.monotonic() + _SEARCH_SECONDS
    for path in _while(paths, until):
        try:
            if not Path(path).is_file():
                return path, "no such regular file"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(path) as image:
                    image.convert("RGB")
        except Exception as error:
            return path, f"{type(error).__name__}: {error}"
    return None


def _while(paths: Iterable[str], until: float) -> Iterator[str]:
    for path in paths:
        if time.monotonic() > until:
            return
        yield path


def name_unreadable(paths: Iterable[str], exception: BaseException) -> None:
    """After a failed run: log which file the host could not read, as its error may not say."""
    if not isinstance(exception, Exception):
        return  # Ctrl-C
    found = first_unreadable(paths)
    if found is not None and found[0] not in str(exception):
        logger.error(
            "anomalib could not read %r (%s). Replace or remove it; `anomalydino score` notes such files and goes on.",
            *found,
        )
