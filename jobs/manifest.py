"""Manifests: CSV or Parquet with a column ``uri`` -> records.

Whatever a manifest says is data: text is never a formula or a template, and locations are only ever opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from anomalydino_plugin import ConfigError, InputError
from jobs.filesystem import Folder, is_remote, local_path, read_bytes, refuse_secrets, split_uri
from jobs.records import ImageRecord, image_id

_SUFFIXES = frozenset({".csv", ".parquet"})
_SPLITS = ("train", "test")
_COLUMNS = ("uri", "category", "split", "label", "mask_uri", "image_id")


def is_manifest(location: str) -> bool:
    """Whether a path or URI is called like a manifest."""
    return _suffix(location) in _SUFFIXES


def read(manifest: str) -> Iterator[ImageRecord]:
    """The rows of a manifest.

    Raises:
        InputError: no such file, no manifest, or a row that says nothing sensible; names file and row.
        ConfigError: a location that cannot be opened from here.
    """
    parent, stem = _parent_of(manifest)
    for number, row in enumerate(_manifest_rows(manifest), 1):
        where = f"manifest {manifest!r}, row {number}"
        uri, category, mask = str(row["uri"]), _text(row.get("category")) or stem, _text(row.get("mask_uri"))
        split = _text(row.get("split")) or "test"
        if split not in _SPLITS:
            raise InputError(f"{where}: split {split!r}, expected 'train' or 'test'.")
        yield ImageRecord(
            image_id=_text(row.get("image_id")) or image_id(category, uri),
            uri=_located(parent, uri, where),
            category=category,
            split=split,
            label=_text(row.get("label")),
            mask_uri=None if mask is None else _located(parent, mask, where),
        )


def _suffix(location: str) -> str:
    """Ending of a path or URI, small letters."""
    path = split_uri(location).path if is_remote(location) else location
    return PurePosixPath(path).suffix.lower()


def _parent_of(manifest: str) -> tuple[Folder, str]:
    """Folder of a manifest, and its name without the ending."""
    local = local_path(manifest)
    if local is not None:
        return Folder(local.parent), local.stem
    address, mark, options = manifest.partition("?")
    folder, _, name = address.rpartition("/")
    return Folder(folder + mark + options), PurePosixPath(name).stem


def _located(parent: Folder, uri: str, where: str) -> str:
    """Relative URIs start at the manifest's folder."""
    if "\0" in uri:
        raise InputError(f"{where}: {uri!r} holds a zero byte. Correct the location.")
    if "://" in uri:
        try:
            refuse_secrets(uri)
        except ConfigError as error:
            raise InputError(f"{where}: {error}") from None
        return uri
    if parent.local is not None:
        return os.path.abspath(parent.local / uri)  # noqa: PTH100  # links stay: they may lead nowhere, or in circles
    return parent.uri(uri)


def _manifest_rows(manifest: str) -> list[dict[str, Any]]:
    import pyarrow as pa  # heavy: only when there is a manifest
    import pyarrow.csv
    import pyarrow.parquet

    try:
        content = pa.BufferReader(read_bytes(manifest))
        is_parquet = _suffix(manifest) == ".parquet"
        table = pyarrow.parquet.read_table(content) if is_parquet else _read_csv_as_text(content)
        _check_columns(table.schema, manifest)
        rows: list[dict[str, Any]] = table.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read manifest {manifest!r}: {error}. Expected CSV with a header, or Parquet."
        ) from error
    empty = [number for number, row in enumerate(rows, 1) if _text(row["uri"]) is None]
    if empty:
        raise InputError(
            f"manifest {manifest!r} has no 'uri' in row {empty[0]} (and {len(empty) - 1} more). Fill it in."
        )
    return rows


def _check_columns(schema: Any, manifest: str) -> None:
    import pyarrow as pa

    if "uri" not in schema.names:
        raise InputError(
            f"manifest {manifest!r} has columns {schema.names}: expected 'uri', and optionally 'category', 'split', "
            "'label', 'mask_uri', 'image_id'."
        )
    for name in _COLUMNS:
        if schema.names.count(name) > 1:
            raise InputError(f"manifest {manifest!r} has several columns {name!r}: expected one. Remove the others.")
    for field in schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        text = any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))
        number = pa.types.is_integer(kind) and not field.name.endswith("uri")
        if field.name in _COLUMNS and not (text or number or pa.types.is_null(kind)):
            raise InputError(f"manifest {manifest!r}: column {field.name!r} has type {field.type}, expected text.")


def _read_csv_as_text(content: Any) -> Any:
    import pyarrow as pa
    from pyarrow import csv

    one_thread = csv.ReadOptions(use_threads=False)  # several do not know which row an error is in
    names = csv.open_csv(content, read_options=one_thread).schema.names
    content.seek(0)
    # All columns as text: a category called 01 must stay 01, and one called NA or null is a name like any other.
    types = dict.fromkeys(names, pa.string())
    convert = csv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=True)
    return csv.read_csv(content, read_options=one_thread, convert_options=convert)


def _text(value: object) -> str | None:
    return None if value is None or str(value) == "" else str(value)
