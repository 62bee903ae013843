"""Every test can fail on a value: one that only runs its code would pass whatever comes out of it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(ROOT.rglob("test_*.py"))
CHECKS = {"raises", "warns", "fail", "deprecated_call"}  # of pytest; NumPy's and unittest.mock's begin with assert_
Function = ast.FunctionDef | ast.AsyncFunctionDef


def called(node: ast.AST) -> set[str]:
    """Last parts of the names that are called: ``c`` of ``a.b.c()``."""
    functions = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
    return {part.attr if isinstance(part, ast.Attribute) else getattr(part, "id", "") for part in functions}


def checks(node: ast.AST, helpers: set[str]) -> bool:
    """Whether a function asserts something, itself or through one of these helpers."""
    if any(isinstance(part, ast.Assert) for part in ast.walk(node)):
        return True
    names = called(node)
    return bool(names & (CHECKS | helpers)) or any(name.startswith("assert_") for name in names)


def functions(tree: ast.AST) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def checking_helpers(tree: ast.AST) -> set[str]:
    """Names of functions of one file that assert something, through each other as well."""
    found: set[str] = set()
    plain = [node for node in functions(tree) if not node.name.startswith("test_")]
    while more := {node.name for node in plain if checks(node, found)} - found:
        found |= more
    return found


def unchecked(source: str) -> list[str]:
    tree = ast.parse(source)
    helpers = checking_helpers(tree)
    tests = [node for node in functions(tree) if node.name.startswith("test_")]
    return [node.name for node in tests if not checks(node, helpers)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_test_asserts_something(path):
    assert unchecked(path.read_text()) == []


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("    run()", ["test_it"]),
        ("    assert run()", []),
        ("    with pytest.raises(ValueError):\n        run()", []),
        ("    np.testing.assert_allclose(run(), 1)", []),
        ("    through()", []),
        ("    idle()", ["test_it"]),
    ],
)
def test_the_check_finds_tests_that_cannot_fail_on_a_value(body, found):
    helpers = "def direct():\n    assert 1\n\ndef through():\n    direct()\n\ndef idle():\n    run()\n\n"
    assert unchecked(f"{helpers}def test_it():\n{body}\n") == found
