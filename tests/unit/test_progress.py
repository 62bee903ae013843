"""What a person sees while a stage runs."""

import io
from types import SimpleNamespace

from rich.console import Console

from jobs.progress import ImageProgress


def shown(terminal: bool, steps: list[int], total: int, monkeypatch, seconds: float = 20.0) -> str:
    """What is printed when each step takes some seconds."""
    clock = iter(range(10_000))
    monkeypatch.setattr("jobs.progress.time", SimpleNamespace(monotonic=lambda: seconds * next(clock)))
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)
    with ImageProgress(console, "encoding", total) as progress:
        for step in steps:
            progress.advance(step)
    return console.file.getvalue()


def test_on_a_terminal_a_bar_with_count_and_rate(monkeypatch):
    text = shown(True, [3, 4], 7, monkeypatch)
    assert "encoding" in text
    assert "7/7" in text
    assert "images/s" in text


def test_elsewhere_a_line_now_and_then_and_a_last_one(monkeypatch):
    lines = shown(False, [0, 3, 4], 7, monkeypatch).splitlines()
    assert lines[0].startswith("encoding: 0/7 images, 0.00 images/s, remaining time unknown")
    assert lines[-1].startswith("encoding: 7/7 images")
    assert lines[-1].endswith("0 s left")


def test_no_line_for_every_step(monkeypatch):
    lines = shown(False, [1] * 50, 50, monkeypatch, seconds=0.5).splitlines()
    assert 1 < len(lines) < 10
    assert "s left" in lines[0]
