"""``anomalydino verify OUT``: reads everything back, and says what is not as it should be.

Files are read one row group at a time and one category after the other: memory holds the ids of a category's images,
and never a table of patches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
from rich.console import Console

from anomalydino_plugin import AnomalyDINOError
from jobs.filesystem import Folder
from jobs.progress import ImageProgress
from jobs.store import Store, folder_name
from jobs.verify_banks import check_bank
from jobs.verify_files import FileChecker
from jobs.verify_findings import Findings, Problem
from jobs.verify_records import ListedFile, StageRecords, check_leftovers, check_stage, read_stages
from jobs.verify_rows import (
    CategoryImages,
    Coverage,
    Grid,
    check_category,
    check_distances,
    check_embeddings,
    check_matches,
    check_positions,
    check_scores,
    count_images,
)

_ADVICE = (
    "An interrupted stage is completed, and what no record lists removed, by repeating its command; damaged files are "
    "made again by running into a new --out."
)


class Report(NamedTuple):
    """What was read back.

    Attributes:
        problems: what is wrong; empty where everything is as it should be.
        files: Parquet files and banks.
        rows: in Parquet files that are whole.
        images: to process, failed ones included; reference images where a run has no others.
        notes: what could not be checked from this folder.
    """

    problems: list[Problem]
    files: int
    rows: int
    images: int
    notes: list[str]


def verify(out: str, console: Console | None = None) -> Report:
    """Check an output folder.

    Args:
        out: path or URI.
        console: for progress.

    Raises:
        InputError: ``out`` is no output folder of a run.
    """
    findings = Findings()
    store = Store(out)
    stages = read_stages(store, findings)
    for stage in stages:
        check_stage(stage, findings)
    check_leftovers(store, stages, findings)
    return _Verification(store, stages, findings).run(console or Console(quiet=True))


class _Verification:
    """The rows of one folder.

    Args:
        store: the folder.
        stages: what its records say.
        findings: where problems go.
    """

    def __init__(self, store: Store, stages: Sequence[StageRecords], findings: Findings) -> None:
        self.store, self.stages, self.findings = store, stages, findings
        self.files = FileChecker(store.folder, stages, findings)
        self.listed: dict[tuple[str, str], list[ListedFile]] = defaultdict(list)  # by category and kind
        for file in sorted(file for stage in stages for file in stage.files()):
            self.listed[file.category, file.record.kind].append(file)
        self.counted: dict[tuple[str, str, str], int] = defaultdict(int)  # rows by stage, category and kind
        self.notes: list[str] = []
        self._ids: list[pa.Array] = []
        self._references = 0
        self._elsewhere: dict[tuple[str, str], dict[str, Grid] | None] = {}  # by banks and category

    def run(self, console: Console) -> Report:
        categories = sorted(
            {category for category, _ in self.listed}
            | {record.category for stage in self.stages for record in stage.done}
        )
        kind = "images" if any(kind == "images" for _, kind in self.listed) else "scores"
        total = sum(file.record.rows for (_, own), files in self.listed.items() if own == kind for file in files)
        with ImageProgress(console, "checking", total) as progress:
            for category in categories:
                self._category(category, progress)
        images = self._check_ids()
        banks = sum(record.bank is not None for stage in self.stages for record in stage.done)
        files = self.files.files + banks
        return Report(self.findings.problems, files, self.files.rows, images or self._references, self.notes)

    def _category(self, category: str, progress: ImageProgress) -> None:
        images = self._images(category)
        self._references += len(images.references)
        self._ids.append(pa.array([*images.done, *images.failed], pa.string()))
        self._failures(category, images)
        self._scores(category, images)
        seen = 0
        for kind in ("patch_scores", "embeddings"):
            last = kind == "embeddings" or not self.listed[category, "embeddings"]
            for count in self._patches(kind, category, images):
                if last:
                    progress.advance(count)
                    seen += count
        progress.advance(max(0, len(images.done) + len(images.failed) + len(images.references) - seen))
        self._check_rows(category)
        self._check_banks(category, images)

    # Kinds of rows

    def _tables(self, category: str, kind: str) -> Iterator[tuple[ListedFile, pa.Table]]:
        """Each row group of a kind, with its file."""
        for listed in self.listed[category, kind]:
            for table in self.files.row_groups(listed):
                self.counted[listed.stage, category, kind] += table.num_rows
                check_category(listed, table, self.findings)
                yield listed, table

    def _images(self, category: str) -> CategoryImages:
        images = CategoryImages()
        for listed, table in self._tables(category, "images"):
            images.take(listed, table, self.findings)
        return images

    def _failures(self, category: str, images: CategoryImages) -> None:
        coverage = Coverage(dict.fromkeys(images.failed, (1, 1)), "failed", self.findings)
        known = self._knows_images(category)
        for listed, table in self._tables(category, "failures"):
            if known:
                coverage.see_rows(listed.record.file, table)
        if known and self._is_whole(category, "failures"):
            coverage.finish(f"failures/ (category {category!r})")

    def _scores(self, category: str, images: CategoryImages) -> None:
        coverage = Coverage(images.done, "done", self.findings)
        for listed, table in self._tables(category, "scores"):
            check_scores(listed, table, self.findings)
            if self._knows_images(category):
                coverage.see_rows(listed.record.file, table)
        self._finish(coverage, category, "scores")

    def _patches(self, kind: str, category: str, images: CategoryImages) -> Iterator[int]:
        """Check a kind with a row for each patch; yields the images of each row group."""
        coverage = Coverage(images.done, "done", self.findings)
        for listed, table in self._tables(category, kind):
            if kind == "embeddings":
                check_embeddings(listed, table, self.findings)
            else:
                check_distances(listed, table, self.findings)
                if (targets := self._targets(listed, images)) is not None:
                    check_matches(listed, table, targets, self.findings)
            if self._knows_images(category):
                check_positions(listed, table, coverage, self.findings)
            yield count_images(table)
        self._finish(coverage, category, kind)

    def _finish(self, coverage: Coverage, category: str, kind: str) -> None:
        writers = [stage for stage in self.stages if kind in stage.kinds and stage.covers(category)]
        if writers and self._knows_images(category) and self._is_whole(category, kind):
            coverage.finish(f"{kind}/{folder_name(category)}")

    def _knows_images(self, category: str) -> bool:
        """Whether all rows of ``images`` could be read: only then do others lack theirs, or have too many."""
        return self._is_whole(category, "images")

    def _is_whole(self, category: str, kind: str) -> bool:
        """Whether stages that write a kind are finished, and their files undamaged."""
        kinds = {"images"} if kind == "failures" else {kind}  # who writes images also writes failures
        unfinished = any(kinds & set(stage.kinds) and not stage.finished for stage in self.stages)
        return not unfinished and (kind, category) not in self.files.damaged

    # What several kinds have to say together

    def _check_rows(self, category: str) -> None:
        """Do rows add up to what the completion records count?"""
        for stage in self.stages:
            for kind in {*stage.kinds, "failures"} | ({"images"} if stage.stage == "fit" else set()):
                recorded = stage.recorded(kind, category)
                found = self.counted[stage.stage, category, kind]
                whole = stage.finished and (kind, category) not in self.files.damaged
                if whole and recorded is not None and found != recorded:
                    place = kind if kind == "failures" else f"{kind}/{folder_name(category)}"
                    what = f"{found} rows of {stage.stage} in category {category!r}"
                    self.findings.add(place, what, f"{recorded}, as its completion records say")

    def _check_ids(self) -> int:
        """No image in two categories; counts images."""
        ids = pa.chunked_array(self._ids, pa.string())
        doubled = [row["values"] for row in ids.value_counts().to_pylist() if row["counts"] > 1]
        expected = "an id of its own for each image"
        self.findings.count("images", "ids in several categories", expected, len(doubled), (sorted(doubled) or [""])[0])
        return len(ids)

    def _check_banks(self, category: str, images: CategoryImages) -> None:
        references = images.references if ("images", category) not in self.files.damaged else None
        for stage in self.stages:
            for record in stage.done:
                if record.bank is not None and record.category == category:
                    check_bank(self.store, stage, record, references, self.findings)

    # What patches can match

    def _targets(self, listed: ListedFile, images: CategoryImages) -> Mapping[str, Grid] | None:
        """Images that a file's patches can match; ``None`` where nothing here says."""
        if listed.stage == "match":
            return images.done if self._knows_images(listed.category) else None
        stage = next(stage for stage in self.stages if stage.stage == listed.stage)
        banks = stage.settings.get("banks")
        if banks is not None and Folder(banks).location != self.store.location:
            if (banks, listed.category) not in self._elsewhere:
                self._elsewhere[banks, listed.category] = self._references_of(banks, listed.category)
            return self._elsewhere[banks, listed.category]
        return images.references if ("images", listed.category) not in self.files.damaged else None

    def _references_of(self, banks: str, category: str) -> dict[str, Grid] | None:
        """Reference images of banks in another folder, which may have gone meanwhile."""
        columns = ["image_id", "category", "status", "grid_rows", "grid_cols"]
        try:
            rows = Store(banks, "fit").read("images", columns).to_pylist()
        except (AnomalyDINOError, OSError, ValueError, KeyError) as error:
            self.notes.append(f"not checked: matches of category {category!r}, as their bank is not at hand ({error})")
            return None
        own = (row for row in rows if row["category"] == category and row["status"] == "reference")
        return {row["image_id"]: (row["grid_rows"], row["grid_cols"]) for row in own}


def main(options: Any, console: Console) -> int:
    """``anomalydino verify OUT``."""
    report = verify(options.out, console)
    for line in [*map(str, report.problems), *report.notes]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    looked_at = f"{report.files} files, {report.rows} rows, {report.images} images"
    if report.problems:
        line = f"{looked_at}: {len(report.problems)} problem(s). {_ADVICE}"
    else:
        line = f"{looked_at}: nothing wrong"
    console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 1 if report.problems else 0
