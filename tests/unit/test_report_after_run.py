"""What `--report` does once a run has ended; tests/integration/test_report_after_run.py has the runs."""

import json

import pytest
from generated_run import Made, make_run

from jobs import submit
from jobs.cli import _build, _parser, _spelled_out, main
from jobs.config import BatchedConfig, ScoreConfig
from jobs.messages import Messages
from jobs.report.after_run import show

IMAGES = [Made("01", "a.png", 0.1), Made("01", "b.png", 0.5, "spot"), Made("01", "c.png", 0.2, None)]


def test_metrics_and_page_of_a_run_with_failures(tmp_path, capsys):
    out = make_run(tmp_path, IMAGES, failed=(("01", "broken <b>.png"),))
    show(str(out), Messages("text", "info"))
    printed = capsys.readouterr().out
    assert printed.index("image metrics") < printed.index("report.html")
    assert "broken &lt;b&gt;.png" in (out / "report.html").read_text()
    assert json.loads((out / "metrics.json").read_text())["categories"]["01"]["labelled"] == 2


def test_a_page_alone_where_nothing_is_labelled(tmp_path, capsys):
    out = make_run(tmp_path, [Made("01", "a.png", 0.1, None), Made("01", "b.png", 0.5, None)], threshold=None)
    show(str(out), Messages("text", "info"))
    assert "metrics" not in capsys.readouterr().out
    assert not (out / "metrics.json").exists()
    assert (out / "report.html").is_file()


def test_a_run_in_which_every_image_failed(tmp_path, capsys):
    """The words of the report command, not a page without images."""
    out = make_run(tmp_path, [], failed=(("01", "broken.png"),))
    assert main(["report", str(out)]) == 1
    said = capsys.readouterr().err.partition(": ")[2].strip()
    with pytest.raises(ValueError, match="no scores under") as caught:
        show(str(out), Messages("text", "info"))
    assert str(caught.value) == said


@pytest.mark.parametrize(("command", "kind"), [("score", ScoreConfig), ("batched", BatchedConfig)])
def test_the_flag_reaches_settings_and_jobs_of_a_cluster(command, kind):
    words = [command, "--images", "a", "--out", "b", "--report"]
    settings = _build(kind, _parser().parse_args(_spelled_out(words))[command])
    assert settings.report is True
    assert "--report=true" in submit.job_command(command, settings).words
    assert kind(images="a", out="b").report is False


def test_only_commands_that_end_in_scores_have_it():
    for command in ("fit", "extract"):
        with pytest.raises(SystemExit):
            main([command, "--images", "a", "--out", "b", "--report"])
