"""Stored embeddings: what `match` and `score --embeddings` refuse to take for a finished `extract`."""

import numpy as np
import pytest
from rich.console import Console

from anomalydino_plugin import InputError, plan_geometry
from jobs import match, tables
from jobs.config import MatchConfig
from jobs.embeddings import EmbeddingSet, StoredRun
from jobs.inputs import ImageRecord, image_id
from jobs.stage import write_job
from jobs.store import Store

PLAN = plan_geometry(32, 32, 32, 16)


def extracted(out, categories=("01",), images=3, passes=True, finish=True):
    """A folder as `extract` leaves it."""
    store = Store(out, "extract")
    store.claim("e", ["images", "embeddings"], {"embedding_dtype": "float32"})
    for category in categories:
        items = []
        for number in range(images):
            name = f"test/good/{number}.png"
            record = ImageRecord(image_id(category, name), f"/x/{category}/{name}", category, "test", "good")
            features = np.random.default_rng(number).normal(size=(4, 8)).astype(np.float32)
            items.append(tables.Extracted(record, PLAN, features, np.ones(PLAN.grid, bool), passes))
        items.sort(key=lambda item: item.record.image_id)
        rows = {
            "images": tables.extracted_images(items, []),
            "embeddings": tables.embeddings_table(items, 8, "float32"),
        }
        counts = {"done": images, "failed": 0, "seconds": 0.1, "fingerprint": {"backbone": "x"}}
        store.commit(category, "000000", rows, counts)
    if finish:
        write_job(store, {"counts": {}, "embedding_width": 8})
    return str(out)


def test_images_come_by_id(tmp_path):
    stored = StoredRun.read(extracted(tmp_path, ("01", "02")))
    own = stored.sets["02"]
    ids = sorted(image.record.image_id for image in stored.of("02"))
    assert [image.image_id for image in own.images(ids[:2])] == ids[:2]
    assert sum(len(table) for table in own.tables(ids[1:])) == 2 * 4
    assert list(own.tables(["none"])) == []
    assert list(own.images([])) == []


def test_an_unknown_category(tmp_path):
    with pytest.raises(InputError, match=r"no category '03' under .*: found \['01'\]"):
        StoredRun.read(extracted(tmp_path), ["03"])


def test_an_extract_that_is_not_finished(tmp_path):
    with pytest.raises(InputError, match="is not finished: repeat its command"):
        StoredRun.read(extracted(tmp_path, finish=False))


def test_a_category_without_files(tmp_path):
    with pytest.raises(InputError, match="no embeddings of category '09'"):
        EmbeddingSet.of(Store(extracted(tmp_path), "extract"), "09")


@pytest.mark.parametrize(
    ("made", "masking", "message"),
    [
        ({"images": 1}, "off", "category '01' has one image"),
        ({"passes": None}, "auto", "hold no foreground masks"),
    ],
)
def test_what_cannot_be_matched(tmp_path, made, masking, message):
    out = extracted(tmp_path, **made)
    config = MatchConfig(embeddings=out, out=str(tmp_path / "out"), masking=masking)
    with pytest.raises(InputError, match=message):
        match._plan(config, StoredRun.read(out), "01", Console(quiet=True))
