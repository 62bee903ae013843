import zipfile

import pytest

from anomalydino_plugin import ConfigError
from jobs import cli, cluster, submit
from jobs.config import ScoreConfig

SCORE = ["score", "--images", "parts", "--out", "out"]


def test_relative_paths_are_resolved_here_and_uris_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = cli._submitted(
        ["score", "--images", "parts", "--out", "s3://b/o", "--weights", "random:0", "--banks=~/b"]
    )
    assert f"--images={tmp_path / 'parts'}" in command.words
    assert {"--out=s3://b/o", "--weights=random:0"} <= set(command.words)
    assert not any("~" in word for word in command.words)
    assert cli._submitted(["evaluate", "run"]).words == ("evaluate", str(tmp_path / "run"))


def test_the_job_reads_what_was_read_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text("category: ['01', 'b c=d', 'é']\nmasking: off\nwrite_embeddings: true\n")
    words = cli._submitted([*SCORE, "--config", "job.yaml", "--false-alarm", "0.1", "--shots=-1", "--k", "3"]).words
    again = cli._build(ScoreConfig, cli._parser().parse_args(list(words)).score)
    assert again == ScoreConfig(
        images=str(tmp_path / "parts"),
        out=str(tmp_path / "out"),
        category=["01", "b c=d", "é"],
        masking="off",
        write_embeddings=True,
        false_alarm=0.1,
        shots=-1,
        k=3,
    )


def test_the_id_depends_on_the_command_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = cli._submitted([*SCORE, "--k", "2", "--shots", "1"]).submission_id
    assert first == cli._submitted(["score", "--shots=1", "--k=2", "--out=out", "--images=parts"]).submission_id
    assert first != cli._submitted([*SCORE, "--k", "3", "--shots", "1"]).submission_id
    assert first.startswith("anomalydino-score-")
    assert len(first) == len("anomalydino-score-") + 10


def test_a_pipeline_travels_with_the_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "stages.yaml"
    file.write_text("stages: [batched: {images: parts, out: out}]")
    first = cli._submitted(["run", "stages.yaml"])
    assert first.words == ("run", "pipeline.yaml")
    assert str(tmp_path / "parts") in first.files["pipeline.yaml"]
    file.write_text("stages: [batched: {images: parts, out: other}]")
    assert cli._submitted(["run", "stages.yaml"]).submission_id != first.submission_id


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no command: expected -- and one of extract, fit, score"),
        (["demo"], "'demo' cannot be submitted: expected one of extract"),
        (["submit", "--", "score"], "'submit' cannot be submitted"),
        (["rm", "-rf"], "'rm' cannot be submitted"),
        ([*SCORE, "--ray-address", "10.0.0.1:6379"], "runs on the cluster it is submitted to. Leave it out"),
        ([*SCORE, "--shots", "0"], "expected at least 1"),
    ],
)
def test_what_is_refused_before_a_cluster_is_asked(words, message, capsys):
    assert cli.main(["submit", "--", *words]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_unknown_flags_of_the_command_are_refused():
    with pytest.raises(SystemExit) as caught:
        cli.main(["submit", "--", "score", "--imagse", "x"])
    assert caught.value.code == 2


def test_no_cluster(capsys, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:2")
    assert cli.main(["submit", "--address", "127.0.0.1:9", "--", *SCORE]) == 1
    error = capsys.readouterr().err
    assert "no Ray dashboard answers at http://127.0.0.1:9: expected http://HOST:8265" in error
    assert error.count("\n") == 1


def test_without_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(submit, "find_spec", lambda name: None)
    assert cli.main(["submit", "--", *SCORE]) == 1
    assert "pip install 'ray[default]'" in capsys.readouterr().err


def test_wheels_that_are_none(tmp_path):
    (tmp_path / "text.whl").write_text("no wheel")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("jobs/__init__.py", "")
    for name, message in (("none.whl", "No such file"), ("text.whl", "not a zip"), ("other.whl", "not a wheel of")):
        with pytest.raises(ConfigError, match=message):
            submit._checked_wheel(str(tmp_path / name))


class Job:
    def __init__(self, submission_id, status="SUCCEEDED", code=0, message=None):
        from ray.job_submission import JobStatus

        self.submission_id, self.status = submission_id, JobStatus(status)
        self.driver_exit_code, self.message = code, message


def test_attempts_are_found_and_counted():
    names = ["a-score-1", "a-score-1-10", "a-score-1-2", "a-score-12", "b-a-score-1", "a-score-1-x", None]
    client = type("Client", (), {"list_jobs": lambda self: [Job(name) for name in names]})()
    assert [job.submission_id for job in submit._attempts(client, "a-score-1")] == [*names[:1], "a-score-1-2", names[1]]


def test_the_exit_status_is_the_jobs(capsys):
    from rich.console import Console

    console = Console(quiet=True)
    assert submit._status(Job("j"), "j", console) == 0
    assert submit._status(Job("j", "FAILED", 2), "j", console) == 2
    assert submit._status(Job("j", "FAILED", 127), "j", console) == 127
    assert submit._status(Job("j", "STOPPED", None, "stopped by a user"), "j", console) == 1
    assert submit._status(Job("j", "FAILED", -9), "j", console) == 1
    error = capsys.readouterr().err
    assert "lack our command on their PATH" in error
    assert "job j stopped. stopped by a user Submit it again to go on." in error


def test_inside_a_job_its_cluster_is_used(monkeypatch):
    assert cluster._surrounding_job() is None
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"working_dir": "gcs://x.zip"}, "metadata": {}}')
    assert cluster._surrounding_job() == {"working_dir": "gcs://x.zip"}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {}}')
    assert cluster._surrounding_job() == {}
