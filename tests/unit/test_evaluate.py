"""`anomalydino evaluate` on run folders written without Ray."""

import json
import os
from io import StringIO
from types import SimpleNamespace

import duckdb
import numpy as np
import pytest
import torch
from generated import save
from PIL import Image
from rich.console import Console

from anomalydino_plugin import (
    ConfigError,
    Detection,
    ImageError,
    InputError,
    anomaly_map,
    anomaly_map_metrics,
    plan_geometry,
)
from jobs import metrics_table, tables
from jobs.cli import _parser, _spelled_out, _submitted
from jobs.evaluate import evaluate, main
from jobs.inputs import ImageRecord
from jobs.metric_rows import CategoryMetrics, mean_over_categories, spread_over_runs
from jobs.pipeline import load
from jobs.scored_run import ScoredRun
from jobs.stage import write_job
from jobs.store import Store
from jobs.truth import read_mask

RESOLUTION, PATCH = 64, 16
SIZE = (48, 66)  # resized to 64 x 88: 8 columns are cropped


def written_run(folder, out, *, seed=0, images=8, change=(lambda record: record), category="01", **settings):
    """A finished run: half of its images are defects with a mask, which their distances partly find."""
    rng = np.random.default_rng(seed)
    plan = plan_geometry(*SIZE, RESOLUTION, PATCH)
    assert plan.coverage[1] < 1
    scored = []
    for number in range(images):
        defect, mask_uri = number % 2 == 1, None
        distances = rng.random(plan.grid, dtype=np.float32) * 0.5
        if defect:
            mask = np.zeros(SIZE, np.uint8)
            mask[12:24, 17:34] = 255
            mask_uri = str(folder / f"{number}_mask.png")
            save(folder / f"{number}_mask.png", mask)
            distances[1, 1] += 0.4
        name = f"{number:03d}"
        record = ImageRecord(name, f"{name}.png", category, "test", "spot" if defect else "good", mask_uri)
        detection = Detection(
            float(distances.max()), distances, np.ones(plan.grid, bool), np.full(plan.grid, -1, np.int64), plan
        )
        scored.append(tables.Scored(change(record), detection))
    store = Store(out, "score")
    store.claim(f"run {seed}", ("images", "scores", "patch_scores"), {})
    source = tables.MatchSource(["reference"], lambda rows: np.zeros((len(rows), 4), np.int64), (0.0,))
    rows = {
        "images": tables.scored_images(scored, []),
        "scores": tables.scores_table(scored, 0.6, "max", False),
        "patch_scores": tables.patch_scores_table(scored, source),
    }
    store.commit(category, "000000", rows, {"done": images, "failed": 0, "seconds": 0.0})
    config = {"resolution": RESOLUTION, "backbone": "x", "seed": seed, "shots": 1, **settings}
    write_job(store, {"config": config, "patch_size": PATCH})
    return scored


def expected(scored):
    maps, masks = [], []
    for item in scored:
        distances, plan = torch.from_numpy(item.detection.distances), item.detection.geometry
        maps.append(anomaly_map(distances, SIZE, coverage=plan.coverage).numpy())
        uri = item.record.mask_uri
        masks.append(np.zeros(SIZE, bool) if uri is None else np.asarray(Image.open(uri)) > 0)
    return anomaly_map_metrics(maps, masks)


def without(record, **change):
    return ImageRecord(**{**record.__dict__, **change})


def test_pixels_are_measured_on_the_maps_of_the_library(tmp_path):
    scored = written_run(tmp_path, tmp_path / "out")
    (row,) = evaluate(str(tmp_path / "out"))
    found = expected(scored)
    assert (row.pixel_images, row.pixel_regions, row.mask_problems) == (8, 4, ())
    assert (row.pixel_auroc, row.pixel_f1_max, row.pro_30, row.pro_05) == pytest.approx(
        (found.auroc, found.f1_max, found.pro_30, found.pro_05), abs=1e-9
    )
    assert row.pixel_average_precision == pytest.approx(found.average_precision, abs=1e-9)
    assert row.threshold == pytest.approx(0.6)
    assert (row.false_alarms, row.misses) == (
        0.0,
        pytest.approx(np.mean([i.detection.score <= 0.6 for i in scored[1::2]])),
    )
    assert row.false_alarms_high == pytest.approx(1 - 0.025 ** (1 / 4))


def test_without_labels_or_masks_the_rest_is_measured(tmp_path):
    def change(record):
        if record.image_id == "000":
            return without(record, label=None)  # truth unknown
        if record.image_id == "001":
            return without(record, mask_uri=None)  # a defect without a mask
        return without(record, label=None) if record.image_id == "003" else record  # a mask, and no label

    written_run(tmp_path, tmp_path / "out", change=change)
    (row,) = evaluate(str(tmp_path / "out"))
    assert (row.images, row.labelled, row.defects, row.pixel_images) == (8, 6, 3, 6)
    console = Console(file=StringIO(), width=120)
    main(SimpleNamespace(out=str(tmp_path / "out"), pixel=None), console)
    assert console.file.getvalue().count("6 of 8") == 2


