"""Which settings are locations, and where relative ones start.

A command that runs elsewhere (a Ray job, a file of stages) has no current folder that its author would know: its
relative paths are made absolute where it is read. URIs stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anomalydino_plugin import ConfigError

LOCATIONS = frozenset(
    {"images", "out", "references", "calibration", "embeddings", "banks", "weights", "file", "to", "summary"}
)
_UNTRAINED = "random"  # --weights random or random:SEED names no file


def absolute(values: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """The same settings with absolute locations.

    Args:
        values: settings by name.
        base: where relative paths start.

    Raises:
        ConfigError: a location is empty.
    """
    return {
        name: _absolute_all(name, value, base) if name in LOCATIONS and isinstance(value, (str, list)) else value
        for name, value in values.items()
    }


def _absolute_all(name: str, value: str | list[str], base: Path) -> str | list[str]:
    if isinstance(value, list):
        return [_absolute(name, one, base) for one in value]
    return _absolute(name, value, base)


def _absolute(name: str, value: str, base: Path) -> str:
    if not value.strip():
        raise ConfigError(f"--{name} is empty: expected a path or URI.")
    if "\0" in value:
        raise ConfigError(f"--{name}={value!r} holds a zero byte: expected a path or URI.")
    if "://" in value or (name == "weights" and value.partition(":")[0] == _UNTRAINED):
        return value
    # Path.expanduser and Path.resolve raise errors of their own, for an unknown ~user and for links in circles.
    return os.path.realpath(base / os.path.expanduser(value))  # noqa: PTH111
