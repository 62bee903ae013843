"""extract, fit, score from embeddings, match and batched through a real local Ray, with a tiny untrained backbone."""

import hashlib
import io
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from generated import TINY, save, textured
from rich.console import Console

from anomalydino_plugin import BankError, BatchedModel, ConfigError, InputError, lowest_count
from jobs.config import BatchedConfig, ExtractConfig, FitConfig, MatchConfig, ScoreConfig
from jobs.report import command
from jobs.run_geometry import RunGeometry
from jobs.run_records import read_run

ENCODING = {"backbone": TINY, "weights": "random:0", "resolution": 64}
RAY = {"threads": 1}
pytestmark = pytest.mark.usefixtures("ray_session")


def call(config, shown: io.StringIO | None = None):
    from jobs import batched, extract, fit, match, score

    stage = {
        BatchedConfig: batched,
        ExtractConfig: extract,
        FitConfig: fit,
        MatchConfig: match,
        ScoreConfig: score,
    }[type(config)]
    return stage.run(config, Console(file=shown or io.StringIO(), width=200))


def rows(out: Path, kind: str) -> list[dict]:
    found = ds.dataset([str(path) for path in sorted((out / kind).rglob("*.parquet"))]).to_table().to_pylist()
    return sorted(found, key=lambda row: (row["image_id"], row.get("patch_row", 0), row.get("patch_col", 0)))


def scores(out: Path) -> dict[str, float]:
    return {row["image_id"]: row["score"] for row in rows(out, "scores")}


def digest(out: Path, *kinds: str) -> dict[str, str]:
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for kind in kinds
        for path in (out / kind).rglob("*.parquet")
    }


@pytest.fixture(scope="module")
def mixed_tree(mvtec_tree, tmp_path_factory) -> Path:
    """The generated tree, with an image of another aspect ratio and one that cannot be read."""
    root = tmp_path_factory.mktemp("mixed") / "tree"
    shutil.copytree(mvtec_tree, root)
    save(root / "01" / "test" / "good" / "wide.png", textured(7, (96, 160)))
    (root / "01" / "test" / "good" / "broken.png").write_text("no image")
    return root


