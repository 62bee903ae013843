"""What ``anomalydino verify`` finds: one line for each kind of fault in each file, however many rows have it."""

from __future__ import annotations

from typing import NamedTuple


class Problem(NamedTuple):
    """Something that is not as it should be.

    Attributes:
        file: or folder, relative to OUT.
        found: what is there.
        expected: what should be.
    """

    file: str
    found: str
    expected: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.file}: {self.found}; expected {self.expected}"


class Findings:
    """Problems, in the order they were found; rows with the same fault are counted, not listed."""

    def __init__(self) -> None:
        self._counted: dict[Problem, tuple[int, str]] = {}

    def add(self, file: str, found: str, expected: str) -> None:
        """A fault of a whole file."""
        self._counted.setdefault(Problem(file, found, expected), (0, ""))

    def count(self, file: str, what: str, expected: str, number: int, example: str) -> None:
        """A fault that some of a file's rows have; nothing happens where ``number`` is 0.

        Args:
            file: or folder.
            what: in the plural, after the number.
            expected: what should be.
            number: of rows or images.
            example: one of them; the first one given is shown.
        """
        if number:
            before, first = self._counted.get(Problem(file, what, expected), (0, example))
            self._counted[Problem(file, what, expected)] = (before + number, first)

    @property
    def problems(self) -> list[Problem]:
        """All of them."""
        return [
            problem._replace(found=f"{number} {problem.found} (first: {example})") if number else problem
            for problem, (number, example) in self._counted.items()
        ]
