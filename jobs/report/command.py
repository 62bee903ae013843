"""``anomalydino report OUT``: read the run, draw its images, write one HTML file whole or not at all."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from jobs.config import ReportConfig
from jobs.filesystem import Folder
from jobs.patch_reader import ImagePatches, read_patches
from jobs.progress import ImageProgress
from jobs.report.drawing import Drawer, Picture
from jobs.report.page import render
from jobs.run_records import Row, Run, choose, read_run

NAME = "report.html"
_AHEAD = 4  # images drawn ahead of the writer, for each thread
Item = TypeVar("Item")
Result = TypeVar("Result")


def main(options: Any, console: Console) -> int:
    """``anomalydino report OUT``."""
    run(
        ReportConfig(
            out=options.out,
            file=options.file,
            category=options.category,
            max_images=options.max_images,
            thumbnail=options.thumbnail,
        ),
        console,
    )
    return 0


def run(config: ReportConfig, console: Console) -> str:
    """Write the report.

    Returns:
        Where it is, a path or URI.

    Raises:
        AnomalyDINOError: no finished run, or no such category.
    """
    found = read_run(config.out, config.categories)
    rows = choose(found.scores, config.max_images)
    folder, name = _target(config, found)
    with ImageProgress(console, "report", len(rows)) as progress, folder.writing(name) as path:
        pictures = _counted(_pictures(found, rows, config.thumbnail), progress)
        with path.open("w", encoding="utf-8", errors="replace") as file:
            file.writelines(render(found, found.store.folder.name or "run", rows, pictures))
        size = path.stat().st_size
    cards = "" if len(rows) == found.images else f" ({len(rows)} of {found.images} images have a card)"
    console.print(f"{size / 1e6:.1f} MB{cards} -> {folder.uri(name)}", markup=False, soft_wrap=True)
    return folder.uri(name)


def _target(config: ReportConfig, found: Run) -> tuple[Folder, str]:
    if config.file is None:
        return found.store.folder, NAME
    path = Path(config.file).expanduser().resolve()
    return Folder(path.parent), path.name


def _pictures(found: Run, rows: Sequence[Row], edge: int) -> Iterator[tuple[int, Picture]]:
    """In the order of the patch scores; images without any come last."""
    drawer = Drawer(found, edge)
    numbers = {row["image_id"]: number for number, row in enumerate(rows)}

    def draw(item: tuple[int, ImagePatches | None]) -> tuple[int, Picture]:
        return item[0], drawer.draw(rows[item[0]], item[1])

    yield from _ahead(draw, _with_patches(found, rows, numbers))


def _with_patches(
    found: Run, rows: Sequence[Row], numbers: dict[str, int]
) -> Iterator[tuple[int, ImagePatches | None]]:
    grids = {row["image_id"]: (row["grid_rows"], row["grid_cols"]) for row in rows if row["grid_rows"] is not None}
    seen = set()
    for patches in read_patches(found.store, grids):
        seen.add(patches.image_id)
        yield numbers[patches.image_id], patches
    yield from ((number, None) for image_id, number in numbers.items() if image_id not in seen)


def _ahead(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Results in the order of the items; a few are worked on at a time."""
    threads = os.cpu_count() or 1
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > _AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _counted(pictures: Iterable[tuple[int, Picture]], progress: ImageProgress) -> Iterator[tuple[int, Picture]]:
    for item in pictures:
        yield item
        progress.advance(1)
