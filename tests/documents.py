"""The pages people read, taken apart: code blocks, links and headings of README.md and docs/*.md.

A block that no test can run has a comment right above it that says why: ``<!-- not run: needs a cluster -->``. What a
page's blocks need before they start stands in ``<!-- run first: anomalydino score ... -->``, one command a comment.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
LANGUAGES = ("sh", "python", "sql", "console")  # what somebody would type in; the last shows what came back, too
# Pages whose blocks are run by another test, or are tests and measurements themselves.
ELSEWHERE = {
    "docs/analysis.md": "tests/integration/test_analysis_recipes.py runs it",
    "docs/anomalib.md": "tests/run_tutorial.py runs it, from a bare clone",
    "docs/reliability.md": "its commands are tests and measurements",
    "docs/reproduction.md": "its commands take hours",
}
_FENCE = re.compile(r"^(?P<fence>`{3,})(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=fence)$", re.MULTILINE | re.DOTALL)
_REASON = re.compile(r"<!-- not run: (?P<reason>[^>]+?) -->\s*\Z")
_FIRST = re.compile(r"<!-- run first: (?P<command>.+?) -->")
_LINK = re.compile(r"(?<!\\)\]\((?P<target>[^)\s]+)(?:\s+\"[^\"]*\")?\)|(?:src|href)=\"(?P<html>[^\"]+)\"")
_HEADING = re.compile(r"^#{1,6} +(?P<title>.+?)\s*$", re.MULTILINE)
_CODE_SPAN = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: relative to the clone.
        line: of its first line of code.
        language: as fenced.
        code: its text.
        reason: why no test runs it, or ``None``.
    """

    page: str
    line: int
    language: str
    code: str
    reason: str | None

    @property
    def where(self) -> str:
        """Page and line."""
        return f"{self.page}:{self.line}"


def name_of(page: Path) -> str:
    """As people call it."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        reason = _REASON.search(text[: match.start()])
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(name_of(page), line, match["language"], match["code"], reason and reason["reason"]))
    return found


def run_first(page: Path) -> list[str]:
    """Commands that a page's blocks need to have been run."""
    return [match["command"] for match in _FIRST.finditer(page.read_text(encoding="utf-8"))]


def links(page: Path) -> list[str]:
    """Targets of all links and pictures outside of code."""
    text = _CODE_SPAN.sub("", _FENCE.sub("", page.read_text(encoding="utf-8")))
    return [match["target"] or match["html"] for match in _LINK.finditer(text)]


def anchors(page: Path) -> set[str]:
    """Names of headings in links, where GitHub and MkDocs agree on them."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = [re.sub(r"[`*]|\]\([^)]*\)|\[", "", match["title"]) for match in _HEADING.finditer(text)]
    return {_github(title) for title in titles} & {_mkdocs(title) for title in titles}


def _github(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")


def _mkdocs(title: str) -> str:
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


def commands(block: Block) -> list[str]:
    """Lines of a block that call ``anomalydino``, continued lines joined, without comments."""
    if block.language not in {"sh", "console"}:
        return []
    lines = block.code.replace("\\\n", " ").splitlines()
    lines = [line.removeprefix("$ ").strip() for line in lines if block.language == "sh" or line.startswith("$ ")]
    return [line.split(" # ")[0].split("#  ")[0].strip() for line in lines if line.startswith("anomalydino ")]
