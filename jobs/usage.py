"""The parser of the command line: as jsonargparse's, but wrong usage is one line that says what was expected."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from jobs.messages import clean

_SUBTYPES = re.compile(
    r'Parser key "(?P<key>[^"]*)":\s+Does not validate against any of the Union subtypes\s+Subtypes: \[(?P<types>.*?)\]'
    r"\s+Errors:.*Given value: (?P<value>.*)",
    re.DOTALL,
)
_TYPE = re.compile(r'Parser key "(?P<key>[^"]*)":\s+Expected an? (?P<types>.*)\. Got value: (?P<value>.*)', re.DOTALL)


class CommandParser(ArgumentParser):  # type: ignore[misc]  # no type information
    """Ends with status 2 and one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong, without the list of all options before it."""
        parser = getattr(ex, "subcommand_parser", None) or self
        name = parser.prog.replace(" [options]", "")
        sys.stderr.write(f"{name}: {_readable(clean(message))} See {name} --help.\n")
        sys.exit(2)

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:
        """As jsonargparse's; a file that is no text is wrong usage, too."""
        try:
            return super().parse_args(args, *more, **options)
        except UnicodeDecodeError as error:
            self.error(f"--config is no text file in UTF-8: {error}.", error)
        except ImportError as error:  # anomalib, in the same process, lets jsonargparse look at remote files
            self.error(f"--config takes a local file, not a URI ({error}).", error)


def _readable(message: str) -> str:
    if match := _SUBTYPES.match(message) or _TYPE.match(message):
        types = match["types"].replace("<class 'NoneType'>, ", "").replace("typing.", "")
        types = re.sub(r"<class '(\w+)'>", r"\1", types)
        return f"--{match['key']}={' '.join(match['value'].split())}: expected {types}."
    return " ".join(message.split()).rstrip(".") + "."
