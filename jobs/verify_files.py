"""One Parquet file against its record: whole, readable, of the right schema and version, with all its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import schema
from jobs.filesystem import Folder, checksum
from jobs.store import FileRecord
from jobs.verify_findings import Findings
from jobs.verify_records import ListedFile, StageRecords

_VERSION = b"anomalydino_schema_version"
_SCHEMAS = {
    "images": schema.IMAGES,
    "scores": schema.SCORES,
    "patch_scores": schema.PATCH_SCORES,
    "failures": schema.FAILURES,
}


class FileChecker:
    """Checks files, and hands out the rows of those that are whole.

    Args:
        folder: OUT.
        stages: whose files they are.
        findings: where problems go.

    Attributes:
        files: looked at.
        rows: in those that are whole.
        damaged: kind and category of those that are not: what is missing there says nothing more.
    """

    def __init__(self, folder: Folder, stages: Sequence[StageRecords], findings: Findings) -> None:
        self.folder, self.findings = folder, findings
        self.files = self.rows = 0
        self.damaged: set[tuple[str, str]] = set()
        self._stages = {stage.stage: stage for stage in stages}
        self._widths: dict[str, int] = {}

    def row_groups(self, listed: ListedFile) -> Iterator[pa.Table]:
        """Row groups of a file, one at a time; none where it is damaged."""
        record = listed.record
        self.files += 1
        problem = None
        try:
            with self.folder.fetched(record.file) as path:
                if self._is_whole(record, path):
                    yield from self._tables(listed, path)
                    return
        except FileNotFoundError:
            problem = "not there"
        except (OSError, pa.ArrowException) as error:
            problem = f"cannot be read as Parquet ({str(error).splitlines()[0]})"
        if problem is not None:
            self.findings.add(record.file, problem, f"{record.rows} rows of {record.kind} in {record.size} bytes")
        self.damaged.add((record.kind, listed.category))

    def _is_whole(self, record: FileRecord, path: Path) -> bool:
        found = checksum(path)
        if found.size != record.size:
            self.findings.add(record.file, f"{found.size} bytes", f"{record.size} bytes")
        elif found.sha256 != record.sha256:
            self.findings.add(record.file, f"sha256 {found.sha256}", f"{record.sha256}: its content was changed")
        return found == (record.size, record.sha256)

    def _tables(self, listed: ListedFile, path: Path) -> Iterator[pa.Table]:
        record = listed.record
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows != record.rows:
                self.findings.add(record.file, f"{file.metadata.num_rows} rows", f"{record.rows}, as its record says")
            if not self._fits(listed, file.schema_arrow):
                self.damaged.add((record.kind, listed.category))
                return
            self.rows += file.metadata.num_rows
            for number in range(file.num_row_groups):
                yield file.read_row_group(number)

    def _fits(self, listed: ListedFile, found: pa.Schema) -> bool:
        expected = self._expected(listed, found)
        if found.equals(expected, check_metadata=True):
            return True
        version, wanted = ((one.metadata or {}).get(_VERSION, b"none").decode() for one in (found, expected))
        if version != wanted:
            self.findings.add(listed.record.file, f"schema version {version}", f"version {wanted}")
        else:
            ours, theirs = _difference(found, expected)
            self.findings.add(listed.record.file, f"columns {ours}", theirs)
        return False

    def _expected(self, listed: ListedFile, found: pa.Schema) -> pa.Schema:
        if listed.record.kind != "embeddings":
            return _SCHEMAS[listed.record.kind]
        stage = self._stages[listed.stage]
        stated = (stage.job or {}).get("embedding_width")
        # Where the run does not say, its first file does.
        width = self._widths.setdefault(listed.stage, stated or _width(found))
        return schema.embeddings(width, stage.settings.get("embedding_dtype", "float32"))


def _width(found: pa.Schema) -> int:
    kind = found.field("embedding").type if "embedding" in found.names else None
    return kind.list_size if kind is not None and pa.types.is_fixed_size_list(kind) else 1


def _difference(found: pa.Schema, expected: pa.Schema) -> tuple[str, str]:
    """The fields that differ, on both sides; the whole schemas where only their order or metadata does."""
    ours, theirs = map(_fields, (found, expected))
    left, right = ([text for text in one if text not in other] for one, other in ((ours, theirs), (theirs, ours)))
    return ", ".join(left or ours), ", ".join(right or theirs)


def _fields(one: pa.Schema) -> list[str]:
    return [f"{field.name}: {field.type}{'' if field.nullable else ' not null'}" for field in one]
