"""Figures held against their aims: one line each, in a form that `run_all.py` gathers into its table."""

import re
from typing import NamedTuple

_LINE = re.compile(
    r"^- (?P<figure>.+): (?P<value>[-+.\de]+|nan|inf) \((?P<verdict>reached|MISSED), (?P<aim>at \w+ .+)\)$"
)
_REPORTED = re.compile(r"^- (?P<figure>.+): (?P<value>[-+.\de]+|nan|inf) \(no aim\)$")
_MISSING = re.compile(r"^- (?P<figure>.+): not measured \((?P<reason>.+)\)$")


class Row(NamedTuple):
    """A line that was read back."""

    figure: str
    value: str
    aim: str
    verdict: str


class Verdicts:
    """Prints a line for each figure, and knows whether one was missed."""

    def __init__(self) -> None:
        self.missed = 0

    def at_least(self, figure: str, value: float, aim: float) -> None:
        self._say(figure, value, "at least", aim, value >= aim)

    def at_most(self, figure: str, value: float, aim: float) -> None:
        self._say(figure, value, "at most", aim, value <= aim)

    def not_measured(self, figure: str, reason: str) -> None:
        print(f"- {figure}: not measured ({reason})", flush=True)

    def report(self, figure: str, value: float) -> None:
        """A figure that is asked for without an aim."""
        print(f"- {figure}: {value:.3g} (no aim)", flush=True)

    def _say(self, figure: str, value: float, side: str, aim: float, good: bool) -> None:
        self.missed += not good
        print(f"- {figure}: {value:.3g} ({'reached' if good else 'MISSED'}, {side} {aim:g})", flush=True)

    @property
    def status(self) -> int:
        """For ``sys.exit``."""
        return int(self.missed > 0)


def read_back(output: str) -> list[Row]:
    """The lines of a script's output."""
    found = []
    for line in output.splitlines():
        if match := _LINE.match(line):
            found.append(Row(match["figure"], match["value"], match["aim"], match["verdict"]))
        elif match := _REPORTED.match(line):
            found.append(Row(match["figure"], match["value"], "-", "measured"))
        elif match := _MISSING.match(line):
            found.append(Row(match["figure"], "-", "-", f"not measured: {match['reason']}"))
    return found
