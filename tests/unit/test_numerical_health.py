"""NaN and infinite features stop the run for their image with a reason; degenerate masks fall back by rule."""

from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from generated import TINY, save, textured

from anomalydino_plugin import BankError, BatchedModel, FewShotModel, ImageError, InputError
from jobs import tables
from jobs.bank_builder import read_bank
from jobs.config import ExtractConfig, MatchConfig, ScoreConfig
from jobs.decode import decode
from jobs.embedding_scorer import EmbeddingScorer
from jobs.embeddings import StoredRun
from jobs.extract import Extractor
from jobs.inputs import ImageRecord
from jobs.matcher import CategoryPlan, Matcher
from jobs.scorer import Scorer
from jobs.shards import Shard
from jobs.stage import write_job
from jobs.store import Store

RESOLUTION = 64
BAD = [np.nan, np.inf, -np.inf]


class Spoilt:
    """An engine whose features of one image hold a bad value."""

    def __init__(self, engine, value: float, place: int) -> None:
        self.engine, self.value, self.place = engine, value, place

    def __call__(self, images):
        features = self.engine(images).clone()
        features[self.place, 3, 5] = self.value
        return features


def spoil(model, value: float, place: int = 1) -> None:
    inner = model._loaded_engine()
    model._loaded_engine = lambda: Spoilt(inner, value, place)


@pytest.fixture
def files(tmp_path) -> list[str]:
    for index in range(3):
        save(tmp_path / "images" / f"{index}.png", textured(index, spot=index == 2))
    return [str(tmp_path / "images" / f"{index}.png") for index in range(3)]


def decoded(files):
    records = [ImageRecord(f"{index}", uri, "nut") for index, uri in enumerate(files)]
    found, failures = decode(records, RESOLUTION, 16)
    assert not failures
    return found


@pytest.fixture
def bank(tmp_path, tiny_backbone) -> Store:
    store = Store(tmp_path / "banks", "fit")
    model = FewShotModel(tiny_backbone, resolution=RESOLUTION, masking="off").fit([textured(9)])
    with store.folder.writing("banks/nut.safetensors") as path:
        model.bank.save(path)
    return store


def score_config(tmp_path, **more) -> ScoreConfig:
    return ScoreConfig(
        images="x", out=str(tmp_path / "out"), backbone=TINY, weights="random:0", resolution=RESOLUTION, **more
    )


@pytest.mark.parametrize("value", BAD)
def test_score_job_makes_a_failure_of_that_image_alone(value, files, bank, tmp_path):
    scorer = Scorer(score_config(tmp_path, masking="off"), "random:0", bank, "cpu")
    spoil(scorer.model, value)
    result, record = scorer.process("nut", decoded(files), [])
    assert result["scores"]["image_id"].to_pylist() == ["0", "2"]
    (failure,) = result["failures"].to_pylist()
    assert failure["image_id"] == "1"
    assert failure["stage"] == "score"
    assert repr(files[1]) in failure["message"]
    assert "not finite" in failure["message"]
    assert record["done"] == 2
    assert record["failed"] == 1


def extract_config(tmp_path, **more) -> ExtractConfig:
    return ExtractConfig(
        images="x", out=str(tmp_path / "out"), backbone=TINY, weights="random:0", resolution=RESOLUTION, **more
    )


@pytest.mark.parametrize(
    ("value", "dtype", "says"),
    [*((value, "float32", "not finite") for value in BAD), (1e5, "float16", "beyond float16.*float32")],
)
def test_extract_job_makes_a_failure_of_that_image_alone(value, dtype, says, files, tmp_path):
    extractor = Extractor(extract_config(tmp_path, embedding_dtype=dtype), "random:0", "cpu")
    spoil(extractor.model, value)
    result, _ = extractor.process("nut", decoded(files), [])
    assert set(result["embeddings"]["image_id"].to_pylist()) == {"0", "2"}
    (failure,) = result["failures"].to_pylist()
    assert failure["stage"] == "encode"
    assert repr(files[1]) in failure["message"]
    import re

    assert re.search(says, failure["message"])


