"""`anomalydino score` through a real local Ray, with a tiny untrained backbone."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.dataset as ds
import pytest
from generated import TINY, save, textured
from PIL import Image

from anomalydino_plugin import FewShotModel, ImageError, InputError, load_backbone

SETTINGS = {"backbone": TINY, "weights": "random:0", "resolution": 64, "masking": "off", "threads": 1}


@pytest.fixture(scope="module")
def score(ray_session):
    from rich.console import Console

    from jobs.config import ScoreConfig
    from jobs.score import run

    def run_score(images, out, **settings):
        console = Console(quiet=True)
        return run(ScoreConfig(images=str(images), out=str(out), **{**SETTINGS, **settings}), console)

    return run_score


@pytest.fixture(scope="module")
def finished(score, mvtec_tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    summary = score(mvtec_tree, out, shots=2, shard_size=4, write_embeddings=True)
    return out, summary


def rows(out: Path, kind: str) -> list[dict]:
    found = ds.dataset([str(path) for path in sorted((out / kind).rglob("*.parquet"))]).to_table().to_pylist()
    return sorted(found, key=lambda row: (row["image_id"], row.get("patch_row", 0), row.get("patch_col", 0)))


def test_every_image_has_one_row(finished):
    out, summary = finished
    assert (summary.done, summary.failed) == (12, 0)
    scores = rows(out, "scores")
    assert len({row["image_id"] for row in scores}) == len(scores) == 12
    images = rows(out, "images")
    assert sorted(row["status"] for row in images) == ["reference"] * 4 + ["scored"] * 12
    assert all(row["uri"].split("/")[-3] == "test" for row in scores)


def test_scores_equal_the_python_api(finished, mvtec_tree, tiny_backbone):
    out, _ = finished
    for category in ("01", "plate top"):
        references = sorted((mvtec_tree / category / "train" / "good").iterdir())[:2]
        model = FewShotModel(tiny_backbone, resolution=64, masking="off").fit(references)
        for row in rows(out, "scores"):
            if row["category"] == category:
                assert row["score"] == pytest.approx(model.score(row["uri"]).score, abs=1e-5)


def test_matches_can_be_joined_to_reference_files(finished):
    out, _ = finished
    joined = duckdb.sql(
        f"select count(*), count(i.uri), bool_and(i.status = 'reference') from '{out}/patch_scores/**/*.parquet' p "
        f"join '{out}/images/**/*.parquet' i on p.match_image_id = i.image_id"
    ).fetchall()
    assert joined == [(12 * 16, 12 * 16, True)]


def test_embeddings_and_distances_agree(finished):
    out, _ = finished
    embeddings, patches = rows(out, "embeddings"), rows(out, "patch_scores")
    assert len(embeddings) == len(patches) == 12 * 16
    assert len(embeddings[0]["embedding"]) == 64
    by_place = {(row["image_id"], row["patch_row"], row["patch_col"]): row for row in patches}
    assert all((row["image_id"], row["patch_row"], row["patch_col"]) in by_place for row in embeddings)


def test_the_query_of_the_readme_works_without_ray(finished):
    out, _ = finished
    program = (
        "import sys; sys.modules['ray'] = None\nimport duckdb\n"
        f"print(duckdb.sql(\"select category, count(*), avg(score) from '{out}/scores/**/*.parquet' group by 1\").fetchall())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "'01', 6" in done.stdout
    assert "'plate top', 6" in done.stdout


def test_job_json(finished):
    job = json.loads((finished[0] / "job.json").read_text())["stages"]["score"]
    assert job["counts"] == {"images": 12, "done": 12, "failed": 0}
    assert job["config"]["shots"] == 2
    assert job["weights_sha256"] == "random:0"
    assert {bank["category"] for bank in job["banks"]} == {"01", "plate top"}
    assert job["banks"][0]["threshold_source"] == "leave-one-out"
    assert job["versions"]["ray"]


def test_repeating_the_command_does_nothing_and_other_settings_are_refused(score, finished, mvtec_tree):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    assert score(mvtec_tree, out, shots=2, shard_size=4, write_embeddings=True).done == 12
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")} == before
    with pytest.raises(ValueError, match="other settings"):
        score(mvtec_tree, out, shots=1)


def test_an_interrupted_run_is_completed_to_the_same_bytes(score, finished, mvtec_tree, tmp_path, monkeypatch):
    from jobs.stage import StageRun

    settings = {"shots": 2, "shard_size": 4, "write_embeddings": True}
    out = tmp_path / "out"

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    finish = StageRun.finish
    for method, replacement in (
        ("todo", killed),  # after the banks
        ("finish", lambda run, *args, **more: killed() if run.store.stage == "score" else finish(run, *args, **more)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(StageRun, method, replacement)
            with pytest.raises(KeyboardInterrupt):
                score(mvtec_tree, out, **settings)
    state = out / ".state" / "score"
    (state / "done" / "01" / "000001.json").unlink()  # killed between the files and the record
    (state / "parts" / "scores" / "01" / "000000.parquet").unlink()
    (state / "done" / "01" / "000000.json").unlink()  # killed before the files
    assert score(mvtec_tree, out, **settings).done == 12
    assert digest(out) == digest(finished[0])


@pytest.mark.thorough
@pytest.mark.parametrize("workers", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_the_number_of_workers_changes_no_byte(score, finished, mvtec_tree, tmp_path, workers):
    score(mvtec_tree, tmp_path / "out", shots=2, shard_size=4, write_embeddings=True, num_workers=workers)
    assert digest(tmp_path / "out") == digest(finished[0])


@pytest.mark.slow
def test_other_shard_and_batch_sizes(score, finished, mvtec_tree, tmp_path):
    score(mvtec_tree, tmp_path / "out", shots=2, shard_size=5, batch_size=1)
    ours, others = rows(tmp_path / "out", "scores"), rows(finished[0], "scores")
    for left, right in zip(ours, others, strict=True):
        assert left["image_id"] == right["image_id"]
        assert left["score"] == pytest.approx(right["score"], abs=1e-6)


def digest(out: Path) -> dict[str, str]:
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.rglob("*.parquet")
    }


def test_bad_images_become_failures_and_the_rest_is_scored(score, mvtec_tree, tmp_path):
    root = tmp_path / "part"
    shutil.copytree(mvtec_tree / "01" / "train", root / "train")
    test = root / "test" / "mixed"
    grey = textured(1)[..., 0]
    save(test / "grey.png", grey)
    save(test / "rgba.png", np.dstack([textured(2), grey]))
    save(test / "deep.png", grey.astype(np.uint16) * 257)
    Image.fromarray(textured(3)).convert("CMYK").save(test / "cmyk.jpg")
    Image.fromarray(textured(4)).quantize(16).save(test / "palette.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(textured(5, (96, 140))).save(test / "turned.jpg", exif=exif)
    (test / "text.png").write_text("this is no image")
    (test / "empty.png").touch()
    Image.fromarray(textured(6)).save(test / "cut.jpg")
    (test / "cut.jpg").write_bytes((test / "cut.jpg").read_bytes()[:-500])
    save(test / "three.png", np.zeros((1, 3, 3), np.uint8))
    (test / "folder.png").mkdir()
    summary = score(root, tmp_path / "out", max_failures=0.6)
    assert (summary.done, summary.failed) == (6, 5)
    failures = {Path(row["uri"]).name: row for row in rows(tmp_path / "out", "failures")}
    assert failures.keys() == {"text.png", "empty.png", "cut.jpg", "three.png", "folder.png"}
    assert all(
        row["stage"] == "decode" and name in row["message"] for name, row in failures.items() if name != "three.png"
    )
    assert "smaller than one patch" in failures["three.png"]["message"]
    images = {Path(row["uri"]).name: row for row in rows(tmp_path / "out", "images")}
    assert images["text.png"]["status"] == "failed"
    assert (images["turned.jpg"]["width"], images["turned.jpg"]["height"]) == (96, 140)  # EXIF applied


@pytest.mark.thorough
def test_a_reference_that_is_also_scored_is_pointed_out(ray_session, mvtec_tree, tmp_path):
    import io

    from rich.console import Console

    from jobs.config import ScoreConfig
    from jobs.score import run

    folder = str(mvtec_tree / "01" / "train" / "good")
    shown = io.StringIO()
    run(
        ScoreConfig(images=folder, references=folder, shots=1, out=str(tmp_path / "out"), **SETTINGS),
        Console(file=shown),
    )
    assert "1 reference image(s) are also scored" in shown.getvalue()
    scores = {Path(row["uri"]).name: row["score"] for row in rows(tmp_path / "out", "scores")}
    assert scores["000.png"] == pytest.approx(0, abs=1e-6)
    assert scores["001.png"] > 0


@pytest.mark.thorough
def test_too_many_failures_stop_the_run(score, mvtec_tree, tmp_path):
    root = tmp_path / "part"
    shutil.copytree(mvtec_tree / "01" / "train", root / "train")
    for number in range(4):
        (root / "test" / "bad").mkdir(parents=True, exist_ok=True)
        (root / "test" / "bad" / f"{number}.png").write_text("no image")
    with pytest.raises(InputError, match="4 of 4 images failed"):
        score(root, tmp_path / "out")
    assert len(rows(tmp_path / "out", "failures")) == 4


def test_an_unreadable_reference_stops_before_scoring(score, mvtec_tree, tmp_path):
    root = tmp_path / "part"
    shutil.copytree(mvtec_tree / "01", root)
    (root / "train" / "good" / "000.png").write_text("no image")
    with pytest.raises(ImageError, match=r"000\.png"):
        score(root, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.parquet"))


@pytest.mark.thorough
def test_held_out_images_set_the_threshold(score, mvtec_tree, tmp_path):
    summary = score(
        mvtec_tree,
        tmp_path / "out",
        category="01",
        calibration=str(mvtec_tree / "01" / "test" / "good"),
        rotations="informed",
    )
    assert summary.job["banks"][0]["threshold_source"] == "held-out"


@pytest.mark.thorough
def test_decode_and_encode_are_separate_operators(ray_session, mvtec_tree, tmp_path):
    from jobs import dataflow
    from jobs.cluster import Resources
    from jobs.config import ExtractConfig
    from jobs.extract import Extractor
    from jobs.inputs import discover
    from jobs.shards import cut_shards
    from jobs.store import Store

    settings = {name: SETTINGS[name] for name in ("backbone", "weights", "resolution")}
    config = ExtractConfig(images=str(mvtec_tree), out=str(tmp_path / "out"), **settings)
    store = Store(config.out, "extract")
    pipeline = dataflow.Pipeline(Extractor, (config, "random:0"), 64, 16, store, Resources(1, 1.0, 0.0, 1))
    dataset = dataflow.plan(pipeline, cut_shards(discover(str(mvtec_tree)).images, 4))
    names = operator_names(dataset)
    assert any("_decode_stage" in name and "_EncodeStage" not in name for name in names), names
    assert any("_EncodeStage" in name and "_write_stage" not in name for name in names), names


def operator_names(dataset) -> list[str]:
    """Names of the physical operators that Ray Data would run."""
    from ray.data._internal.logical.optimizers import get_execution_plan

    plan = get_execution_plan(dataset._logical_plan)
    plan = plan[0] if isinstance(plan, tuple) else plan
    names, todo = [], [plan.dag]
    while todo:
        operator = todo.pop()
        names.append(operator.name)
        todo += operator.input_dependencies
    return names


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_command_line_beside_a_stranger_called_jobs(mvtec_tree, tmp_path):
    """Run in a folder that holds another `jobs` package, killed by nothing, with two CPUs and three workers."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__init__.py").write_text("raise RuntimeError('a stranger')")
    script = Path(sys.executable).with_name("anomalydino")
    flags = {**SETTINGS, "images": mvtec_tree / "01", "out": tmp_path / "out", "num-workers": 3}
    command = [str(script), "score", *(f"--{name}={value}" for name, value in flags.items())]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "6 images done, 0 failed" in done.stdout
    assert "images/s" in done.stdout
    assert time.monotonic() - started < 200
    table = subprocess.run([str(script), "evaluate", str(tmp_path / "out")], capture_output=True, text=True, check=True)
    assert "AUROC" in table.stdout


def test_resolved_weights_reach_the_workers(tmp_path):
    assert load_backbone(TINY, "random:0").weights_sha256 == "random:0"
