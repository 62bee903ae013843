"""The output folder: layout, whole files, completion records, resume.

    OUT/job.json                          what ran, by stage; written last
    OUT/images/C/*.parquet                OUT/scores/C/*.parquet       OUT/patch_scores/C/*.parquet
    OUT/embeddings/C/*.parquet            OUT/failures/*.parquet       OUT/banks/C.safetensors
    OUT/.state/STAGE/run.json             identity and settings of the run that owns the stage
    OUT/.state/STAGE/done/C/SHARD.json    a shard is finished: its counts and files; written after them
    OUT/.state/STAGE/parts/KIND/C/*       small files of finished shards, until they are joined
    OUT/.state/STAGE/files/KIND/C/*.json  a joined file: its shards; written after it

``C`` is the percent-encoded category. Files appear whole or not at all; a file that no record lists is left from an
interrupted run, and goes when the command is repeated. OUT is a path or a URI.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from anomalydino_plugin import ConfigError, InputError, ResourceError
from jobs.filesystem import TEMPORARY, Folder, WrittenFile, checksum
from jobs.parquet import read_rows, write_tables
from jobs.resources import cannot_write

_STATE = ".state"
KINDS = ("images", "embeddings", "scores", "patch_scores", "failures")
REFERENCE_SHARD = "references"  # the "shard" of a category's reference images
_READERS = 16  # records read at a time: each is a round trip where OUT is an object store


def folder_name(category: str) -> str:
    """Percent-encoded category, safe as one folder name: no separator, no leading dot."""
    name = quote(category, safe="")
    return "%2E" + name[1:] if name.startswith(".") else name


class FileRecord(NamedTuple):
    """A file that analysts see.

    Attributes:
        kind: of rows.
        file: relative to OUT.
        rows: how many.
        size: bytes.
        sha256: of its content.
    """

    kind: str
    file: str
    rows: int
    size: int
    sha256: str


class Store:
    """One stage's view of one output folder.

    Args:
        root: OUT, a path or URI.
        stage: ``extract``, ``fit``, ``score`` or ``match``; reading across stages needs none.
        joined: for kinds whose files would be small, how many shards go into one.
    """

    def __init__(self, root: str | os.PathLike[str], stage: str = "", joined: dict[str, int] | None = None) -> None:
        self.folder = Folder(root)
        self.stage = stage
        self.joined = joined or {}

    @property
    def location(self) -> str:
        """OUT as a path or URI."""
        return self.folder.location

    # Who owns the folder

    def claim(self, identity: str, kinds: Sequence[str], settings: dict[str, Any]) -> None:
        """Take a stage of the folder for a run: not there yet, or left by the same run.

        Args:
            identity: of the run.
            kinds: of rows that the stage writes for images to process.
            settings: for people to read.

        Raises:
            ConfigError: it holds another run, or files of something else, or cannot be written.
        """
        try:
            self.folder.refuse_file_above()
            found = self._claims()
            if not found and self.folder.exists() and self.folder.files():
                raise ConfigError(
                    f"output folder {self.location!r} is not empty: expected a new or empty folder for --out."
                )
            self._refuse_others(found, identity, kinds)
            if self.stage not in found:
                self.write_json(self._state("run.json"), {"identity": identity, "kinds": kinds, "settings": settings})
            self.sweep()
        except ResourceError:
            raise
        except (OSError, NotADirectoryError) as error:
            raise ConfigError(
                f"cannot write to output folder {self.location!r}: {getattr(error, 'strerror', None) or error}."
            ) from error

    def stages(self) -> list[str]:
        """Stages that have run here."""
        return sorted(self._claims())

    def _claims(self) -> dict[str, dict[str, Any]]:
        if self.folder.local is not None and self.folder.local.exists() and not self.folder.local.is_dir():
            raise ConfigError(f"output folder {self.location!r} is a file: expected a new or empty folder for --out.")
        names = [name for name in self.folder.files(_STATE) if name.count("/") == 2 and name.endswith("/run.json")]
        return {name.split("/")[1]: self.read_json(name) for name in names}

    def _refuse_others(self, found: dict[str, dict[str, Any]], identity: str, kinds: Sequence[str]) -> None:
        own = found.get(self.stage)
        if own is not None and own["identity"] != identity:
            raise ConfigError(
                f"output folder {self.location!r} holds a run with other settings or images. "
                "Give another --out, repeat the command of that run to resume it, or remove the folder."
            )
        for stage, claim in found.items():
            if stage != self.stage and (both := set(claim["kinds"]) & set(kinds)):
                raise ConfigError(
                    f"output folder {self.location!r} holds {sorted(both)[0]} of `anomalydino {stage}` already: give "
                    f"another --out to `anomalydino {self.stage}`."
                )

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep a second run off a local folder; the lock goes with the process, however that ends.

        Raises:
            ConfigError: another run works on the folder.
            ResourceError: it cannot be written to.
        """
        if self.folder.local is None:
            yield
            return
        with self._lock_file(self.folder.local / self._state("lock")) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"another run works on output folder {self.location!r}: wait for it, or give another --out."
                ) from error
            except OSError:
                pass  # a network folder without locks
            yield

    def _lock_file(self, path: Path) -> IO[str]:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("w")
        except OSError as error:
            raise cannot_write(error, self.location) or error from error

    def identity(self) -> str:
        """Identity of the stage's run.

        Raises:
            InputError: the stage did not run here.
        """
        if not self.folder.has(self._state("run.json")):
            raise InputError(
                f"no output of `anomalydino {self.stage}` under {self.location!r}: expected its --out folder."
            )
        return str(self.read_json(self._state("run.json"))["identity"])

    def is_finished(self) -> bool:
        """Whether the stage's last run came to its end: ``job.json`` is written last, and says so."""
        return self.folder.has("job.json") and self.stage in self.read_json("job.json")["stages"]

    def sweep(self) -> list[str]:
        """Remove what an interrupted run left: files that no record lists.

        Returns:
            Their names.
        """
        known = {record.file for stage in {*self._claims(), self.stage} for record in self._of(stage).files()}
        known |= {name for record in self.done() for name in record["parts"].values()}
        parts = self.folder.files(self._state("parts"))
        found = [*parts, *(name for kind in KINDS for name in self.folder.files(kind) if name.endswith(".parquet"))]
        temporary = [name for name in self.folder.files() if name.endswith(TEMPORARY)]
        left = [name for name in found if name not in known] + temporary
        for name in left:
            self.folder.remove(name)
        return left

    def _of(self, stage: str) -> Store:
        return Store(self.location, stage)

    # Shards

    def is_done(self, category: str, shard: str) -> bool:
        """Whether a shard is finished."""
        return self.folder.has(self.record_name(category, shard))

    def done_shards(self) -> set[tuple[str, str]]:
        """Encoded category and name of all finished shards, from one listing."""
        names = self.folder.files(self._state("done"))
        return {(parts[-2], parts[-1].removesuffix(".json")) for parts in (name.split("/") for name in names)}

    def done(self) -> list[dict[str, Any]]:
        """All completion records, sorted by category and shard."""
        return self._records("done")

    def commit(self, category: str, shard: str, tables: dict[str, pa.Table], record: dict[str, Any]) -> None:
        """Write a shard's tables, then its completion record. Empty tables write no file."""
        files, parts = [], {}
        for kind, table in tables.items():
            if not table.num_rows:
                continue
            if self.joined.get(kind, 1) > 1:
                parts[kind] = self._state(f"parts/{kind}/{folder_name(category)}/{shard}.parquet")
                self._write(kind, parts[kind], [table])
            else:
                files.append(self._write(kind, self.file_name(kind, category, shard), [table])._asdict())
        content = {**record, "category": category, "shard": shard, "files": files, "parts": parts}
        self.write_json(self.record_name(category, shard), content)

    def record_name(self, category: str, shard: str) -> str:
        """Name of a shard's completion record."""
        return self._state(f"done/{folder_name(category)}/{shard}.json")

    def file_name(self, kind: str, category: str, shard: str) -> str:
        """Name of one Parquet file; ``failures`` has no category folders, and tells stages apart."""
        if kind == "failures":
            return f"{kind}/{self.stage}-{folder_name(category)}-{shard}.parquet"
        return f"{kind}/{folder_name(category)}/{shard}.parquet"

    # Joining small files

    def unjoined(self) -> list[tuple[str, str, str, list[str]]]:
        """What is to be joined: kind, category, name and parts of each file whose record lists other parts."""
        waiting: dict[tuple[str, str, int], list[str]] = {}
        for record in self.done():
            for kind, part in record["parts"].items():
                group = _shard_number(record["shard"]) // self.joined.get(kind, 1)
                waiting.setdefault((kind, record["category"], group), []).append(part)
        joined = {record["file"]: record["parts"] for record in self._records("files")}
        todo = []
        for (kind, category, group), parts in sorted(waiting.items()):
            size = self.joined.get(kind, 1)
            name = f"{group * size:06d}-{(group + 1) * size - 1:06d}"
            if joined.get(self.file_name(kind, category, name)) != parts:
                todo.append((kind, category, name, parts))
        return todo

    def join(self, kind: str, category: str, name: str, parts: list[str]) -> None:
        """Join the files of some shards into one that analysts see; the parts stay."""

        def tables() -> Iterable[pa.Table]:
            for part in parts:
                with self.folder.open(part) as file:
                    yield read_rows(pq.ParquetFile(file))

        written = self._write(kind, self.file_name(kind, category, name), tables())
        record = {**written._asdict(), "category": category, "parts": parts}
        self.write_json(self._state(f"files/{kind}/{folder_name(category)}/{name}.json"), record)

    def drop_parts(self) -> None:
        """Remove the small files once all are joined."""
        if not self.unjoined():
            for name in self.folder.files(self._state("parts")):
                self.folder.remove(name)

    # Reading

    def files(self) -> list[FileRecord]:
        """All files of the stage that analysts see, sorted; of all stages where none was named."""
        if not self.stage:
            return sorted(record for stage in self._claims() for record in self._of(stage).files())
        direct = [file for record in self.done() for file in record["files"]]
        found = [*direct, *self._records("files")]
        return sorted(FileRecord(**{name: record[name] for name in FileRecord._fields}) for record in found)

    def read(self, kind: str, columns: list[str] | None = None) -> pa.Table:
        """All rows of one kind that finished runs wrote.

        Raises:
            InputError: there are none.
        """
        files = [record.file for record in self.files() if record.kind == kind]
        if not files:
            raise InputError(f"no {kind} under {self.location!r}: expected the output folder of a finished run.")
        tables = []
        for name in files:
            with self.folder.open(name) as file:
                tables.append(read_rows(pq.ParquetFile(file), columns=columns))
        return pa.concat_tables(tables)

    # JSON

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write JSON whole or not at all."""
        text = json.dumps(content, indent=2, sort_keys=True, default=str) + "\n"
        self.folder.write(name, text.encode())

    def read_json(self, name: str) -> dict[str, Any]:
        """Read JSON back."""
        content: dict[str, Any] = json.loads(self.folder.read(name))
        return content

    def _records(self, folder: str) -> list[dict[str, Any]]:
        names = [name for name in self.folder.files(self._state(folder)) if name.endswith(".json")]
        if self.folder.local is not None:
            return [self.read_json(name) for name in names]
        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(self.read_json, names))

    def _state(self, name: str) -> str:
        return f"{_STATE}/{self.stage}/{name}"

    def _write(self, kind: str, name: str, tables: Iterable[pa.Table]) -> FileRecord:
        with self.folder.writing(name) as path:
            rows = write_tables(path, tables)
            written: WrittenFile = checksum(path)
        return FileRecord(kind, name, rows, written.size, written.sha256)


def _shard_number(shard: str) -> int:
    return int(shard) if shard.isdecimal() else 0
