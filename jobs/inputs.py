"""Where images come from: folder, tree or manifest -> records with stable ids.

Five layouts are understood, told apart by what is there:

- an MVTec-style tree ``ROOT/CATEGORY/{train/good,test/LABEL,ground_truth/LABEL}``;
- one category folder of that kind;
- VisA as it is downloaded, ``ROOT/split_csv/1cls.csv``, or one of its split files (its one-class layout is the first);
- a flat folder of images (any depth), whose normal images are given apart;
- a manifest, CSV or Parquet, with a column ``uri`` and optionally ``category``, ``split``, ``label``, ``mask_uri``
  and ``image_id``; relative URIs start at the manifest's folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import quote

from anomalydino_plugin import InputError
from jobs import manifest, visa
from jobs.filesystem import Folder
from jobs.records import ImageRecord, image_id

__all__ = [
    "GOOD",
    "IMAGE_SUFFIXES",
    "ImageRecord",
    "Inputs",
    "choose_references",
    "discover",
    "image_id",
    "list_images",
]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
GOOD = "good"
_LONGEST_CATEGORY = 150  # bytes as a folder name: names of files are made of it, and hold 255


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


def discover(
    images: str,
    *,
    categories: Iterable[str] | None = None,
    references: str | None = None,
    normal: bool = True,
    to_score: bool = True,
) -> Inputs:
    """Find the images to score and their normal images.

    Args:
        images: see the module docstring; a path or URI.
        categories: keep only these.
        references: folder whose images serve as normal images of every category.
        normal: whether normal images are needed.
        to_score: whether images to score are.

    Raises:
        InputError: nothing there, an unknown category, or no normal images for one; says what was looked for.
    """
    records = _only(_read(images), categories, images)
    for category in {record.category for record in records}:
        _check_category(category, images)
    found = tuple(sorted((r for r in records if r.split == "test"), key=lambda r: (r.category, r.image_id)))
    if not (found if to_score else records):
        endings = "/".join(sorted(IMAGE_SUFFIXES))
        raise InputError(
            f"no images{' to score' if to_score else ''} under {images!r}. Expected {endings} files, as "
            "CATEGORY/test/LABEL/*.png, in one folder, or listed in a manifest with split 'test'."
        )
    _check_unique(records, images)
    named = sorted({record.category for record in (found if to_score else records)})
    return Inputs(found if to_score else (), _references(records, named, references) if normal else {})


def _read(images: str) -> list[ImageRecord]:
    if (found := visa.split_of(images)) is not None:
        return list(visa.read(*found))
    if manifest.is_manifest(images):
        return list(manifest.read(images))
    root = Folder(images)
    try:
        if root.local is not None and not root.local.exists():
            raise InputError(f"images {images!r} does not exist. Give a folder, a tree or a manifest.")
        if root.local is not None and root.local.is_file():
            raise InputError(f"{images!r} is a file: expected a folder, or a manifest ending in .csv or .parquet.")
        names = _image_names(root)
    except OSError as error:
        raise InputError(
            f"cannot list images {images!r}: {error}. Check address, credentials and permissions."
        ) from error
    return list(_records(root, names))


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


def list_images(folder: str, option: str) -> tuple[str, ...]:
    """Paths or URIs of all images below a folder, sorted; files with other endings are left alone.

    Args:
        folder: path or URI.
        option: that names it, for the message.

    Raises:
        InputError: there are none.
    """
    root = Folder(folder)
    try:
        names = _image_names(root)
    except OSError as error:
        raise InputError(
            f"cannot list --{option} {folder!r}: {error}. Check address, credentials and permissions."
        ) from error
    if not names:
        raise InputError(f"--{option} {folder!r} has no images: expected a folder of normal images.")
    return tuple(root.uri(name) for name in names)


def _image_names(root: Folder) -> list[str]:
    """Relative names of images, sorted as paths."""
    names = (PurePosixPath(name) for name in root.files(folders=True))  # a folder called x.png becomes a failure
    return [str(name) for name in sorted(names) if name.suffix.lower() in IMAGE_SUFFIXES]


def _records(root: Folder, names: list[str]) -> Iterator[ImageRecord]:
    """A category folder, a tree of them, or a flat folder, told apart by where ``test`` stands."""
    present = set(names)
    if any(name.startswith("test/") for name in names):
        yield from _category_records(root, names, "", root.name, present)
        return
    folders = sorted({name.split("/")[0] for name in names if name.split("/")[1:2] == ["test"]})
    for category in folders:
        yield from _category_records(root, names, f"{category}/", category, present)
    if not folders:
        for name in names:
            yield ImageRecord(image_id(root.name, name), root.uri(name), root.name)


def _category_records(
    root: Folder, names: list[str], prefix: str, category: str, present: set[str]
) -> Iterator[ImageRecord]:
    for name in names:
        inside = name.removeprefix(prefix)
        if not name.startswith(prefix):
            continue
        if inside.startswith(f"train/{GOOD}/"):
            yield ImageRecord(image_id(category, inside), root.uri(name), category, "train", GOOD)
        elif inside.startswith("test/"):
            parts = PurePosixPath(inside).parts
            label = parts[1] if len(parts) > 2 else None
            mask = _mask_name(prefix, inside, label, present)
            mask_uri = None if mask is None else root.uri(mask)
            yield ImageRecord(image_id(category, inside), root.uri(name), category, "test", label, mask_uri)


def _mask_name(prefix: str, inside: str, label: str | None, present: set[str]) -> str | None:
    if label is None or label == GOOD:
        return None
    stem = PurePosixPath(inside).stem
    candidates = (f"{prefix}ground_truth/{label}/{stem}{ending}" for ending in ("_mask.png", ".png"))
    return next((name for name in candidates if name in present), None)


def _only(records: list[ImageRecord], categories: Iterable[str] | None, images: str) -> list[ImageRecord]:
    if categories is None:
        return records
    wanted = set(categories)
    present = {record.category for record in records}
    if missing := sorted(wanted - present):
        raise InputError(f"no category {missing[0]!r} under {images!r}: found {sorted(present)}.")
    return [record for record in records if record.category in wanted]


def _check_category(category: str, images: str) -> None:
    """A category is a string column and a folder name of the output."""
    try:
        length = len(quote(category, safe=""))
    except UnicodeEncodeError as error:
        raise InputError(
            f"category {category!r} under {images!r} is no valid UTF-8: results could not name it. Rename the folder."
        ) from error
    if not category.strip() or length > _LONGEST_CATEGORY:
        raise InputError(
            f"category {category!r} under {images!r} has {length} bytes as a folder name: expected 1 to "
            f"{_LONGEST_CATEGORY}, and more than spaces. Give it another name."
        )


def _check_unique(records: Iterable[ImageRecord], images: str) -> None:
    seen: dict[str, ImageRecord] = {}
    for record in records:
        if (other := seen.setdefault(record.image_id, record)) is not record:
            raise InputError(
                f"{images!r}: image_id {record.image_id!r} stands for both {other.uri!r} ({other.split}) and "
                f"{record.uri!r} ({record.split}): expected one row for each image. Remove the duplicate or give "
                "distinct ids."
            )


def _references(
    records: list[ImageRecord], categories: list[str], folder: str | None
) -> dict[str, tuple[ImageRecord, ...]]:
    if folder is not None:
        return dict.fromkeys(categories, _reference_folder(folder))
    found = {}
    for category in categories:
        normal = [r for r in records if r.category == category and r.split == "train" and r.label in {GOOD, None}]
        if not normal:
            raise InputError(
                f"category {category!r} has no normal images: expected files in its train/{GOOD} folder (or split "
                "'train' in the manifest), or --references DIR. Without any, `anomalydino batched` compares the images "
                "with each other."
            )
        found[category] = tuple(sorted(normal, key=lambda record: record.uri))
    return found


def _reference_folder(folder: str) -> tuple[ImageRecord, ...]:
    list_images(folder, "references")  # refuses an empty one
    root = Folder(folder)
    # An id of its own: a folder of references may share name and file names with the folder to score.
    return tuple(
        ImageRecord(image_id(root.name, f"references/{name}"), root.uri(name), root.name, "train", GOOD)
        for name in _image_names(root)
    )