def test_no_mask_at_all(tmp_path):
    written_run(tmp_path, tmp_path / "out", change=lambda record: without(record, mask_uri=None))
    (row,) = evaluate(str(tmp_path / "out"))
    assert (row.pixel_images, row.pixel_auroc, row.mask_problems) == (0, None, ())
    assert row.auroc is not None
    with pytest.raises(ConfigError, match="no image under .* has a mask"):
        evaluate(str(tmp_path / "out"), pixel=True)


def test_masks_that_cannot_be_used_are_named_and_left_out(tmp_path):
    scored = written_run(tmp_path, tmp_path / "out")
    save(tmp_path / "1_mask.png", np.zeros((5, 7), np.uint8))
    (tmp_path / "3_mask.png").write_bytes(b"no image")
    (tmp_path / "5_mask.png").unlink()
    (row,) = evaluate(str(tmp_path / "out"))
    assert (row.pixel_images, row.pixel_regions) == (5, 1)
    kept = [item for number, item in enumerate(scored) if number not in {1, 3, 5}]
    assert row.pro_30 == pytest.approx(expected(kept).pro_30, abs=1e-9)
    size, broken, gone = row.mask_problems
    assert "001.png: cannot decode mask" in size
    assert "7 x 5 pixels, expected the image's 66 x 48" in size
    assert "003.png: cannot decode mask" in broken
    assert "005.png: cannot read mask" in gone
    console = Console(file=StringIO(), width=120)
    main(SimpleNamespace(out=str(tmp_path / "out"), pixel=None), console)
    assert console.file.getvalue().count("left out of the pixel metrics") == 3


def test_a_grid_that_does_not_follow_from_the_settings_is_no_metric(tmp_path):
    written_run(tmp_path, tmp_path / "out", resolution=32)
    (row,) = evaluate(str(tmp_path / "out"))
    assert row.pixel_auroc is None
    assert "as job.json states it" in row.mask_problems[0]


def test_names_are_text_in_tables(tmp_path):
    for seed in (0, 1):
        written_run(tmp_path / str(seed), tmp_path / f"out{seed}", seed=seed, category="[/red]")
    console = Console(file=StringIO(), width=120)
    main(SimpleNamespace(out=[str(tmp_path / "out0"), str(tmp_path / "out1")], pixel=None), console)
    assert console.file.getvalue().count("[/red]") == 9  # three tables for each run, three for both


def test_pixels_can_be_left_out(tmp_path):
    written_run(tmp_path, tmp_path / "out")
    (row,) = evaluate(str(tmp_path / "out"), pixel=False)
    assert row.pixel_auroc is None


@pytest.mark.parametrize(
    ("pixels", "mode"),
    [
        (np.array([[0, 1], [255, 0]], np.uint8), "L"),
        (np.array([[0, 1], [3, 0]], np.uint16), "I;16"),
        (np.array([[[0, 0, 0, 255], [0, 9, 0, 255]], [[1, 1, 1, 0], [0, 0, 0, 0]]], np.uint8), "RGBA"),
        (np.array([[0, 1], [1, 0]], bool), "1"),
    ],
)
def test_masks_of_any_depth(tmp_path, pixels, mode):
    picture = Image.fromarray(pixels)
    assert picture.mode == mode
    picture.save(tmp_path / "mask.png")
    assert read_mask(str(tmp_path / "mask.png"), (2, 2)).tolist() == [[False, True], [True, False]]


def test_what_is_no_mask_file_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\nshowpage\n")
    Image.fromarray(np.array([[0, np.nan], [1, 0]], np.float32)).save(tmp_path / "nan.tif")
    reasons = {
        "pipe.png": "a pipe, socket or device",
        "folder.png": "a folder",
        "empty.png": "empty",
        "script.png": "Expected a readable PNG",  # Pillow would hand it to Ghostscript
        "nan.tif": "NaN",
    }
    for name, reason in reasons.items():
        with pytest.raises(ImageError, match=f"mask '.*{name}'.*{reason}"):
            read_mask(str(tmp_path / name), (2, 2))


