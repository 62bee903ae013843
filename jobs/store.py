"""The output folder: layout, atomic files, completion records, resume.

    OUT/job.json                        what ran; written last
    OUT/images/C/*.parquet              OUT/scores/C/*.parquet       OUT/patch_scores/C/*.parquet
    OUT/embeddings/C/*.parquet          OUT/failures/*.parquet       OUT/banks/C.safetensors
    OUT/.state/run.json                 identity of the run that owns the folder
    OUT/.state/done/C/SHARD.json        a shard is finished: its files and counts; written after them

``C`` is the percent-encoded category. Files appear whole or not at all; a file that no completion record lists is
left from an interrupted run and is written again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from anomalydino_plugin import ConfigError, InputError

_IMAGES_PER_ROW_GROUP = 16
_STATE = ".state"
REFERENCE_SHARD = "references"  # the "shard" of a category's reference images


def folder_name(category: str) -> str:
    """Percent-encoded category, safe as one folder name: no separator, no leading dot."""
    name = quote(category, safe="")
    return "%2E" + name[1:] if name.startswith(".") else name


class Store:
    """One output folder.

    Args:
        root: OUT.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).expanduser().resolve()

    def claim(self, identity: str) -> None:
        """Take the folder for a run: empty, or left by the same run.

        Raises:
            ConfigError: it holds another run, or files of something else, or cannot be written.
        """
        marker = self.root / _STATE / "run.json"
        if marker.is_file():
            if json.loads(marker.read_text())["identity"] != identity:
                raise ConfigError(
                    f"output folder {str(self.root)!r} holds a run with other settings or images. "
                    "Give another --out, repeat the command of that run to resume it, or remove the folder."
                )
            return
        if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise ConfigError(
                f"output folder {str(self.root)!r} is not empty: expected a new or empty folder for --out."
            )
        try:
            self.write_json(marker, {"identity": identity})
        except OSError as error:
            raise ConfigError(f"cannot write to output folder {str(self.root)!r}: {error.strerror}.") from error

    def path(self, kind: str, category: str, shard: str) -> Path:
        """Path of one Parquet file; ``failures`` has no category folders."""
        if kind == "failures":
            return self.root / kind / f"{folder_name(category)}-{shard}.parquet"
        return self.root / kind / folder_name(category) / f"{shard}.parquet"

    def bank_path(self, category: str) -> Path:
        """Path of a category's memory bank."""
        return self.root / "banks" / f"{folder_name(category)}.safetensors"

    def is_done(self, category: str, shard: str) -> bool:
        """Whether a shard is finished."""
        return self.record_path(category, shard).is_file()

    def done(self) -> list[dict[str, Any]]:
        """All completion records, sorted."""
        folder = self.root / _STATE / "done"
        return [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))]

    def commit(self, category: str, shard: str, tables: dict[str, pa.Table], record: dict[str, Any]) -> None:
        """Write a shard's tables, then its completion record. Empty tables write no file."""
        written = {}
        for kind, table in tables.items():
            if table.num_rows:
                path = self.path(kind, category, shard)
                write_table(path, table)
                written[kind] = {"file": path.relative_to(self.root).as_posix(), "rows": table.num_rows}
        self.write_json(
            self.record_path(category, shard), {**record, "category": category, "shard": shard, "files": written}
        )

    def record_path(self, category: str, shard: str) -> Path:
        """Path of a shard's completion record."""
        return self.root / _STATE / "done" / folder_name(category) / f"{shard}.json"

    def write_json(self, path: Path, content: dict[str, Any]) -> None:
        """Write JSON whole or not at all."""
        with _atomically(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self, kind: str, columns: list[str] | None = None) -> pa.Table:
        """All finished rows of one kind.

        Raises:
            InputError: there are none.
        """
        files = [self.root / record["files"][kind]["file"] for record in self.done() if kind in record.get("files", {})]
        if not files:
            raise InputError(f"no {kind} under {str(self.root)!r}: expected the output folder of a finished run.")
        return pa.concat_tables(pq.read_table(path, columns=columns, partitioning=None) for path in files)


@contextlib.contextmanager
def _atomically(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when all is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_table(path: Path, table: pa.Table) -> None:
    """Write one Parquet file whole or not at all; row groups hold whole images."""
    strings = [field.name for field in table.schema if pa.types.is_string(field.type)]
    split = [field.name for field in table.schema if pa.types.is_float32(field.type)]
    if "embedding" in table.schema.names and pa.types.is_float32(table.schema.field("embedding").type.value_type):
        split.append("embedding.list.element")
    with (
        _atomically(path) as temporary,
        pq.ParquetWriter(
            temporary,
            table.schema,
            compression="zstd",
            use_dictionary=strings,  # type: ignore[arg-type]  # pyarrow's stubs know only bool
            column_encoding=dict.fromkeys(split, "BYTE_STREAM_SPLIT"),
        ) as writer,
    ):
        for group in _row_groups(table):
            writer.write_table(group)


def _row_groups(table: pa.Table) -> Iterator[pa.Table]:
    """Cut a table, sorted by image, at image boundaries."""
    ids = pc.run_end_encode(table.column("image_id").combine_chunks()) if table.num_rows else None
    ends = [] if ids is None else ids.run_ends.to_pylist()
    start = 0
    for end in [*ends[_IMAGES_PER_ROW_GROUP - 1 :: _IMAGES_PER_ROW_GROUP], *ends[-1:]]:
        if end > start:
            yield table.slice(start, end - start)
            start = end