def test_large_features_fit_float32(files, tmp_path):
    extractor = Extractor(extract_config(tmp_path), "random:0", "cpu")
    spoil(extractor.model, 1e5)
    result, _ = extractor.process("nut", decoded(files), [])
    assert not result["failures"].num_rows


@pytest.mark.parametrize("value", BAD)
def test_the_python_api_says_so(value, files, tiny_backbone):
    model = FewShotModel(tiny_backbone, resolution=RESOLUTION, masking="on").fit([textured(9)])
    spoil(model, value, place=0)
    with pytest.raises(ImageError, match="not finite"):
        model.score(files[0])
    batched = BatchedModel(tiny_backbone, resolution=RESOLUTION, masking="on", batch_size=1)
    spoil(batched, value, place=0)
    with pytest.raises(ImageError, match=r"0\.png.*not finite"):
        batched.score_set(files)


@pytest.mark.parametrize("masking", ["auto", "on", "off"])
def test_a_reference_without_finite_features_is_named(masking, files, tiny_backbone):
    model = FewShotModel(tiny_backbone, resolution=RESOLUTION, masking=masking)
    spoil(model, np.nan, place=0)
    with pytest.raises(BankError, match=r"0\.png.*not finite"):
        model.fit(files[:1])


def stored(folder, value: float) -> Store:
    """Embeddings of three images, one with a bad value, as no extract of ours would leave them."""
    from anomalydino_plugin import Geometry

    store, plan = Store(folder, "extract"), Geometry((64, 64), (64, 64), (4, 4), (1.0, 1.0))
    store.claim("e", ("images", "embeddings"), {})
    random = np.random.default_rng(0)
    items = [
        tables.Extracted(
            ImageRecord(f"{index}", f"{index}.png", "nut"),
            plan,
            random.standard_normal((16, 64), np.float32),
            np.ones((4, 4), bool),
            False,
        )
        for index in range(3)
    ]
    items[1].features[7, 7] = value
    rows = {
        "images": tables.extracted_images(items, []),
        "embeddings": tables.embeddings_table(items, 64, "float32"),
    }
    store.commit("nut", "000000", rows, {"done": 3, "failed": 0, "seconds": 0.0, "fingerprint": {"weights": "none"}})
    write_job(store, {})
    return store


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("stage", ["match", "score"])
def test_stored_embeddings_that_are_not_finite_reach_no_score(stage, value, bank, tmp_path):
    store = stored(tmp_path / "stored", value)
    run = StoredRun.read(store.location)
    shard = Shard("nut", "000000", (run.images[0].record,))
    out = Store(tmp_path / "out", stage)
    if stage == "match":
        config = MatchConfig(embeddings=store.location, out=out.location, masking="off")
        worker = Matcher(config, {"nut": CategoryPlan(run.sets["nut"], run.of("nut"), None, False)}, out, True, "cpu")
    else:
        config = ScoreConfig(embeddings=store.location, out=out.location, masking="off", banks=bank.location)
        images = {image.record.image_id: image for image in run.images}
        worker = EmbeddingScorer(config, {"nut": (run.sets["nut"], images)}, partial(read_bank, bank), out, "cpu")
    with pytest.raises(InputError, match=r"image '1' in .*not finite.*Extract the images again"):
        worker.run(shard)
    assert not list((tmp_path / "out").rglob("*.parquet"))


# Masks


@pytest.fixture
def blank() -> np.ndarray:
    return np.full((96, 96, 3), 128, np.uint8)  # no component above the threshold: no foreground


def test_a_blank_image_has_no_perfect_score(blank, tiny_backbone):
    model = FewShotModel(tiny_backbone, resolution=RESOLUTION, masking="on").fit([textured(9)])
    found = model.score(blank)
    unmasked = FewShotModel(tiny_backbone, resolution=RESOLUTION, masking="off").fit([textured(9)])
    assert not model.foreground_found(model.encode([model.prepare(blank)])[0], (4, 4)).any()
    assert found.foreground.all()
    assert found.score == pytest.approx(unmasked.score(blank).score)
    assert found.score > 0.01


