"""README and docs/ against each other and against the code: links, navigation, commands, rows of tables."""

import ast
import re
import shlex
from pathlib import Path

import documents
import pytest
import yaml
from documents import PAGES, ROOT, name_of

import anomalydino_plugin
from anomalydino_plugin import ConfigError
from jobs import cli, pipeline

SITE = ROOT / "docs" / "site" / "mkdocs.yml"
BLOCKS = [block for page in PAGES for block in documents.blocks(page)]
ADDED_BY_HOOKS, OPTIONAL = {"index.md", "contributing.md", "changelog.md"}, {"reproduction.md"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_anchors_are_there(page):
    broken = []
    for target in documents.links(page):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in documents.anchors(file)):
            broken.append(target)
    assert broken == []


def test_pages_of_the_site_link_to_pages_of_the_site():
    """MkDocs knows nothing outside of docs/; README, which lies outside, becomes its first page."""
    docs = ROOT / "docs"
    for page in PAGES:
        if page.is_relative_to(docs):
            for target in documents.links(page):
                path = target.partition("#")[0]
                assert not path or "://" in path or (page.parent / path).resolve().is_relative_to(docs), target


def test_every_page_is_in_the_navigation_once():
    text = SITE.read_text(encoding="utf-8")
    listed = re.findall(r"^\s+- [^:\n]+: (\S+\.md)$", text, re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) - ADDED_BY_HOOKS == {path.name for path in (ROOT / "docs").glob("*.md")} - OPTIONAL
    assert set(listed) >= ADDED_BY_HOOKS


def test_the_hooks_add_the_rest(monkeypatch):
    names: dict = {"__file__": str(SITE.with_name("hooks.py")), "__name__": "hooks"}
    exec(compile(SITE.with_name("hooks.py").read_text(), "hooks.py", "exec"), names)  # noqa: S102 - as MkDocs does
    config = type("Config", (), {"nav": [{"Home": "index.md"}, {"Measurements": []}]})()
    names["on_config"](config)
    dated = config.nav[1]["Measurements"]
    assert dated == sorted(
        (f"benchmarks/{path.name}" for path in (ROOT / "docs/benchmarks").glob("*.md")), reverse=True
    )
    assert set(names["OUTSIDE"].values()) == ADDED_BY_HOOKS
    assert set(names["OPTIONAL"].values()) == OPTIONAL
    for source in names["OUTSIDE"]:
        page = names["inside"]((ROOT / source).read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)\s#]+)", page) + re.findall(r'src="([^"]+)"', page):
            assert "://" in target or target in ADDED_BY_HOOKS or (ROOT / "docs" / target).exists(), target
            assert not target.startswith("site/"), "the site leaves that folder out"


def test_blocks_that_are_not_run_say_why():
    """Those that are run: tests/integration/test_documents_run.py. A reason is a sentence, not a word."""
    for block in BLOCKS:
        assert block.reason is None or (len(block.reason.split()) > 1 and block.language), block.where
    assert set(documents.ELSEWHERE) >= {"docs/analysis.md", "docs/anomalib.md"}


COMMANDS = [(block.where, line) for block in BLOCKS for line in documents.commands(block)]


@pytest.mark.parametrize(("where", "line"), COMMANDS, ids=[f"{where} {line[:50]}" for where, line in COMMANDS])
def test_commands_are_understood(where, line):
    """Flags and values of every command shown, also where it cannot be run, by our own parser."""
    words = shlex.split(line.partition(" 2>")[0].partition(" | ")[0].replace("[...]", ""))[1:]
    words, submitted = cli._split_submitted(words)
    for own in (words, submitted or []):
        if own and not {"--help", "--version"} & set(own):
            options = cli._parser().parse_args(cli._with_log_flags_first(cli._spelled_out(own)))
            kind = cli._COMMANDS[options.subcommand].settings
            built = cli._build(kind, options[options.subcommand]) if kind is not None else options
            assert built is not None


def test_there_are_commands_to_look_at():
    assert len(COMMANDS) > 25
    with pytest.raises(SystemExit):
        test_commands_are_understood("", "anomalydino score --imagse photos")
    with pytest.raises(ConfigError):
        test_commands_are_understood("", "anomalydino score --images photos --out run --k 0")


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=lambda block: block.where)
def test_python_is_python_and_names_what_there_is(block):
    tree = ast.parse(block.code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "anomalydino_plugin":
            assert {alias.name for alias in node.names} <= set(anomalydino_plugin.__all__), block.where


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=lambda block: block.where)
def test_yaml_is_understood(block, tmp_path):
    content = yaml.safe_load(block.code)
    if isinstance(content, dict) and "stages" in content:
        (tmp_path / "stages.yaml").write_text(block.code)
        assert pipeline.load(str(tmp_path / "stages.yaml"))


def test_every_public_name_is_in_the_api_reference():
    listed = re.findall(r"^::: anomalydino_plugin\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(anomalydino_plugin.__all__)


ROWS = re.findall(
    r"^\| ([^|]+) \| [^|]+ \| (`[^|]+`) \| (`[^|]+`) \|$",
    (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


@pytest.mark.parametrize(("step", "functions", "tests"), ROWS, ids=[row[0] for row in ROWS])
def test_rows_of_how_it_works_exist(step, functions, tests):
    """Equation -> function -> test: neither side may be renamed alone."""
    for function in re.findall(r"`([^`]+)`", functions):
        module, _, name = function.rpartition(".")
        assert defines(module, name), function
    file = ""
    for test in re.findall(r"`([^`]+)`", tests):
        named, _, case = test.partition("::")
        file = named or file or "reference/test_stage_parity.py"
        path = ROOT / "tests" / file
        assert path.is_file(), test
        assert not case or f"def {case}(" in path.read_text(), test


def test_the_table_has_its_rows():
    assert len(ROWS) >= 12
    assert not defines("matching", "furthest")


def defines(module: str, name: str) -> bool:
    """Whether a module of the plugin defines a name, or is that module."""
    folder = ROOT / "anomalydino_plugin" / module.replace(".", "/")
    files = [folder.with_suffix(".py"), folder / f"{name}.py", folder / "__init__.py"]
    if files[1].is_file():
        return True
    texts = [file.read_text() for file in files if file.is_file()]
    return any(re.search(rf"^(?:def|class) {name}\b", text, re.MULTILINE) for text in texts)


def test_every_deviation_has_an_effect():
    text = (ROOT / "docs" / "deviations.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 8
    assert all(len(row) == 3 and row[2].strip(" |-") for row in rows), [row[0] for row in rows]


def test_no_page_is_longer_than_a_reader_has_patience_for():
    """Pages of tables and transcripts aside."""
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        words = " ".join(line for line in text.splitlines() if not line.startswith("|")).split()
        assert len(words) < 6000, name_of(page)


def test_the_parser_of_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    page = Path(tmp_path, "a.md")
    page.write_text(
        "# A `b` c\n<!-- run first: anomalydino x -->\n<!-- not run: needs a cluster -->\n\n```sh\nanomalydino score \\\n"
        "  --out x  # what\n```\n\n```python\nx = '[a](b.md)'\n```\n[l](c.md#d) `[no](e.md)` ![p](f.png)\n"
    )
    first, second = documents.blocks(page)
    assert (first.reason, first.line, second.reason) == ("needs a cluster", 6, None)
    assert documents.commands(first) == ["anomalydino score    --out x"]
    assert documents.links(page) == ["c.md#d", "f.png"]
    assert documents.run_first(page) == ["anomalydino x"]
    assert documents.anchors(page) == {"a-b-c"}