@pytest.fixture(scope="module")
def extracted(mixed_tree, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("extracted") / "out"
    summary = call(ExtractConfig(images=str(mixed_tree), out=str(out), masking="on", **ENCODING, **RAY))
    assert (summary.done, summary.failed) == (13, 1)
    return out


@pytest.fixture(scope="module")
def banks(mixed_tree, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("banks") / "out"
    summary = call(FitConfig(images=str(mixed_tree), out=str(out), masking="off", shots=2, **ENCODING, **RAY))
    assert sorted(bank["category"] for bank in summary.job["banks"]) == ["01", "plate top"]
    return out


@pytest.fixture(scope="module")
def matched(extracted, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("matched") / "out"
    call(MatchConfig(embeddings=str(extracted), out=str(out), masking="off", **RAY))
    return out


def test_few_images_give_few_files(extracted, matched):
    for out, kinds in ((extracted, ("images", "embeddings")), (matched, ("images", "scores", "patch_scores"))):
        for kind in kinds:
            assert len(list((out / kind).rglob("*.parquet"))) == 2  # one for each category
    assert not list((extracted / ".state").rglob("*.parquet"))


def test_failures_and_other_shapes_are_recorded(extracted):
    (failure,) = rows(extracted, "failures")
    assert (Path(failure["uri"]).name, failure["stage"]) == ("broken.png", "decode")
    images = {Path(row["uri"]).name: row for row in rows(extracted, "images")}
    assert (images["wide.png"]["grid_rows"], images["wide.png"]["grid_cols"]) == (4, 6)
    assert images["broken.png"]["status"] == "failed"
    assert images["wide.png"]["masking_test"] is not None


@pytest.mark.thorough
def test_scores_of_embeddings_equal_those_of_images(mixed_tree, extracted, banks, tmp_path):
    call(
        ScoreConfig(images=str(mixed_tree), banks=str(banks), out=str(tmp_path / "a"), masking="off", **ENCODING, **RAY)
    )
    call(ScoreConfig(embeddings=str(extracted), banks=str(banks), out=str(tmp_path / "b"), masking="off", **ENCODING))
    whole = ScoreConfig(images=str(mixed_tree), out=str(tmp_path / "c"), shots=2, masking="off", **ENCODING, **RAY)
    call(whole)
    assert scores(tmp_path / "a") == scores(tmp_path / "c")
    assert scores(tmp_path / "b") == pytest.approx(scores(tmp_path / "a"), abs=1e-6)
    for left, right in zip(rows(tmp_path / "a", "scores"), rows(tmp_path / "b", "scores"), strict=True):
        assert left["threshold"] == right["threshold"] is not None
    for left, right in zip(rows(tmp_path / "a", "patch_scores"), rows(tmp_path / "b", "patch_scores"), strict=True):
        assert left["match_image_id"] == right["match_image_id"]


def test_scoring_embeddings_loads_no_backbone(extracted, banks, tmp_path, monkeypatch):
    from jobs.bank_builder import read_bank
    from jobs.embedding_scorer import EmbeddingScorer
    from jobs.embeddings import StoredRun
    from jobs.shards import cut_shards
    from jobs.store import Store

    monkeypatch.setattr("anomalydino_plugin.backbone._create", None)  # calling it would fail
    stored = StoredRun.read(str(extracted))
    sources = {c: (found, {i.record.image_id: i for i in stored.of(c)}) for c, found in stored.sets.items()}
    store = Store(tmp_path / "out", "score")
    config = ScoreConfig(embeddings=str(extracted), banks=str(banks), out=str(tmp_path / "out"), masking="off")
    scorer = EmbeddingScorer(config, sources, partial(read_bank, Store(banks, "fit")), store, "cpu")
    assert sum(scorer.run(shard)["done"] for shard in cut_shards([i.record for i in stored.images], 5)) == 13


@pytest.mark.parametrize(("mode", "masking"), [("official", "off"), ("musc", "on")])
def test_matching_equals_the_python_api(mixed_tree, extracted, tiny_backbone, tmp_path, mode, masking):
    call(MatchConfig(embeddings=str(extracted), out=str(tmp_path), mode=mode, share=0.2, masking=masking, **RAY))
    found = {row["uri"]: row for row in rows(tmp_path, "scores")}
    for category in ("01", "plate top"):
        paths = sorted(p for p in (mixed_tree / category / "test").rglob("*.png") if p.name != "broken.png")
        model = BatchedModel(tiny_backbone, resolution=64, mode=mode, share=0.2, masking=masking)
        for path, detection in zip(paths, model.score_set(paths), strict=True):
            assert found[str(path)]["score"] == pytest.approx(detection.score, abs=1e-5)
            assert found[str(path)]["mode"] == mode
            assert found[str(path)]["threshold"] is None


def test_matches_name_the_patch_that_is_nearest(matched, extracted):
    stored = {(r["image_id"], r["patch_row"], r["patch_col"]): r["embedding"] for r in rows(extracted, "embeddings")}
    for row in rows(matched, "patch_scores")[::7]:
        query = np.array(stored[row["image_id"], row["patch_row"], row["patch_col"]])
        match = np.array(stored[row["match_image_id"], row["match_row"], row["match_col"]])
        assert row["match_image_id"] != row["image_id"]
        cosine = query @ match / np.linalg.norm(query) / np.linalg.norm(match)
        assert 1 - cosine == pytest.approx(row["distance"], abs=1e-5)  # these sets are so small that one is kept
        assert row["match_rotation"] == 0


@pytest.mark.parametrize("change", [{"shard_size": 1}, {"shard_size": 3, "num_workers": 2}])
def test_matching_does_not_depend_on_shards(matched, extracted, tmp_path, change):
    call(MatchConfig(embeddings=str(extracted), out=str(tmp_path), masking="off", **change, **RAY))
    assert scores(tmp_path) == pytest.approx(scores(matched), abs=1e-6)


@pytest.mark.slow
def test_the_number_of_workers_changes_no_byte(mixed_tree, tmp_path):
    kinds = ("images", "embeddings", "scores", "patch_scores", "failures")
    found = []
    for count in (1, 2, 3):
        out = tmp_path / str(count)
        settings = {"images": str(mixed_tree), "out": str(out), "shard_size": 3, "num_workers": count}
        call(BatchedConfig(**settings, masking="on", **ENCODING, **RAY))
        found.append(digest(out, *kinds))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 9  # embeddings of small shards are joined, too


def test_rounds_of_a_small_budget_change_nothing(matched, extracted, tmp_path, monkeypatch):
    from jobs import matcher

    monkeypatch.setattr(matcher, "round_rows", lambda config, count: 5)  # less than one image of 16 patches
    from jobs.embeddings import StoredRun
    from jobs.matcher import CategoryPlan, Matcher
    from jobs.shards import cut_shards
    from jobs.store import Store

    stored = StoredRun.read(str(extracted))
    plans = {c: CategoryPlan(found, stored.of(c), None, False) for c, found in stored.sets.items()}
    config = MatchConfig(embeddings=str(extracted), out=str(tmp_path), masking="off")
    store = Store(tmp_path, "match")
    store.claim("a", ["scores"], {})
    worker = Matcher(config, plans, store, False, "cpu")
    for shard in cut_shards([image.record for image in stored.images], 4):
        worker.run(shard)
    assert scores(tmp_path) == pytest.approx(scores(matched), abs=1e-6)


def test_sampled_references_are_the_same_whatever_the_shards(extracted, tmp_path):
    from jobs.match import choose_references

    found = []
    for number, size in enumerate((2, 5)):
        out = tmp_path / str(number)
        call(MatchConfig(embeddings=str(extracted), out=str(out), masking="off", max_references=3, shard_size=size))
        found.append(out)
        ids = [row["image_id"] for row in rows(out, "scores") if row["category"] == "01"]
        chosen = choose_references(ids, None, 3, 0)
        assert len(chosen) == 3
        matches = {row["match_image_id"] for row in rows(out, "patch_scores") if row["category"] == "01"}
        assert matches <= chosen
    assert scores(found[0]) == pytest.approx(scores(found[1]), abs=1e-6)
    assert choose_references(ids, 0.5, None, 0) != choose_references(ids, 0.5, None, 1)
    assert choose_references(ids, 1.0, None, 0) is None


def test_what_it_costs_is_said_before_and_compared_after(extracted, tmp_path):
    shown = io.StringIO()
    call(MatchConfig(embeddings=str(extracted), out=str(tmp_path), masking="off", **RAY), shown)
    assert "TFLOP" in shown.getvalue()
    assert "times the estimate" in shown.getvalue()
    cost = json.loads((tmp_path / "job.json").read_text())["stages"]["match"]["cost"]
    pairs = (6 * 16 + 24) ** 2 + (6 * 16) ** 2  # seven and six images
    assert cost["estimate"]["flop"] == 2 * 64 * pairs
    assert cost["estimate"]["patches"] == 2 * 6 * 16 + 24
    assert not list((tmp_path / ".state" / "match").glob("trial*"))
    assert cost["seconds"] > 0


@pytest.mark.slow
def test_both_halves_share_a_folder_and_stages_do_not_clash(mixed_tree, tmp_path):
    out = str(tmp_path / "out")
    call(BatchedConfig(images=str(mixed_tree), out=out, masking="auto", **ENCODING, **RAY))
    job = json.loads((tmp_path / "out" / "job.json").read_text())
    assert job["stages"].keys() == {"extract", "match"}
    assert len({row["image_id"] for row in rows(tmp_path / "out", "images")}) == 14
    with pytest.raises(ConfigError, match="holds images of `anomalydino extract`"):
        call(ScoreConfig(images=str(mixed_tree), out=out, masking="off", **ENCODING, **RAY))


@pytest.mark.slow
def test_float16_embeddings_move_scores_little(mixed_tree, matched, tmp_path):
    settings = {"images": str(mixed_tree), "out": str(tmp_path), "masking": "off", "embedding_dtype": "float16"}
    call(BatchedConfig(**settings, **ENCODING, **RAY))
    assert (
        pq.read_schema(next((tmp_path / "embeddings" / "01").iterdir())).field("embedding").type.value_type
        == "halffloat"
    )
    assert scores(tmp_path) == pytest.approx(scores(matched), abs=1e-3)


@pytest.mark.slow
def test_what_cannot_be_matched_or_scored_says_why(extracted, banks, mixed_tree, tmp_path):
    with pytest.raises(InputError, match="expected its --out folder"):
        call(MatchConfig(embeddings=str(banks), out=str(tmp_path / "a")))
    with pytest.raises(InputError, match="no category 'nut'"):
        call(MatchConfig(embeddings=str(extracted), out=str(tmp_path / "b"), category="nut"))
    other = {**ENCODING, "weights": "random:1"}
    call(FitConfig(images=str(mixed_tree), out=str(tmp_path / "other"), masking="off", **other, **RAY))
    with pytest.raises(BankError, match="weights: bank 'random:1', model 'random:0'"):
        call(ScoreConfig(embeddings=str(extracted), banks=str(tmp_path / "other"), out=str(tmp_path / "c")))
    other = {**ENCODING, "resolution": 96}
    with pytest.raises(BankError, match="resolution: bank '64', model '96'"):
        call(ScoreConfig(images=str(mixed_tree), banks=str(banks), out=str(tmp_path / "g"), **other))
    call(FitConfig(images=str(mixed_tree), out=str(tmp_path / "part"), category="01", masking="off", **ENCODING, **RAY))
    with pytest.raises(BankError, match="no bank of category 'plate top'"):
        call(ScoreConfig(embeddings=str(extracted), banks=str(tmp_path / "part"), out=str(tmp_path / "d")))
    single = tmp_path / "single"
    save(single / "a.png", textured(1))
    with pytest.raises(InputError, match="has one image"):
        call(BatchedConfig(images=str(single), out=str(tmp_path / "e"), **ENCODING, **RAY))
    call(ExtractConfig(images=str(mixed_tree), out=str(tmp_path / "f"), masking="off", **ENCODING, **RAY))
    with pytest.raises(InputError, match="extracted with masking off"):
        call(MatchConfig(embeddings=str(tmp_path / "f"), out=str(tmp_path / "f")))
    (tmp_path / "f" / "job.json").unlink()
    with pytest.raises(InputError, match="is not finished"):
        call(MatchConfig(embeddings=str(tmp_path / "f"), out=str(tmp_path / "f")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": "a", "embeddings": "b"}, "either --images or --embeddings"),
        ({}, "either --images or --embeddings"),
        ({"embeddings": "b"}, "needs --banks"),
        ({"embeddings": "b", "banks": "c", "write_embeddings": True}, "stored already"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ConfigError, match=message):
        ScoreConfig(out="out", **settings)


def test_counts_follow_the_paper():
    assert lowest_count("official", 5, 80) == 1


@pytest.mark.slow
def test_reports_of_every_kind_of_run_find_what_was_matched(mixed_tree, extracted, banks, matched, tmp_path):
    """Banks in another folder, embeddings in another folder, and other test images."""
    common = {"banks": str(banks), "masking": "off", **ENCODING}
    call(ScoreConfig(images=str(mixed_tree), out=str(tmp_path / "a"), **common, **RAY))
    call(ScoreConfig(embeddings=str(extracted), out=str(tmp_path / "b"), **common))
    for out, folders in ((tmp_path / "a", {"train"}), (tmp_path / "b", {"train"}), (matched, {"test"})):
        run = read_run(str(out))
        assert RunGeometry.of(run.store) == (64, 16), out
        scored = [row for own in run.scores.values() for row in own]
        drawn = [picture for _, picture in command._pictures(run, scored, 64)]
        assert len(drawn) == 13
        for picture in drawn:
            assert picture["notes"] == []
            assert {"patch", "name"} <= picture["top"]["match"].keys()
            matched_row = run.references[picture["top"]["match"]["id"]]
            assert {Path(matched_row["uri"]).parts[-3]} == folders