def test_the_same_in_the_exported_graph(blank, tiny_backbone):
    model = FewShotModel(tiny_backbone, resolution=RESOLUTION, masking="on").fit([textured(9)])
    image = torch.from_numpy(np.stack([blank, textured(3)])).permute(0, 3, 1, 2) / 255
    traced = model._traced(image)
    assert traced.pred_score.tolist() == pytest.approx(model(image).pred_score.tolist(), rel=1e-3)


def test_batched_falls_back_too(blank, tiny_backbone):
    model = BatchedModel(tiny_backbone, resolution=RESOLUTION, masking="on")
    found = model.score_set([textured(1), textured(2), blank])
    assert found[2].foreground.all()
    assert found[2].score > 0.01


def test_jobs_record_the_fall_back(blank, files, bank, tmp_path):
    """`masked` is false for an image whose mask would have hidden all, or hides nothing, whatever its category does."""
    save(tmp_path / "images" / "1.png", blank)
    scorer = Scorer(score_config(tmp_path, masking="on"), "random:0", bank, "cpu")
    result, _ = scorer.process("nut", decoded(files), [])
    row = result["scores"].to_pylist()[1]
    assert row["masked"] is False
    assert row["foreground_share"] == 1.0
    assert row["score"] > 0.01
    assert all(result["patch_scores"].slice(16, 16)["foreground"].to_pylist())


def test_masks_that_hide_something_are_recorded(tmp_path):
    from anomalydino_plugin import Geometry, detect

    plan = Geometry((64, 64), (64, 64), (4, 4), (1.0, 1.0))
    foreground = np.ones((4, 4), bool)
    foreground[0] = False
    rows = []
    for mask in (foreground, np.ones((4, 4), bool)):
        detection = detect(torch.ones(16), torch.zeros(16, dtype=torch.int64), mask, plan)
        rows.append(tables.Scored(ImageRecord("1", "1.png", "nut"), detection))
    found = tables.scores_table(rows, None, "max", True)
    pq.write_table(found, tmp_path / "scores.parquet")
    assert pq.read_table(tmp_path / "scores.parquet")["masked"].to_pylist() == [True, False]
    assert tables.scores_table(rows, None, "max", False)["masked"].to_pylist() == [False, False]


# Distances


@pytest.mark.parametrize("kernel", ["torch", "auto"])
def test_distances_stay_within_0_and_2_where_rounding_goes_beyond(kernel):
    """Rows a little longer than 1, as rounding leaves them: equal ones and opposite ones."""
    from anomalydino_plugin import RunningLowest, nearest, search_rows

    random = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(64, 32, generator=random), dim=1) * (1 + 1e-6)
    alike = nearest(rows, search_rows(rows, kernel=kernel)).distances
    assert float(alike.min()) >= 0
    assert float(alike.max()) < 1e-5
    opposite = nearest(rows[:1], search_rows(-rows[:1].repeat(4, 1), kernel=kernel)).distances
    assert 1.99 < float(opposite.max()) <= 2
    for sign in (1, -1):
        lowest = RunningLowest(rows[:1], 2)
        lowest.update(search_rows(sign * rows[:1].repeat(64, 1), [32, 32], kernel), [32, 32], 0)
        assert 0 <= float(lowest.result().distances) <= 2


def test_the_same_in_graphs():
    from anomalydino_plugin.graph.mutual import mutual_distance
    from anomalydino_plugin.graph.scores import nearest_distance

    row = torch.nn.functional.normalize(torch.ones(1, 1, 8), dim=2) * (1 + 1e-6)
    for bank in (row[0], -row[0]):
        assert 0 <= float(nearest_distance(row, bank, 1)) <= 2
    pair = torch.cat([row.repeat(1, 4, 1), -row.repeat(1, 4, 1)])
    found = mutual_distance(pair, "official", None)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 2