def test_a_mask_may_be_as_large_as_its_image(tmp_path, monkeypatch):
    """Pillow's own limit would refuse masks of images that are allowed."""
    save(tmp_path / "mask.png", np.eye(30, dtype=np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_mask(str(tmp_path / "mask.png"), (30, 30)).sum() == 30
    with pytest.raises(ImageError, match="30 x 30 pixels, expected the image's 40 x 30"):
        read_mask(str(tmp_path / "mask.png"), (30, 40))


def test_parquet_and_json_say_the_same(tmp_path):
    written_run(tmp_path, tmp_path / "out")
    (row,) = evaluate(str(tmp_path / "out"))
    parquet = duckdb.sql(f"select * from '{tmp_path}/out/metrics.parquet'").fetchdf().to_dict("records")[0]
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for name, value in row._asdict().items():
        assert list(value) == list(parquet[name]) if isinstance(value, tuple) else value == parquet[name]
        assert content["categories"]["01"][name] == (list(value) if isinstance(value, tuple) else value)
    assert content["mean_over_categories"]["pro_30"] == row.pro_30


def test_several_runs(tmp_path):
    for seed in (0, 1, 2):
        written_run(tmp_path / str(seed), tmp_path / f"out{seed}", seed=seed)
    outs = [str(tmp_path / f"out{seed}") for seed in (0, 1, 2)]
    console = Console(file=StringIO(), width=120)
    options = _parser().parse_args(_spelled_out(["evaluate", *outs, "--summary", str(tmp_path / "all")])).evaluate
    assert main(options, console) == 0
    assert "3 runs: mean ± standard deviation" in console.file.getvalue()
    assert "differ in" not in console.file.getvalue()
    values = [evaluate(out)[0].pro_30 for out in outs]
    found = duckdb.sql(
        f"select category, runs, mean, standard_deviation from '{tmp_path}/all/metrics_over_runs.parquet' "
        "where metric = 'pro_30' order by category"
    ).fetchall()
    assert found == [
        (name, 3, pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1))) for name in ("01", None)
    ]
    assert json.loads((tmp_path / "all" / "metrics_over_runs.json").read_text())["runs"] == outs


def test_runs_that_do_not_belong_together_are_noted(tmp_path):
    written_run(tmp_path / "0", tmp_path / "out0")
    written_run(tmp_path / "1", tmp_path / "out1", shots=4, category="b")
    console = Console(file=StringIO(), width=120)
    main(SimpleNamespace(out=[str(tmp_path / "out0"), str(tmp_path / "out1")], pixel=False), console)
    assert "the runs differ in shots (1, 4)" in console.file.getvalue()
    assert "do not hold the same categories" in console.file.getvalue()
    assert "b (1 of 2)" in console.file.getvalue()
    with pytest.raises(ConfigError, match="expected different folders"):
        main(SimpleNamespace(out=[str(tmp_path / "out0")] * 2, pixel=False), console)
    with pytest.raises(ConfigError, match="of one run"):
        main(SimpleNamespace(out=[str(tmp_path / "out0")], pixel=False, summary="x"), console)
    with pytest.raises(InputError, match="no scores"):
        evaluate(str(tmp_path / "none"))


def test_means_leave_out_what_is_missing():
    rows = [CategoryMetrics("a", 4, 0, 4, 2, auroc=0.5, pro_30=0.2), CategoryMetrics("b", 4, 0, 0, 0, pro_30=0.4)]
    means = mean_over_categories(rows)
    assert (means["auroc"], means["pro_30"], means["misses"]) == (0.5, pytest.approx(0.3), None)
    spreads = {(spread.category, spread.metric): spread for spread in spread_over_runs([rows, rows[:1]])}
    assert spreads["a", "auroc"][2:] == (2, 0.5, 0.0)
    assert spreads["b", "pro_30"][2:] == (1, 0.4, None)
    assert spreads[None, "pro_30"].mean == pytest.approx(0.2)  # b is not in both


def test_evaluate_in_files_of_stages_and_submitted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text("stages: [evaluate: {out: run, pixel: false}]")
    (stage,) = load("job.yaml")
    assert (stage.settings.out, stage.settings.pixel) == (str(tmp_path / "run"), False)
    words = _submitted(["evaluate", "a", "s3://b/c", "--no-pixel", "--summary", "d"]).words
    assert words == ("evaluate", str(tmp_path / "a"), "s3://b/c", "--pixel=false", f"--summary={tmp_path / 'd'}")


def test_what_does_not_belong_together_is_an_error(tmp_path):
    written_run(tmp_path, tmp_path / "out", images=2)
    run = ScoredRun(str(tmp_path / "out"))
    (image, _) = run.images["01"]
    with pytest.raises(InputError, match="3 patch distances: expected a grid of"):
        run.anomaly_map(image, np.zeros(3, np.float32))
    store = Store(tmp_path / "out", "score")
    images = store.read("images")
    store.commit("01", "000000", {"images": images.slice(1), "scores": store.read("scores")}, {"done": 2, "failed": 0})
    with pytest.raises(InputError, match="has a score and no row in images"):
        ScoredRun(str(tmp_path / "out"))


def test_while_a_run_goes_on_maps_cover_the_whole_image(tmp_path):
    written_run(tmp_path, tmp_path / "out", images=2)
    (tmp_path / "out" / "job.json").unlink()
    run = ScoredRun(str(tmp_path / "out"))
    (image, _) = run.images["01"]
    ((_, distances), _) = run.distances("01")
    expected_map = anomaly_map(torch.from_numpy(np.array(distances)).reshape(image.grid), image.size).numpy()
    np.testing.assert_array_equal(run.anomaly_map(image, distances), expected_map)


def test_a_row_of_one_run_has_no_spread():
    assert metrics_table._spread(None) == "-"
    assert metrics_table._percent(None) == "-"
