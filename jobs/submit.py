"""``anomalydino submit -- COMMAND``: a command as a job of a running cluster, through Ray's Jobs API.

The command is read and checked here; the job gets its settings with absolute locations, so that neither this machine's
current folder nor its ``--config`` files are needed there. The user's folder is never uploaded: a job has no working
folder, or an unpacked wheel of ours. (Ray's own ``py_modules`` would run ``pip install`` on a wheel, with torch and all
that it needs, on every node.)

The submission id depends on the command alone: a job that is running is followed, one that has ended is submitted again
as ``ID-2``, ``ID-3``, and goes on where it stopped, as the command would anywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shlex
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from anomalydino_plugin import ConfigError
from jobs.locations import absolute

SUBMITTED = ("extract", "fit", "score", "match", "batched", "evaluate", "verify", "report", "maps", "run")
_DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
_PIPELINE_FILE = "pipeline.yaml"
_NEEDED = ("aiohttp", "requests", "pydantic")  # what ray[default] adds for the Jobs API
_POLL = 0.5  # seconds
_PATIENCE = 60.0  # seconds
_ID_LENGTH = 10  # hexadecimal digits
_NO_AGENT = "No available agent"  # Ray's words
_NOT_FOUND = 127  # exit status of a shell
_INTERRUPTED = 130


@dataclass(frozen=True)
class JobCommand:
    """A command that means the same on every machine.

    Attributes:
        words: command and flags, absolute locations.
        files: content by name, of files in the job's working folder.
    """

    words: tuple[str, ...]
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def submission_id(self) -> str:
        """The same for the same command."""
        content = json.dumps([self.words, dict(self.files)], sort_keys=True)
        return f"anomalydino-{self.words[0]}-{hashlib.sha256(content.encode()).hexdigest()[:_ID_LENGTH]}"


def check_words(words: Sequence[str]) -> None:
    """Refuse what cannot be a job, before it is parsed.

    Raises:
        ConfigError: no command, or one that is not submitted.
    """
    names = ", ".join(SUBMITTED)
    if not words:
        raise ConfigError(f"no command: expected -- and one of {names}, such as: submit -- score --images ...")
    if words[0] not in SUBMITTED:
        raise ConfigError(f"{words[0]!r} cannot be submitted: expected one of {names}.")


def job_command(name: str, settings: Any) -> JobCommand:
    """What a job is to run.

    Args:
        name: of the command.
        settings: its settings object, or the parsed options of a command that has none.

    Raises:
        ConfigError: an address of another cluster is set, or a file of stages is wrong.
    """
    if name == "run":
        return _pipeline_command(settings.file)
    if not dataclasses.is_dataclass(settings):
        options = {key: value for key, value in vars(settings).items() if value is not None}
        options = absolute(options, Path.cwd())
        out = options.pop("out")
        places = out if isinstance(out, list) else [str(out)]
        return JobCommand((name, *places, *(_flag(key, value) for key, value in options.items())))
    _refuse_other_cluster([settings])
    fields = dataclasses.fields(settings)
    values = {field.name: getattr(settings, field.name) for field in fields}
    changed = {field.name: values[field.name] for field in fields if values[field.name] != field.default}
    return JobCommand((name, *(_flag(key, value) for key, value in absolute(changed, Path.cwd()).items())))


def _pipeline_command(file: str) -> JobCommand:
    import yaml  # type: ignore[import-untyped]

    from jobs.pipeline import load

    stages = load(file)
    _refuse_other_cluster([stage.settings for stage in stages])
    content = yaml.safe_dump({"stages": [stage.written() for stage in stages]}, sort_keys=False, allow_unicode=True)
    return JobCommand(("run", _PIPELINE_FILE), {_PIPELINE_FILE: content})


def _refuse_other_cluster(settings: Sequence[Any]) -> None:
    for one in settings:
        address = getattr(one, "ray_address", None)
        if address not in {None, "auto"}:
            raise ConfigError(
                f"--ray_address={address} inside a submitted command: a job runs on the cluster it is submitted to. "
                "Leave it out, and give the dashboard's address: submit --address."
            )


def _flag(name: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"--{name}={text}"


def main(options: Any, console: Console) -> int:
    """Submit ``options.command``, a ``JobCommand``.

    Returns:
        Exit status of the job; 0 if it is not followed; 130 after Ctrl-C.

    Raises:
        ConfigError: no cluster, no wheel, or a part of Ray is missing.
    """
    wheel = _checked_wheel(options.wheel)
    address = options.address or os.environ.get(_ADDRESS_VARIABLE) or _DEFAULT_ADDRESS
    client = _client(address if "://" in address else f"http://{address}")
    try:
        job = _start(client, options.command, wheel, console)
        if not options.follow:
            console.print(_how_to_go_on(client, job), markup=False, soft_wrap=True)
            return 0
        return _follow(client, job, console)
    except (RuntimeError, OSError) as error:  # OSError: requests' and aiohttp's own, too
        raise ConfigError(f"the cluster at {address} refused or went away: {_in_short(error)}") from error


def _in_short(error: Exception) -> str:
    lines = str(error).split("\n")
    hint = ""
    if _NO_AGENT in lines[0]:
        hint = (
            " The head's dashboard agent did not start: its port (52365) may be taken. Start the node with another "
            "--dashboard-agent-listen-port."
        )
    return (lines[0] if len(lines) == 1 else f"{lines[0]} ... {[line for line in lines if len(line) > 1][-1]}") + hint


def _client(address: str) -> Any:
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ConfigError(f"submit needs the extra 'cluster' ({missing[0]} is missing): pip install 'ray[default]'.")
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # it reports the end of a log
    os.environ[_ADDRESS_VARIABLE] = address  # Ray lets this and RAY_ADDRESS override what it is given
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, OSError, KeyError) as error:
        raise ConfigError(
            f"no Ray dashboard answers at {address}: expected http://HOST:8265 of a running head node, started with "
            f"its dashboard (ray start --head --dashboard-host ...). ({type(error).__name__})"
        ) from error


# Starting


def _start(client: Any, command: JobCommand, wheel: Path | None, console: Console) -> str:
    """Id of the job that runs the command: one that is running already, or a new one."""
    attempts = _attempts(client, command.submission_id)
    if attempts and not attempts[-1].status.is_terminal():
        job = str(attempts[-1].submission_id)
        console.print(f"job {job} is running already: following it", markup=False, soft_wrap=True)
        return job
    again = f"-{len(attempts) + 1}" if attempts else ""  # Ray takes an id once
    job = command.submission_id + again
    with tempfile.TemporaryDirectory(prefix="anomalydino-") as folder:
        code = _fill(Path(folder), command, wheel)
        program = ("python", "-m", "jobs.cli") if wheel else ("anomalydino",)
        _when_ready(
            client.submit_job,
            entrypoint=shlex.join((*program, *command.words)),
            submission_id=job,
            runtime_env={"working_dir": folder} if code else {},
        )
    before = f" (attempt {len(attempts) + 1}; finished shards are skipped)" if attempts else ""
    console.print(f"submitted job {job}{before}", markup=False, soft_wrap=True)
    return job


def _when_ready(call: Callable[..., Any], **arguments: Any) -> None:
    """Submit, with patience for a cluster that has just been started: its agents take a while to come up."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            call(**arguments)
            return
        except RuntimeError as error:
            if _NO_AGENT not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(_POLL)


