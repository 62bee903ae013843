"""Where images come from: folder, tree or manifest -> records with stable ids.

Four layouts are understood, told apart by what is there:

- an MVTec-style tree ``ROOT/CATEGORY/{train/good,test/LABEL,ground_truth/LABEL}``;
- one category folder of that kind;
- a flat folder of images (any depth), whose normal images are given apart;
- a manifest, CSV or Parquet, with a column ``uri`` and optionally ``category``, ``split``, ``label``, ``mask_uri``
  and ``image_id``; relative URIs start at the manifest's folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anomalydino_plugin import InputError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
GOOD = "good"
_MANIFEST_SUFFIXES = frozenset({".csv", ".parquet"})
_ID_LENGTH = 20  # hexadecimal digits: 80 bits, no collision below a billion images


@dataclass(frozen=True, order=True)
class ImageRecord:
    """One image to process.

    Attributes:
        image_id: does not change when files are added, listed in another order, or moved as a tree.
        uri: where it is, folder and name kept.
        category: object or texture it shows.
        split: ``"train"`` or ``"test"``.
        label: ``"good"``, the kind of defect, or ``None`` where unknown.
        mask_uri: ground truth, or ``None``.
    """

    image_id: str
    uri: str
    category: str
    split: str = "test"
    label: str | None = None
    mask_uri: str | None = None


@dataclass(frozen=True)
class Inputs:
    """What a run works on.

    Attributes:
        images: images to score, sorted by category and id.
        references: normal images by category, sorted by path.
    """

    images: tuple[ImageRecord, ...]
    references: dict[str, tuple[ImageRecord, ...]]

    @property
    def categories(self) -> tuple[str, ...]:
        """Categories that have images to score, sorted."""
        return tuple(sorted({record.category for record in self.images}))


def image_id(category: str, relative: str) -> str:
    """Stable id from the category and the path inside it (with forward slashes)."""
    return hashlib.sha256(f"{category}/{relative}".encode("utf-8", "surrogateescape")).hexdigest()[:_ID_LENGTH]


def discover(images: str, *, categories: Iterable[str] | None = None, references: str | None = None) -> Inputs:
    """Find the images to score and their normal images.

    Args:
        images: see the module docstring.
        categories: keep only these.
        references: folder whose images serve as normal images of every category.

    Raises:
        InputError: nothing there, an unknown category, or no normal images for one; says what was looked for.
    """
    root = Path(images).expanduser().resolve()
    if not root.exists():
        raise InputError(f"images {images!r} does not exist. Give a folder, a tree or a manifest.")
    if root.is_file():
        records = list(_read_manifest(root))
    else:
        records = [record for folder in _category_folders(root) for record in _read_category(folder)] or list(
            _read_flat(root)
        )
    records = _only(records, categories, images)
    to_score = tuple(sorted((r for r in records if r.split == "test"), key=lambda r: (r.category, r.image_id)))
    if not to_score:
        raise InputError(
            f"no images to score under {images!r}. Expected {'/'.join(sorted(IMAGE_SUFFIXES))} files, as "
            "CATEGORY/test/LABEL/*.png, in one folder, or listed in a manifest with split 'test'."
        )
    _check_unique(to_score)
    return Inputs(to_score, _references(records, to_score, references))


def choose_references(
    available: tuple[ImageRecord, ...], shots: int | None, seed: int, category: str
) -> tuple[ImageRecord, ...]:
    """The official rule: sorted paths, slice ``seed * shots : (seed + 1) * shots``.

    Args:
        available: sorted by path.
        shots: how many; ``None`` or -1 for all.
        seed: which slice.
        category: for the message.

    Raises:
        InputError: fewer images than asked for.
    """
    if shots is None or shots == -1:
        return available
    chosen = available[seed * shots : (seed + 1) * shots]
    if len(chosen) < shots:
        raise InputError(
            f"category {category!r}: shots={shots} with seed={seed} needs {(seed + 1) * shots} normal images, "
            f"found {len(available)}. Lower --shots or --seed, or add images."
        )
    return chosen


def list_images(folder: Path) -> list[Path]:
    """Image files below a folder, sorted; files with other endings are left alone."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def _category_folders(root: Path) -> list[Path]:
    if (root / "test").is_dir():
        return [root]
    return sorted(child for child in root.iterdir() if child.is_dir() and (child / "test").is_dir())


def _read_category(folder: Path) -> Iterator[ImageRecord]:
    for path in list_images(folder / "train" / GOOD):
        yield _record(folder.name, folder, path, split="train", label=GOOD)
    for path in list_images(folder / "test"):
        parts = path.relative_to(folder / "test").parts
        label = parts[0] if len(parts) > 1 else None
        yield _record(folder.name, folder, path, split="test", label=label, mask=_mask_of(folder, path, label))


