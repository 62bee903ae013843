"""What a command says: lines for people, or one JSON object a line for machines.

Names of files and folders come from anywhere: control characters are shown, never sent to a terminal, and credentials
inside URIs are left out wherever they come from.
"""

from __future__ import annotations

import json
import re
import sys
import time
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

Format = Literal["text", "json"]
Level = Literal["info", "warning"]
FORMATS: tuple[Format, ...] = ("text", "json")
LEVELS: tuple[Level, ...] = ("info", "warning")

_WARNING = "warning: "  # how lines begin that stay where --log-level=warning
_CREDENTIALS = re.compile(r"://[^/@\s'\"]*@")
_OPTION = re.compile(
    r"([?&][^=&\s]*(?:secret|token|password|signature|credential|key|sig)[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE
)


class Messages(Console):
    """A console that every command prints to.

    Args:
        form: ``text``, or ``json`` for an object a line with ``time``, ``level`` and ``message`` or a table's rows.
        level: ``info``, or ``warning`` for warnings and results alone.
    """

    def __init__(self, form: Format = "text", level: Level = "info") -> None:
        plain = form == "json" or level == "warning"
        super().__init__(force_terminal=False if plain else None, stderr=False)
        self.form, self.level = form, level

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's, with clean text; lines are not broken where no terminal asks for it."""
        cleaned = [clean(item) if isinstance(item, str) else item for item in objects]
        if self.level == "warning" and any(_is_remark(item) for item in cleaned):
            return
        if self.form == "json":
            for item in cleaned:
                self._print_json(item)
            return
        options.setdefault("soft_wrap", not self.is_terminal and all(isinstance(item, str) for item in cleaned))
        super().print(*cleaned, **options)

    def _print_json(self, item: Any) -> None:
        if isinstance(item, Table):
            self._write({"level": "result", "table": item.title, "rows": table_rows(item)})
        elif isinstance(item, str):
            level = "warning" if item.startswith(_WARNING) else "info"
            self._write({"level": level, "message": item.removeprefix(_WARNING)})

    def error(self, command: str, message: str) -> None:
        """The last line of a command that failed, on standard error."""
        message = clean(message)
        if self.form == "json":
            self._write({"level": "error", "command": command, "message": message}, sys.stderr)
        else:
            sys.stderr.write(f"anomalydino {command}: {message}\n")

    def _write(self, content: dict[str, Any], file: Any = None) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        (file or self.file).write(json.dumps({"time": stamp, **content}) + "\n")


def _is_remark(item: Any) -> bool:
    return isinstance(item, str) and not item.startswith(_WARNING)


def clean(text: str) -> str:
    """Text without control characters and without credentials."""
    shown = "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)
    return _OPTION.sub(r"\1***", _CREDENTIALS.sub("://***@", shown))


def table_rows(table: Table) -> list[dict[str, str]]:
    """Rows of a table by its headings."""
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    headings = [str(column.header) for column in table.columns]
    return [dict(zip(headings, row, strict=True)) for row in zip(*cells, strict=True)]
