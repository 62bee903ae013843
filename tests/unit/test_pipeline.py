from pathlib import Path

import pytest
import yaml

from anomalydino_plugin import ConfigError
from jobs import pipeline
from jobs.config import BatchedConfig, ExtractConfig, FitConfig, MatchConfig, ScoreConfig

GOOD = """
defaults: {out: run, resolution: 64, shots: 2, threads: 1}
stages:
  - extract: {images: parts, masking: off}
  - match: {embeddings: run, masking: off}
  - score: {images: s3://bucket/parts, out: scores, category: ["01", b], weights: random:0}
  - evaluate
"""


def written(folder, text):
    file = folder / "stages.yaml"
    file.write_text(text)
    return str(file)


def test_defaults_reach_the_stages_that_have_them(tmp_path):
    extract, match, score, evaluate = pipeline.load(written(tmp_path, GOOD))
    assert [stage.name for stage in (extract, match, score, evaluate)] == ["extract", "match", "score", "evaluate"]
    assert isinstance(extract.settings, ExtractConfig)
    assert (extract.settings.resolution, extract.settings.masking) == (64, "off")
    assert isinstance(match.settings, MatchConfig)
    assert (score.settings.shots, score.settings.category) == (2, ["01", "b"])
    assert evaluate.settings.out == str(tmp_path / "run")


def test_relative_paths_start_at_the_file_and_uris_stay(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    extract, match, score, _ = pipeline.load(written(tmp_path, GOOD))
    assert extract.settings.images == str(tmp_path / "parts")
    assert match.settings.embeddings == extract.settings.out == str(tmp_path / "run")
    assert (score.settings.images, score.settings.weights) == ("s3://bucket/parts", "random:0")


def test_stages_are_written_as_they_are_read(tmp_path):
    stages = pipeline.load(written(tmp_path, GOOD))
    text = yaml.safe_dump({"stages": [stage.written() for stage in stages]})
    assert pipeline.load(written(tmp_path, text)) == stages


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: [extarct: {images: a, out: b}]", r"stage 1: unknown command 'extarct'\. Did you mean 'extract'"),
        ("stages: [demo: {}]", r"stage 1: unknown command 'demo'\. Expected one of batched, evaluate,"),
        (
            "stages: [evaluate: {out: a}, score: {imagse: a}]",
            r"stage 2 \(score\): unknown setting 'imagse'\. Did you mean 'images'",
        ),
        ("stages: [score: {write-embeddings: true}]", "unknown setting 'write-embeddings'. Did you mean 'write_emb"),
        (
            "stages: [score: {images: a, out: b, shots: many}]",
            r"stage 1 \(score\): setting 'shots' is 'many': expec.*int",
        ),
        ("stages: [score: {images: a, out: b, k: 1.5}]", "setting 'k' is 1.5: expected int"),
        ("stages: [score: {images: a, out: b, category: 1}]", "setting 'category' is 1: .*Put text .* in quotes"),
        ("stages: [score: {images: a, out: b, masking: maybe}]", "'masking' is 'maybe': expected .*auto"),
        ("stages: [score: {images: a, out: b, shots: 0}]", r"stage 1 \(score\): --shots=0: expected at least 1"),
        ("stages: [score: {images: a}]", r"stage 1 \(score\): setting 'out' is missing"),
        ("stages: [score: {out: a}]", r"stage 1 \(score\): score: expected either --images or --embeddings"),
        ("stages: [score: {images: '', out: b}]", "--images is empty"),
        ("stages: [score: 3]", r"stage 1 \(score\): its settings are 3"),
        ("stages: [[score]]", "stage 1 is .*expected one command"),
        ("stages: []", r"'stages' is \[\]: expected a list"),
        ("stages: {score: {images: a}}", "'stages' is .*expected a list"),
        ("stage: [evaluate: {out: a}]", "unknown setting 'stage'. Did you mean 'stages'"),
        (
            "defaults: {shotz: 1}\nstages: [evaluate: {out: a}]",
            "defaults: unknown setting 'shotz'. Did you mean 'shots'",
        ),
        ("defaults: {shots: x}\nstages: [evaluate: {out: a}]", "defaults: setting 'shots' is 'x'"),
        ("defaults: 3\nstages: [evaluate: {out: a}]", "'defaults' is 3"),
        ("- a", "holds list: expected the keys 'stages'"),
        ("stages: [", "is no YAML"),
        ("stages: !!python/object/apply:os.getcwd []", "is no YAML"),
    ],
)
def test_mistakes_are_named_before_anything_runs(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        pipeline.load(written(tmp_path, text))
    assert "stages.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_file_of_the_docs(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "running_on_ray.md").read_text()
    stages = pipeline.load(written(tmp_path, text.partition("```yaml\n")[2].partition("```")[0]))
    assert [stage.name for stage in stages] == ["extract", "match", "verify", "evaluate"]


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot read .*No such file"):
        pipeline.load(str(tmp_path / "none.yaml"))


def test_stages_share_one_cluster(tmp_path):
    text = "stages: [batched: {images: a, out: b, ray_address: auto}, batched: {images: a, out: c}]"
    with pytest.raises(ConfigError, match=r"differ in 'ray_address' \(None, auto\): give it once"):
        pipeline.main(type("Options", (), {"file": written(tmp_path, text)}), None)


def test_every_location_is_known():
    """A setting that is text must be listed as a location, or here."""
    from typing import get_type_hints

    from jobs.locations import LOCATIONS

    others = {"category", "backbone", "statistic", "ray_address"}
    for kind in (ExtractConfig, FitConfig, ScoreConfig, MatchConfig, BatchedConfig):
        text = {name for name, hint in get_type_hints(kind).items() if "str" in str(hint)}
        assert text <= LOCATIONS | others


def test_ctrl_c_names_the_stage(tmp_path, monkeypatch, capsys):
    import contextlib

    from jobs import cluster, fit
    from jobs.messages import Messages

    def interrupted(config, console):
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "run", interrupted)
    monkeypatch.setattr(cluster, "connect", lambda address: contextlib.nullcontext())
    file = written(tmp_path, "stages: [fit: {images: a, out: b}]")
    assert pipeline.main(type("Options", (), {"file": file}), Messages()) == 130
    assert "interrupted in stage 1 (fit); committed under" in capsys.readouterr().err
