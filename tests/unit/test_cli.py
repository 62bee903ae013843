import subprocess
import sys
from typing import get_args

import pytest
import yaml

from anomalydino_plugin import ConfigError
from jobs import cli
from jobs.cli import _parser, _spelled_out, main
from jobs.config import MatchConfig, ScoreConfig

HEAVY = {"torch", "ray", "pyarrow", "anomalib", "lightning", "cv2", "timm", "jinja2"}


def loaded_by(*code: str) -> set[str]:
    program = ";".join([*code, "import sys", "print(' '.join(sys.modules))"])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_importing_the_package_loads_nothing_heavy():
    assert not loaded_by("import anomalydino_plugin") & HEAVY


def test_help_loads_nothing_heavy():
    assert not loaded_by("from jobs.cli import _parser", "_parser().format_help()") & HEAVY


def test_decoding_workers_load_no_torch():
    """Each is a process of its own, and torch costs it seconds and 200 MB."""
    assert "torch" not in loaded_by("import jobs.dataflow, jobs.decode")


def test_help_lists_the_commands():
    done = subprocess.run([sys.executable, "-m", "jobs.cli", "--help"], capture_output=True, text=True, check=True)
    for command in cli._COMMANDS:
        assert command in done.stdout


def test_flags_as_users_type_them():
    words = [
        "score",
        "--write-embeddings",
        "--no-index-source",
        "--shard-size",
        "8",
        "--k=3",
        "--reference-masking",
        "true",
    ]
    assert _spelled_out(words) == [
        *("score", "--write_embeddings=true", "--index_source=false"),
        *("--shard_size", "8", "--k=3", "--reference_masking", "true"),
    ]


def test_yaml_and_flags_share_names(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({"images": "a", "out": "b", "masking": "on", "category": ["x", "y"]}))
    options = _parser().parse_args(["score", "--config", str(file), "--masking", "off"]).score
    assert (options.images, options.masking, options.category) == ("a", "off", ["x", "y"])


@pytest.mark.parametrize(("written", "meant"), [("on", "on"), ("off", "off"), ("auto", "auto"), ("'on'", "on")])
def test_masking_may_be_written_bare_in_yaml(tmp_path, written, meant):
    from jobs.cli import _build

    file = tmp_path / "job.yaml"
    file.write_text(f"images: a\nout: b\nmasking: {written}\n")
    assert _build(ScoreConfig, _parser().parse_args(["score", "--config", str(file)]).score).masking == meant
    flags = ["score", "--images", "a", "--out", "b", "--masking", meant]
    assert _build(ScoreConfig, _parser().parse_args(flags).score).masking == meant


@pytest.mark.parametrize(
    "change", [{"shots": 0}, {"k": 0}, {"resolution": 0}, {"seed": -1}, {"max_failures": 0.0}, {"false_alarm": 2.0}]
)
def test_settings_out_of_range(change):
    with pytest.raises(ConfigError, match="expected"):
        ScoreConfig(images="a", out="b", **change)


def test_identity_ignores_what_cannot_change_a_score():
    base = ScoreConfig(images="a", out="b")
    assert base.identity("w") == ScoreConfig(images="a", out="c", num_workers=3, report=True).identity("w")
    assert base.identity("w") != ScoreConfig(images="a", out="b", k=2).identity("w")
    assert base.identity("w") != base.identity("v")
    assert base.identity("w", ["1 a"]) != base.identity("w", ["1 a", "2 b"])


def test_our_errors_are_one_line(tmp_path, capsys):
    assert main(["score", "--images", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "does not exist" in captured.err


def test_unknown_flags_and_commands_are_refused():
    for words in (["score", "--imagse", "x"], ["scroe"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2


def test_ctrl_c_says_what_is_kept(monkeypatch, tmp_path, capsys):
    def interrupted(command, settings, console):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert main(["score", "--images", "a", "--out", str(tmp_path)]) == 130
    captured = capsys.readouterr().err
    assert captured.count("\n") == 1
    assert f"committed under {str(tmp_path)!r} are nothing. Repeat the command" in captured


def test_flags_offer_the_engines_and_kernels_that_there_are():
    from anomalydino_plugin.engines.choice import ENGINES
    from anomalydino_plugin.kernels.rows import KERNELS
    from jobs import settings

    assert get_args(settings.Engine) == ENGINES
    assert get_args(settings.Kernel) == KERNELS


def test_a_fault_of_ours_ends_in_its_traceback(tmp_path, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("jobs.verify.main", fail)
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(["verify", str(tmp_path)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["verify", "OUT"], "interrupted\n"),
        (["reproduce", "--dataset", "mvtec", "--root", "x", "--out", "OUT"], "features, runs and rows under"),
        (["score", "--images", "x", "--out", "OUT"], "committed under"),
    ],
)
def test_an_interruption_says_what_is_kept(tmp_path, monkeypatch, capsys, words, said):
    def stop(*_):
        raise KeyboardInterrupt

    module, name = ("jobs.verify", "main") if words[0] == "verify" else (f"jobs.{words[0]}", "run")
    module = "jobs.reproduce.command" if words[0] == "reproduce" else module
    monkeypatch.setattr(f"{module}.{name}", stop)
    assert main([word.replace("OUT", str(tmp_path)) for word in words]) == 130
    shown = capsys.readouterr()
    assert said in shown.err + shown.out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": "a\0b"}, "holds a zero byte"),
        ({"memory_per_worker": 0.1}, "expected at least 0.25 GB"),
        ({"memory_per_worker": float("nan")}, "expected at least 0.25 GB"),
    ],
)
def test_settings_that_no_run_could_have(change, message):
    with pytest.raises(ConfigError, match=message):
        MatchConfig(**{"embeddings": "a", "out": "b", **change})
