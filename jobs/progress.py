"""Progress of a run: images done, rate, remaining time; on a terminal as a bar, elsewhere as a line now and then."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LINE_EVERY = 15.0  # seconds between lines where there is no terminal


class ImageProgress:
    """Counts images of one stage.

    Args:
        console: where to show it.
        description: the stage.
        total: images to do.
    """

    def __init__(self, console: Console, description: str, total: int) -> None:
        self._console = console
        self._description = description
        self._total = total
        self._done = 0
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> ImageProgress:
        self._started = self._last_line = time.monotonic()
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._description, total=self._total, rate="")
        return self

    def advance(self, images: int) -> None:
        """Report more images as done."""
        self._done += images
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=self.rate())
        elif now - self._last_line >= _LINE_EVERY or self._done >= self._total:
            self._last_line = now
            self._console.print(
                f"{self._description}: {self._done}/{self._total} images, {self.rate()}, {self._left()}"
            )

    def rate(self) -> str:
        """Images per second so far."""
        elapsed = max(time.monotonic() - self._started, 1e-9)
        return f"{self._done / elapsed:.2f} images/s"

    def _left(self) -> str:
        elapsed = time.monotonic() - self._started
        if not self._done:
            return "remaining time unknown"
        return f"{elapsed * (self._total - self._done) / self._done:.0f} s left"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
