"""Stored patch embeddings, read back by image or as a stream of blocks.

Legend: ``P`` patches of an image, ``D`` features, ``R`` patches of a block.

Only the Parquet files are needed: their row groups hold whole images in the order of their ids, and say which.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from anomalydino_plugin import Geometry, InputError
from jobs.filesystem import Folder
from jobs.inputs import ImageRecord
from jobs.parquet import image_spans, read_rows
from jobs.store import Store, folder_name


class StoredImage(NamedTuple):
    """One image whose embeddings are stored.

    Attributes:
        record: which.
        plan: its sizes; the whole grid counts as covered.
        masking_test: whether the masking test passed on it; ``None`` where it was not run.
    """

    record: ImageRecord
    plan: Geometry
    masking_test: bool | None


class ImageFeatures(NamedTuple):
    """Patch features of one image.

    Attributes:
        image_id: which.
        features: (P, D) float32, not normalised.
        foreground: (P,) bool.
    """

    image_id: str
    features: NDArray[np.float32]
    foreground: NDArray[np.bool_]


class _RowGroup(NamedTuple):
    file: str
    number: int
    first: str | None  # image ids; None where the file does not say
    last: str | None


@dataclass(frozen=True)
class EmbeddingSet:
    """Embeddings of one category, in the order of their files.

    Attributes:
        folder: output folder of ``extract``.
        groups: row groups of all files.
        file_bytes: size of all files.
        width: D.
    """

    folder: Folder
    groups: tuple[_RowGroup, ...]
    file_bytes: int
    width: int

    @classmethod
    def of(cls, source: Store, category: str) -> EmbeddingSet:
        """Index the files of a category: reads their footers.

        Raises:
            InputError: there are none.
        """
        prefix = f"embeddings/{folder_name(category)}/"
        records = [record for record in source.files() if record.file.startswith(prefix)]
        if not records:
            raise InputError(
                f"no embeddings of category {category!r} under {source.location!r}: expected the --out folder of a "
                "finished `anomalydino extract`."
            )
        return cls.of_files(source.folder, [record.file for record in records], sum(r.size for r in records))

    @classmethod
    def of_files(cls, folder: Folder, names: Sequence[str], file_bytes: int) -> EmbeddingSet:
        """Index some files: reads their footers."""
        groups = [group for name in names for group in _row_groups(folder, name)]
        with folder.open(names[0]) as file:
            width = pq.read_schema(file).field("embedding").type.list_size
        return cls(folder, tuple(groups), file_bytes, width)

    def tables(self, ids: Collection[str]) -> Iterator[pa.Table]:
        """Rows of some images as they are stored, a row group at a time."""
        wanted = pa.array(sorted(ids), pa.string())
        for group in self.groups:
            with self.folder.open(group.file) as file:
                table = read_rows(pq.ParquetFile(file), group.number)
            own = table.filter(pc.is_in(table["image_id"], value_set=wanted))
            if own.num_rows:
                yield own

    def images(self, ids: Collection[str]) -> Iterator[ImageFeatures]:
        """Features of some images, in the order of the files."""
        if not ids:
            return
        wanted, low, high = set(ids), min(ids), max(ids)
        for group in self.groups:
            outside = group.first is not None and group.last is not None and (group.last < low or group.first > high)
            if not outside:
                yield from (image for image in self._read(group) if image.image_id in wanted)

    def blocks(self) -> Iterator[list[ImageFeatures]]:
        """All images, a row group at a time."""
        for group in self.groups:
            yield list(self._read(group))

    def _refuse_unusable(self, features: NDArray[np.float32], file: str, image_id: str) -> None:
        """One NaN or infinite value would reach the scores of all images; the sum shows it, and costs little."""
        if not np.isfinite(features.sum(dtype=np.float64)):
            raise InputError(
                f"embeddings of image {image_id!r} in {self.folder.uri(file)!r} are not finite: expected what "
                "`anomalydino extract` wrote. Extract the images again."
            )

    def _read(self, group: _RowGroup) -> Iterator[ImageFeatures]:
        with self.folder.open(group.file) as file:
            table = read_rows(pq.ParquetFile(file), group.number, ["image_id", "foreground", "embedding"])
        vectors = table["embedding"].combine_chunks()
        width = vectors.type.list_size
        values = vectors.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
        foreground = table["foreground"].combine_chunks().to_numpy(zero_copy_only=False)
        for image_id, start, end in image_spans(table):
            features = values[start:end].astype(np.float32, copy=False)
            self._refuse_unusable(features, group.file, image_id)
            yield ImageFeatures(image_id, features, foreground[start:end].astype(bool))


def _row_groups(folder: Folder, name: str) -> Iterator[_RowGroup]:
    with folder.open(name) as file:
        metadata = pq.ParquetFile(file).metadata
        column = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == "image_id")
        for number in range(metadata.num_row_groups):
            found = metadata.row_group(number).column(column).statistics
            known = found is not None and found.has_min_max
            yield _RowGroup(name, number, *((found.min, found.max) if known else (None, None)))


class StoredRun(NamedTuple):
    """What a finished ``anomalydino extract`` left.

    Attributes:
        sets: embeddings by category.
        images: all images that have some, sorted by category and id.
        fingerprint: of the features.
        identity: of the run.
    """

    sets: dict[str, EmbeddingSet]
    images: tuple[StoredImage, ...]
    fingerprint: dict[str, str]
    identity: str

    @classmethod
    def read(cls, location: str, categories: Collection[str] | None = None) -> StoredRun:
        """Index an output folder.

        Args:
            location: path or URI.
            categories: only these.

        Raises:
            InputError: nothing was extracted there, or not all of it, or an unknown category.
        """
        source = Store(location, "extract")
        identity = source.identity()
        records = source.done()
        if not source.is_finished() or not records:
            raise InputError(
                f"`anomalydino extract` into {source.location!r} is not finished: repeat its command, then go on."
            )
        images = tuple(_stored_image(row) for row in _rows(source))
        present = sorted({image.record.category for image in images})
        if missing := sorted(set(categories or ()) - set(present)):
            raise InputError(f"no category {missing[0]!r} under {source.location!r}: found {present}.")
        chosen = [category for category in present if categories is None or category in categories]
        return cls(
            {category: EmbeddingSet.of(source, category) for category in chosen},
            tuple(image for image in images if image.record.category in chosen),
            records[0]["fingerprint"],
            identity,
        )

    def of(self, category: str) -> list[StoredImage]:
        """Images of one category, sorted by id."""
        return [image for image in self.images if image.record.category == category]


def _rows(source: Store) -> list[dict[str, Any]]:
    table: pa.Table = source.read("images")
    own = table.filter(pc.field("status").isin(["extracted"]))
    rows: list[dict[str, Any]] = own.sort_by([("category", "ascending"), ("image_id", "ascending")]).to_pylist()
    return rows


def _stored_image(row: dict[str, Any]) -> StoredImage:
    record = ImageRecord(*(row[name] for name in ("image_id", "uri", "category", "split", "label", "mask_uri")))
    grid, size = (row["grid_rows"], row["grid_cols"]), (row["height"], row["width"])
    return StoredImage(record, Geometry(size, size, grid, (1.0, 1.0)), row["masking_test"])
