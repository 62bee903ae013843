"""VisA as it is downloaded: its split CSV -> records.

    ROOT/split_csv/1cls.csv             object,split,label,image,mask; paths start at ROOT
    ROOT/CATEGORY/Data/Images/{Normal,Anomaly}/*.JPG
    ROOT/CATEGORY/Data/Masks/Anomaly/*.png

Source: Zou et al. 2022, SPot-the-Difference, and the split files of its repository. The one-class layout that the
repository's script makes of it (ROOT/CATEGORY/{train,test,ground_truth}) is that of MVTec, and needs nothing of this.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import PurePosixPath

from anomalydino_plugin import InputError
from jobs.filesystem import Folder
from jobs.records import ImageRecord, image_id

_FOLDER, _DEFAULT = "split_csv", "split_csv/1cls.csv"
_MANIFESTS = frozenset({".csv", ".parquet"})
_COLUMNS = ("object", "split", "label", "image", "mask")
_SPLITS = ("train", "test")
_LABELS = {"normal": "good", "anomaly": "bad"}  # as the one-class layout calls them


def split_of(images: str) -> tuple[Folder, str] | None:
    """The dataset's folder and its split file, where ``images`` is one of the two; ``None`` where it is neither.

    Args:
        images: path or URI of ROOT, or of a CSV file in ROOT/split_csv.
    """
    address, mark, options = images.partition("?")
    path = PurePosixPath(address)
    if path.suffix.lower() == ".csv" and path.parent.name == _FOLDER:
        end = f"{_FOLDER}/{path.name}"
        return Folder((address.removesuffix(end) or ".") + mark + options), end
    if path.suffix.lower() in _MANIFESTS:
        return None
    root = Folder(images)
    try:
        return (root, _DEFAULT) if root.has(_DEFAULT) else None
    except OSError:  # whoever lists the folder says why
        return None


def read(root: Folder, split: str) -> Iterator[ImageRecord]:
    """The rows of a split file, with the labels ``good`` and ``bad``.

    Args:
        root: the dataset.
        split: the file, relative to it.

    Raises:
        InputError: it cannot be read, or a row is not as VisA's are; names file and row.
    """
    name = root.uri(split)
    try:
        rows = csv.DictReader(io.StringIO(root.read(split).decode("utf-8-sig")))
        if tuple(rows.fieldnames or ()) != _COLUMNS:
            raise InputError(f"split file {name!r} has columns {rows.fieldnames}: expected {list(_COLUMNS)}.")
        for number, row in enumerate(rows, 1):
            yield _record(root, row, f"split file {name!r}, row {number}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read split file {name!r}: {error}. Expected VisA's own CSV.") from error


def _record(root: Folder, row: dict[str, str | None], where: str) -> ImageRecord:
    category, split, label, image, mask = ((row[column] or "").strip() for column in _COLUMNS)
    if split not in _SPLITS or label not in _LABELS or not category:
        raise InputError(
            f"{where}: object {category!r}, split {split!r}, label {label!r}; expected a name, one of {_SPLITS}, and "
            f"one of {tuple(_LABELS)}."
        )
    return ImageRecord(
        image_id=image_id(category, image.removeprefix(f"{category}/")),
        uri=root.uri(_inside(image, where)),
        category=category,
        split=split,
        label=_LABELS[label],
        mask_uri=root.uri(_inside(mask, where)) if mask else None,
    )


def _inside(name: str, where: str) -> str:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "://" in name:
        raise InputError(f"{where}: file {name!r}, expected a path inside the dataset's folder.")
    return name
