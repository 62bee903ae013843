"""``anomalydino run FILE``: the stages of a YAML file, one after the other, on one Ray.

    defaults:                 settings of every stage that has them
      out: run
      resolution: 448
    stages:
      - extract: {images: parts}
      - match: {embeddings: run}
      - evaluate: {}

Names are those of the flags. The file is checked as a whole before anything runs. Relative paths start at the file's
folder, as those of a manifest do: the file means the same wherever it is started from. Nothing is stored but what the
stages store, and stages resume, so repeating the command goes on.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from rich.console import Console

from anomalydino_plugin import AnomalyDINOError, ConfigError
from jobs import config
from jobs.locations import absolute
from jobs.messages import Messages

_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class _OutOnly:
    """Settings of commands that read a finished run."""

    out: str


@dataclass(frozen=True, kw_only=True)
class _Evaluation(_OutOnly):
    """Settings of ``evaluate``."""

    pixel: bool | None = None


# command -> module of `jobs` and settings; a module with `run(config, console)`, or `main(options, console)` -> status
_COMMANDS: dict[str, tuple[str, type]] = {
    "extract": ("extract", config.ExtractConfig),
    "fit": ("fit", config.FitConfig),
    "score": ("score", config.ScoreConfig),
    "match": ("match", config.MatchConfig),
    "batched": ("batched", config.BatchedConfig),
    "evaluate": ("evaluate", _Evaluation),
    "verify": ("verify", _OutOnly),
    "report": ("report.command", config.ReportConfig),
    "maps": ("maps", config.MapsConfig),
}
_SECTIONS = ("defaults", "stages")


@dataclass(frozen=True)
class Stage:
    """One stage of a file.

    Attributes:
        name: of its command.
        settings: checked.
    """

    name: str
    settings: Any

    def written(self) -> dict[str, dict[str, Any]]:
        """As in a file: what differs from the defaults of the command."""
        fields = dataclasses.fields(self.settings)
        values = {field.name: getattr(self.settings, field.name) for field in fields}
        return {self.name: {field.name: values[field.name] for field in fields if values[field.name] != field.default}}


def main(options: Any, console: Messages) -> int:
    """Run the stages of ``options.file``.

    Returns:
        Status of the command: 0, what a failed check returned, or 130 after Ctrl-C.

    Raises:
        AnomalyDINOError: the file is wrong (nothing has run then), or a stage failed (earlier ones are kept).
    """
    stages = load(options.file)
    address = _address(stages, options.file)
    from jobs import cluster

    with cluster.connect(address):
        for number, stage in enumerate(stages, 1):
            console.print(f"stage {number} of {len(stages)}: {stage.name}", style="bold")
            try:
                status = _run(stage, console)
            except KeyboardInterrupt:
                line = f"interrupted in stage {number} ({stage.name}); {_what_is_kept(stage)}"
                console.error("run", line)
                return _INTERRUPTED
            if status:
                return status
    return 0


def load(file: str) -> list[Stage]:
    """Read and check a whole file.

    Raises:
        ConfigError: names file, stage, key and what was expected.
    """
    path = Path(file).expanduser().resolve()
    content = _read(path, file)
    _known(content, _SECTIONS, f"{file}")
    defaults, listed = content.get("defaults") or {}, content.get("stages")
    if not isinstance(defaults, dict):
        raise ConfigError(f"{file}: 'defaults' is {defaults!r}: expected settings by name.")
    if not isinstance(listed, list) or not listed:
        raise ConfigError(f"{file}: 'stages' is {listed!r}: expected a list such as [extract: {{images: parts}}].")
    _check_defaults(defaults, file)
    return [_stage(entry, defaults, path, f"{file}: stage {number}") for number, entry in enumerate(listed, 1)]


def _read(path: Path, file: str) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {file!r}: {error.strerror}. Expected a YAML file of stages.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file!r} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file!r} holds {type(content).__name__}: expected the keys 'stages' and maybe 'defaults'.")
    return content


def _check_defaults(defaults: Mapping[Any, Any], file: str) -> None:
    hints = {name: hint for _, kind in _COMMANDS.values() for name, hint in get_type_hints(kind).items()}
    _known(defaults, hints, f"{file}: defaults")
    for name, value in defaults.items():
        _check_type(name, value, hints[name], f"{file}: defaults")


def _stage(entry: Any, defaults: Mapping[str, Any], path: Path, where: str) -> Stage:
    if isinstance(entry, str):
        entry = {entry: {}}  # `- evaluate`: all its settings are defaults
    if not isinstance(entry, dict) or len(entry) != 1:
        raise ConfigError(f"{where} is {entry!r}: expected one command with its settings, such as extract: {{...}}.")
    ((name, given),) = entry.items()
    _known([name], _COMMANDS, where, "command")
    where, kind, given = f"{where} ({name})", _COMMANDS[name][1], {} if given is None else given
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: its settings are {given!r}: expected settings by name.")
    hints = get_type_hints(kind)
    _known(given, hints, where)
    values = {key: value for key, value in defaults.items() if key in hints} | given
    values = {key: _check_type(key, value, hints[key], where) for key, value in values.items()}
    return Stage(name, _built(kind, values, path, where))


def _built(kind: type, values: dict[str, Any], path: Path, where: str) -> Any:
    required = [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise ConfigError(f"{where}: setting {missing[0]!r} is missing. Add it to the stage or to 'defaults'.")
    try:
        return kind(**absolute(values, path.parent))
    except AnomalyDINOError as error:
        raise ConfigError(f"{where}: {error}") from error


def _known(names: Iterable[Any], expected: Iterable[str], where: str, what: str = "setting") -> None:
    """Refuse a name that is none, and say which one it is close to."""
    choices = sorted(expected)
    for name in names:
        if name not in choices:
            near = difflib.get_close_matches(str(name), choices, 1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Expected one of {', '.join(choices)}."
            raise ConfigError(f"{where}: unknown {what} {name!r}. {hint}")


def _check_type(name: str, value: Any, hint: Any, where: str) -> Any:
    """A value as the command line would read it."""
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{name}", type=hint)
    try:
        return parser.parse_object({name: value})[name]
    except ArgumentError as error:
        expected = getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")
        quotes = " Put text that looks like a number in quotes." if isinstance(value, (int, float)) else ""
        raise ConfigError(f"{where}: setting {name!r} is {value!r}: expected {expected}.{quotes}") from error


def _address(stages: list[Stage], file: str) -> str | None:
    """One Ray for all stages: they must agree on it."""
    with_ray = [stage.settings.ray_address for stage in stages if hasattr(stage.settings, "ray_address")]
    found = sorted({str(address) for address in with_ray})
    if len(found) > 1:
        raise ConfigError(f"{file}: stages differ in 'ray_address' ({', '.join(found)}): give it once, in 'defaults'.")
    return with_ray[0] if with_ray else None


def _run(stage: Stage, console: Console) -> int:
    name, kind = _COMMANDS[stage.name]
    module = import_module(f"jobs.{name}")
    if issubclass(kind, _OutOnly):
        status: int = module.main(stage.settings, console)
        return status
    summary = module.run(stage.settings, console)
    if hasattr(summary, "done"):
        console.print(
            f"{summary.done} images done, {summary.failed} failed -> {stage.settings.out}", markup=False, soft_wrap=True
        )
    if getattr(stage.settings, "report", False):
        from jobs.report.after_run import show

        show(stage.settings.out, console)
    return 0


def _what_is_kept(stage: Stage) -> str:
    from jobs.stage import what_is_kept

    return what_is_kept(stage.settings.out)
