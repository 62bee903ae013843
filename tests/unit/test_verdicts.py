"""`make bench` gathers what its scripts print."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import run_all
from verdicts import Row, Verdicts, read_back


def test_lines_are_read_back(capsys):
    verdicts = Verdicts()
    verdicts.at_least("bottle: times as fast", 2.25, 2)
    verdicts.at_most("distances off", 3e-7, 1e-5)
    verdicts.not_measured("latency", "no GPU at hand")
    verdicts.report("seconds", 0.25)
    assert verdicts.status == 0
    verdicts.at_most("memory", 1.2, 1.1)
    assert verdicts.status == 1
    assert read_back("some table\n" + capsys.readouterr().out) == [
        Row("bottle: times as fast", "2.25", "at least 2", "reached"),
        Row("distances off", "3e-07", "at most 1e-05", "reached"),
        Row("latency", "-", "-", "not measured: no GPU at hand"),
        Row("seconds", "0.25", "-", "measured"),
        Row("memory", "1.2", "at most 1.1", "MISSED"),
    ]


@pytest.mark.parametrize(("value", "good"), [(float("nan"), False), (float("inf"), False), (0.0, True)])
def test_what_is_no_number_is_missed(capsys, value, good):
    verdicts = Verdicts()
    verdicts.at_most("off", value, 1)
    assert verdicts.status == int(not good)
    assert len(read_back(capsys.readouterr().out)) == 1


def test_every_script_is_there():
    for script in run_all.SCRIPTS:
        assert (run_all.HERE / f"{script}.py").is_file(), script


def test_a_missing_peer_leaves_its_part_out():
    assert run_all.words_of("speed_matching", {"official": None, "musc": None}) is None
    assert run_all.words_of("speed_matching", {"official": "a", "musc": None}) == ["--official", "a"]
    assert run_all.words_of("speed_matching", {"official": "a", "musc": "b"}) == ["--official", "a", "--musc", "b"]


def test_a_script_that_breaks_is_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(run_all, "HERE", tmp_path)
    (tmp_path / "broken.py").write_text("raise SystemExit(3)")
    (row,) = run_all.run("broken", [], tmp_path / "broken.md")
    assert row == Row("ran to its end", "3", "exit 0", "MISSED")


def test_scripts_that_were_not_run_keep_their_rows(tmp_path, monkeypatch, capsys):
    for name, value in (("first", 2), ("second", 0.5)):
        (tmp_path / f"{name}.py").write_text(f"print('- {name}: {value} (reached, at least 0.1)')")
    monkeypatch.setattr(run_all, "HERE", tmp_path)
    monkeypatch.setattr(run_all, "SCRIPTS", {"first": [], "second": []})
    words = ["run_all", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(run_all, "circumstances", lambda: "on Monday")
    monkeypatch.setattr(sys, "argv", words)
    assert run_all.main() == 0
    (tmp_path / "first.py").write_text("print('- first: 3 (MISSED, at least 4)')")
    monkeypatch.setattr(run_all, "circumstances", lambda: "on Tuesday")
    monkeypatch.setattr(sys, "argv", [*words, "--only", "first"])
    assert run_all.main() == 1
    text = (tmp_path / "out" / "verdicts.md").read_text()
    assert text in capsys.readouterr().out
    assert text.splitlines()[2:] == [
        "| first | first | 3 | at least 4 | MISSED | 1 |",
        "| second | second | 0.5 | at least 0.1 | reached | 2 |",
        "",
        "1. on Tuesday",
        "2. on Monday",
    ]
