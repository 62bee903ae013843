"""The records of a run, read back and checked: is every stage finished, do its counts add up, is anything left over?"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from anomalydino_plugin import InputError
from jobs.bank_builder import bank_name
from jobs.filesystem import TEMPORARY
from jobs.schema import SCHEMA_VERSION
from jobs.settings import as_list
from jobs.store import KINDS, FileRecord, Store
from jobs.verify_findings import Findings

_STATE = ".state"  # as in ``store``
_READERS = 16  # records read at a time: each is a round trip where OUT is an object store
_Record = TypeVar("_Record")


class ListedFile(NamedTuple):
    """A Parquet file that a record lists: whose it is, and what the record says of it."""

    stage: str
    category: str
    record: FileRecord


class Done(NamedTuple):
    """A completion record.

    Attributes:
        category: of the shard.
        shard: its name.
        files: that it lists.
        parts: small files by kind of rows, to be joined.
        done: images that are finished; ``None`` in ``fit``.
        failed: images that could not be processed; ``None`` in ``fit``.
        bank: what ``fit`` says of its bank; ``None`` elsewhere.
    """

    category: str
    shard: str
    files: tuple[FileRecord, ...]
    parts: dict[str, str]
    done: int | None
    failed: int | None
    bank: dict[str, Any] | None


class Joined(NamedTuple):
    """A record of a joined file: category, file, and the small files it was made of."""

    category: str
    file: FileRecord
    parts: tuple[str, ...]


@dataclass(frozen=True)
class StageRecords:
    """Everything that is recorded of one stage.

    Attributes:
        stage: its name.
        kinds: of rows that it writes, besides failures.
        settings: of the run; empty where they cannot be read.
        done: completion records.
        joined: records of joined files.
        job: what ``job.json`` says of it; ``None`` where it is not finished.
    """

    stage: str
    kinds: tuple[str, ...]
    settings: dict[str, Any]
    done: tuple[Done, ...]
    joined: tuple[Joined, ...]
    job: dict[str, Any] | None

    @property
    def finished(self) -> bool:
        """Whether its last run came to its end."""
        return self.job is not None

    def files(self) -> Iterator[ListedFile]:
        """Parquet files that analysts see."""
        for record in self.done:
            yield from (ListedFile(self.stage, record.category, file) for file in record.files)
        yield from (ListedFile(self.stage, record.category, record.file) for record in self.joined)

    def covers(self, category: str) -> bool:
        """Whether the stage was asked for a category."""
        chosen = as_list(self.settings.get("category"))
        return chosen is None or category in chosen

    def recorded(self, kind: str, category: str) -> int | None:
        """Rows that the completion records promise; ``None`` for kinds with a row for each patch."""
        own = [record for record in self.done if record.category == category]
        done, failed = (sum(getattr(record, name) or 0 for record in own) for name in ("done", "failed"))
        references = sum(len(record.bank.get("references", ())) for record in own if record.bank)
        return {"images": done + failed + references, "scores": done, "failures": failed}.get(kind)


def read_stages(store: Store, findings: Findings) -> list[StageRecords]:
    """Read the records of all stages; those that are damaged become problems.

    Raises:
        InputError: OUT is no output folder of a run.
    """
    folder = store.folder
    try:
        names = [] if folder.local is not None and folder.local.is_file() else folder.files(_STATE)
    except OSError as error:
        raise InputError(f"cannot list {store.location!r}: {error}. Check address and credentials.") from error
    stages = sorted({name.split("/")[1] for name in names if name.count("/") >= 2 and not name.endswith("/lock")})
    if not stages:
        raise InputError(
            f"no run under {store.location!r}: expected the --out folder of `anomalydino score`, `batched`, `extract`, "
            "`match` or `fit`."
        )
    jobs = _read(store, "job.json", _jobs, findings) if folder.has("job.json") else {}
    return [_stage(store, stage, names, jobs or {}, findings) for stage in stages]


def _stage(store: Store, stage: str, names: list[str], jobs: dict[str, Any], findings: Findings) -> StageRecords:
    base = f"{_STATE}/{stage}/"
    kinds, settings = _read(store, f"{base}run.json", _claim, findings) or ((), {})
    done = _read_all(store, [name for name in names if name.startswith(f"{base}done/")], _done, findings)
    joined = _read_all(store, [name for name in names if name.startswith(f"{base}files/")], _joined, findings)
    return StageRecords(stage, kinds, settings, done, joined, jobs.get(stage))


def _read_all(
    store: Store, names: list[str], parse: Callable[[dict[str, Any]], _Record], findings: Findings
) -> tuple[_Record, ...]:
    with ThreadPoolExecutor(_READERS) as pool:
        records = pool.map(
            lambda name: _read(store, name, parse, findings), [name for name in names if name.endswith(".json")]
        )
    return tuple(record for record in records if record is not None)


def _read(store: Store, name: str, parse: Callable[[dict[str, Any]], _Record], findings: Findings) -> _Record | None:
    try:
        return parse(store.read_json(name))
    except FileNotFoundError:
        findings.add(name, "not there", "a record that `anomalydino` wrote")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = "no JSON" if isinstance(error, json.JSONDecodeError) else f"{type(error).__name__}: {error}"
        findings.add(name, f"cannot be read ({reason})", "a record that `anomalydino` wrote")
    return None


def _jobs(content: dict[str, Any]) -> dict[str, Any]:
    if content["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema_version {content['schema_version']!r} instead of {SCHEMA_VERSION!r}")
    return {stage: {**job, "counts": dict(job["counts"])} for stage, job in content["stages"].items()}


def _claim(content: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    return tuple(content["kinds"]), dict(content["settings"])


def _done(content: dict[str, Any]) -> Done:
    files = tuple(map(_file, content["files"]))
    counts = (content.get("done"), content.get("failed"), content.get("bank"))
    return Done(content["category"], content["shard"], files, dict(content["parts"]), *counts)


def _joined(content: dict[str, Any]) -> Joined:
    return Joined(content["category"], _file(content), tuple(content["parts"]))


def _file(content: dict[str, Any]) -> FileRecord:
    return FileRecord(**{name: content[name] for name in FileRecord._fields})


def check_stage(stage: StageRecords, findings: Findings) -> None:
    """Is the stage finished, and do ``job.json`` and its records agree?"""
    place = f"{_STATE}/{stage.stage}"
    if stage.job is None:
        findings.add(
            place,
            f"stage {stage.stage!r} is not finished ({len(stage.done)} shards are)",
            "an entry in job.json: repeat the command",
        )
        return
    for name, recorded in _counts(stage).items():
        if (stated := stage.job["counts"].get(name)) != recorded:
            findings.add("job.json", f"stage {stage.stage!r} with {name}={stated}", f"{recorded}, as its shards say")
    _check_joined(stage, place, findings)


def _counts(stage: StageRecords) -> dict[str, int]:
    """Counts as ``job.json`` should have them."""
    done, failed = (sum(getattr(record, name) or 0 for record in stage.done) for name in ("done", "failed"))
    references = sum(len(record.bank.get("references", ())) for record in stage.done if record.bank)
    return {"images": done + failed + references, "done": done, "failed": failed}


def _check_joined(stage: StageRecords, place: str, findings: Findings) -> None:
    """Every small file of a finished shard is part of one joined file, and of no other."""
    small = {part for record in stage.done for part in record.parts.values()}
    used = Counter(part for record in stage.joined for part in record.parts)
    for what, parts in (
        ("small files of finished shards that no joined file holds", sorted(small - set(used))),
        ("small files in joined files whose shards are not finished", sorted(set(used) - small)),
        ("small files in more than one joined file", sorted(part for part, number in used.items() if number > 1)),
    ):
        findings.count(f"{place}/files", what, "each of them in one joined file", len(parts), (parts or [""])[0])


def check_leftovers(store: Store, stages: Sequence[StageRecords], findings: Findings) -> None:
    """Files that no record lists, small files that should be gone, and files that never became whole."""
    known = {file.record.file for stage in stages for file in stage.files()}
    known |= {bank_name(record.category) for stage in stages for record in stage.done if record.bank}
    waiting = {
        part for stage in stages if not stage.finished for record in stage.done for part in record.parts.values()
    }
    for name in store.folder.files():
        top, parts = name.split("/", 1)[0], name.startswith(f"{_STATE}/") and name.split("/")[2:3] == ["parts"]
        if name.endswith(TEMPORARY):
            findings.add(name, "a temporary file of an interrupted run", "none: repeat the command, or remove it")
        elif parts and name not in waiting:
            findings.add(name, "a small file that was joined, or that no record lists", "none in a finished stage")
        elif top in {*KINDS, "banks"} and name not in known:
            findings.add(name, "a file that no record lists", "only files that records list: remove it")
