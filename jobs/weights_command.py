"""``anomalydino weights show | fetch | import``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from anomalydino_plugin import WeightsError, WeightsFile, resolve_weights
from anomalydino_plugin.weights import import_weights
from anomalydino_plugin.weights.resolve import ENVIRONMENT, cached_path
from anomalydino_plugin.weights.wheel_source import BACKBONE, REQUIREMENT, sha256_of


def main(options: Any, console: Console) -> int:
    """Run one action."""
    if options.action == "show":
        show(options.backbone, console)
    elif options.action == "fetch":
        fetch(options.backbone, console, index_source=options.index_source)
    else:
        import_file(options.file, options.backbone, console)
    return 0


def show(backbone: str, console: Console) -> None:
    """List the sources in the order in which they are asked, and what each has; asks no network."""
    table = Table("source", "what is there", "sha256", title=f"weights of {backbone}")
    for source, path in (
        (f"environment {ENVIRONMENT}", os.environ.get(ENVIRONMENT)),
        ("cache", str(cached_path(backbone))),
    ):
        table.add_row(source, *_describe(path))
    table.add_row("hub (through timm)", "asked when the above have nothing", "")
    index = f"{REQUIREMENT}, a third party's carrier" if backbone == BACKBONE else f"has only {BACKBONE}"
    table.add_row("package index", index, "pinned" if backbone == BACKBONE else "")
    console.print(table)


def _describe(path: str | None) -> tuple[str, str]:
    if not path:
        return "not set", ""
    file = Path(path).expanduser()
    if not file.is_file():
        return f"nothing at {path}", ""
    checksum = sha256_of(file)
    known = WeightsFile(file, checksum, "cache").known
    return path, f"{checksum[:16]} ({'known' if known else 'not known'})"


def fetch(backbone: str, console: Console, *, index_source: bool) -> None:
    """Find or download weights and say where they are."""
    _report(resolve_weights(backbone, index_source=index_source), console)


def import_file(path: str | None, backbone: str, console: Console) -> None:
    """Check a file and put it into the cache.

    Raises:
        WeightsError: no file named, or one that does not fit.
    """
    if path is None:
        raise WeightsError("weights import: expected a file, for example: anomalydino weights import vits14.pth")
    if not Path(path).is_file():
        raise WeightsError(f"weights import: no file {path!r}. Expected a .safetensors or .pth file.")
    _report(import_weights(path, backbone), console)


def _report(file: WeightsFile, console: Console) -> None:
    known = "known" if file.known else "not known"
    console.print(f"{file.path} ({file.source}, sha256 {file.sha256}, {known})", markup=False, soft_wrap=True)