def _attempts(client: Any, submission_id: str) -> list[Any]:
    """Jobs of a command, oldest first."""
    found = {}
    for job in client.list_jobs():
        if match := re.fullmatch(re.escape(submission_id) + r"(?:-(\d+))?", str(job.submission_id)):
            found[int(match[1] or 1)] = job
    return [found[number] for number in sorted(found)]


def _fill(folder: Path, command: JobCommand, wheel: Path | None) -> bool:
    """Put what a job needs into its working folder; ``False`` if that is nothing."""
    for name, content in command.files.items():
        (folder / name).write_text(content)
    if wheel is not None:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return any(folder.iterdir())


def _checked_wheel(wheel: str | None) -> Path | None:
    if wheel is None:
        return None
    path = Path(wheel).expanduser().resolve()
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"--wheel {wheel!r} cannot be read: {getattr(error, 'strerror', None) or error}. Expected our wheel, as "
            "`python -m build --wheel` leaves it in dist/."
        ) from error
    if not {"jobs/submit.py", "anomalydino_plugin/__init__.py"} <= names:
        raise ConfigError(f"--wheel {wheel!r} is not a wheel of anomalydino-plugin: it lacks our packages.")
    return path


# Following


def _follow(client: Any, job: str, console: Console) -> int:
    from aiohttp import ClientError

    try:
        # Where the log's connection breaks, the status tells what became of the job.
        with contextlib.suppress(RuntimeError, ClientError):
            asyncio.run(_show_log(client, job))
        details = _ended(client, job)
    except KeyboardInterrupt:
        print(f"anomalydino submit: interrupted; {_how_to_go_on(client, job)}", file=sys.stderr)  # noqa: T201
        return _INTERRUPTED
    return _status(details, job, console)


async def _show_log(client: Any, job: str) -> None:
    async for text in client.tail_job_logs(job):
        sys.stdout.write(text)
        sys.stdout.flush()


def _ended(client: Any, job: str) -> Any:
    while not (details := client.get_job_info(job)).status.is_terminal():
        time.sleep(_POLL)
    return details


def _status(details: Any, job: str, console: Console) -> int:
    """Exit status of the job, and a line on it."""
    name = details.status.value
    if name == "SUCCEEDED":
        console.print(f"job {job} succeeded", markup=False, soft_wrap=True)
        return 0
    code = details.driver_exit_code
    advice = "Submit it again to go on."
    if code == _NOT_FOUND:
        advice = "The cluster's nodes lack our command on their PATH: install it there, or submit with --wheel."
    elif code is None:  # it never got to run, or was stopped: Ray knows why
        advice = f"{details.message or ''} {advice}".strip()
    how = name.lower() + (f" with exit status {code}" if code else "")
    print(f"anomalydino submit: job {job} {how}. {advice}", file=sys.stderr)  # noqa: T201
    return code if code is not None and code > 0 else 1


def _how_to_go_on(client: Any, job: str) -> str:
    address = f"--address {client.get_address()} {job}"
    return (
        f"job {job} goes on. Follow it: repeat the command, or `ray job logs --follow {address}`. "
        f"Stop it: `ray job stop {address}`."
    )