def _mask_of(folder: Path, path: Path, label: str | None) -> Path | None:
    if label is None or label == GOOD:
        return None
    truth = folder / "ground_truth" / label
    for name in (f"{path.stem}_mask.png", f"{path.stem}.png"):
        if (truth / name).is_file():
            return truth / name
    return None


def _read_flat(root: Path) -> Iterator[ImageRecord]:
    for path in list_images(root):
        yield _record(root.name, root, path, split="test")


def _record(
    category: str, base: Path, path: Path, *, split: str, label: str | None = None, mask: Path | None = None
) -> ImageRecord:
    relative = path.relative_to(base).as_posix()
    return ImageRecord(
        image_id(category, relative), str(path), category, split, label, None if mask is None else str(mask)
    )


def _read_manifest(path: Path) -> Iterator[ImageRecord]:
    if path.suffix.lower() not in _MANIFEST_SUFFIXES:
        raise InputError(f"{str(path)!r} is a file: expected a folder, or a manifest ending in .csv or .parquet.")
    for row in _manifest_rows(path):
        uri = str(row["uri"])
        located = uri if "://" in uri else str((path.parent / uri).resolve())
        category = _text(row.get("category")) or path.stem
        mask = _text(row.get("mask_uri"))
        yield ImageRecord(
            image_id=_text(row.get("image_id")) or image_id(category, uri),
            uri=located,
            category=category,
            split=_text(row.get("split")) or "test",
            label=_text(row.get("label")),
            mask_uri=None if mask is None else mask if "://" in mask else str((path.parent / mask).resolve()),
        )


def _manifest_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa  # heavy: only when there is a manifest
    import pyarrow.csv
    import pyarrow.parquet

    try:
        is_parquet = path.suffix.lower() == ".parquet"
        table = pyarrow.parquet.read_table(path) if is_parquet else _read_csv_as_text(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"cannot read manifest {str(path)!r}: {error}. Expected CSV with a header, or Parquet."
        ) from error
    if "uri" not in table.column_names:
        raise InputError(
            f"manifest {str(path)!r} has columns {table.column_names}: expected 'uri', and optionally 'category', "
            "'split', 'label', 'mask_uri', 'image_id'."
        )
    rows: list[dict[str, Any]] = table.to_pylist()
    empty = [number for number, row in enumerate(rows, 1) if _text(row["uri"]) is None]
    if empty:
        raise InputError(
            f"manifest {str(path)!r} has no 'uri' in row {empty[0]} (and {len(empty) - 1} more). Fill it in."
        )
    return rows


def _read_csv_as_text(path: Path) -> Any:
    import pyarrow as pa
    from pyarrow import csv

    with path.open("rb") as file:
        names = csv.open_csv(file).schema.names
    # All columns as text: a category called 01 must stay 01.
    convert = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True)
    return csv.read_csv(path, convert_options=convert)


def _text(value: object) -> str | None:
    return None if value is None or str(value) == "" else str(value)


def _only(records: list[ImageRecord], categories: Iterable[str] | None, images: str) -> list[ImageRecord]:
    if categories is None:
        return records
    wanted = set(categories)
    present = {record.category for record in records}
    if missing := sorted(wanted - present):
        raise InputError(f"no category {missing[0]!r} under {images!r}: found {sorted(present)}.")
    return [record for record in records if record.category in wanted]


def _check_unique(records: Iterable[ImageRecord]) -> None:
    seen: dict[str, ImageRecord] = {}
    for record in records:
        if (other := seen.setdefault(record.image_id, record)) is not record:
            raise InputError(
                f"image_id {record.image_id!r} stands for both {other.uri!r} and {record.uri!r}: expected one row "
                "for each image. Remove the duplicate or give distinct ids."
            )


def _references(
    records: list[ImageRecord], images: tuple[ImageRecord, ...], folder: str | None
) -> dict[str, tuple[ImageRecord, ...]]:
    categories = sorted({record.category for record in images})
    if folder is not None:
        return dict.fromkeys(categories, _reference_folder(folder))
    found = {}
    for category in categories:
        normal = [r for r in records if r.category == category and r.split == "train" and r.label in {GOOD, None}]
        if not normal:
            raise InputError(
                f"category {category!r} has no normal images: expected files in its train/{GOOD} folder (or split "
                "'train' in the manifest), or --references DIR."
            )
        found[category] = tuple(sorted(normal, key=lambda record: record.uri))
    return found


def _reference_folder(folder: str) -> tuple[ImageRecord, ...]:
    root = Path(folder).expanduser().resolve()
    paths = list_images(root) if root.is_dir() else []
    if not paths:
        raise InputError(f"--references {folder!r} has no images: expected a folder of normal images.")
    # An id of its own: a folder of references may share name and file names with the folder to score.
    return tuple(
        ImageRecord(
            image_id(root.name, f"references/{path.relative_to(root).as_posix()}"), str(path), root.name, "train", GOOD
        )
        for path in paths
    )
