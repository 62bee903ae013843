"""Parquet files as every reader likes them.

Row groups hold whole images and keep statistics of category and id; strings are dictionary-coded; float32 columns are
split by byte, float16 ones are not (DuckDB cannot read that); zstd.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.resources import expect_memory

ROWS_IN_GROUP = 16_384  # 16 images of 1024 patches; 25 MB of S/14 features in float32


def write_tables(path: Path, tables: Iterable[pa.Table]) -> int:
    """Write tables of one schema, sorted by image, one after the other.

    Args:
        path: a new file.
        tables: at least one; an image does not go on in the next one.

    Returns:
        Rows written.

    Raises:
        MemoryError: too little is left.
    """
    expect_memory()
    writer, rows = None, 0
    try:
        for group in _row_groups(tables):
            writer = writer or _writer(path, group.schema)
            writer.write_table(group, row_group_size=max(1, group.num_rows))
            rows += group.num_rows
    finally:
        if writer is not None:
            writer.close()
    return rows


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    strings = [field.name for field in schema if pa.types.is_string(field.type)]
    split = [field.name for field in schema if pa.types.is_float32(field.type)]
    if "embedding" in schema.names and pa.types.is_float32(schema.field("embedding").type.value_type):
        split.append("embedding.list.element")
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        use_dictionary=strings,  # type: ignore[arg-type]  # pyarrow's stubs know only bool
        column_encoding=dict.fromkeys(split, "BYTE_STREAM_SPLIT"),
    )


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Join and cut tables at image boundaries into groups of at least ``ROWS_IN_GROUP`` rows, but for the last."""
    waiting: list[pa.Table] = []
    count = 0
    for table in tables:
        for image in _images(table):
            waiting.append(image)
            count += image.num_rows
            if count >= ROWS_IN_GROUP:
                yield pa.concat_tables(waiting)
                waiting, count = [], 0
    if waiting:
        yield pa.concat_tables(waiting)


def read_rows(file: pq.ParquetFile, group: int | None = None, columns: list[str] | None = None) -> pa.Table:
    """Rows of one row group, or of all, read on this thread.

    Where memory is too short to start another one, Arrow waits for ever, or aborts.

    Args:
        file: an open file.
        group: its number; ``None`` for all.
        columns: their names; ``None`` for all.

    Raises:
        MemoryError: too little is left.
    """
    expect_memory()  # it starts one all the same, to read ahead
    if group is None:
        return file.read(columns, use_threads=False)
    return file.read_row_group(group, columns, use_threads=False)


def image_spans(table: pa.Table) -> Iterator[tuple[str, int, int]]:
    """Id, first and last (exclusive) row of each image of a table whose images lie together."""
    runs = pc.run_end_encode(table.column("image_id").combine_chunks())
    start = 0
    for image_id, end in zip(runs.values.to_pylist(), runs.run_ends.to_pylist(), strict=True):
        yield image_id, start, end
        start = end


def _images(table: pa.Table) -> Iterator[pa.Table]:
    """A slice for each image; tables of one row an image stay in large slices."""
    if not table.num_rows:
        return
    spans = list(image_spans(table))
    if len(spans) == table.num_rows:
        for start in range(0, table.num_rows, ROWS_IN_GROUP):
            yield table.slice(start, ROWS_IN_GROUP)
        return
    for _, start, end in spans:
        yield table.slice(start, end - start)
