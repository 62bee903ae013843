import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from anomalydino_plugin import ConfigError, Detection, Geometry
from jobs import schema, tables
from jobs.inputs import ImageRecord
from jobs.store import Store, folder_name, write_table

HOSTILE = ["01", "plate top", "a=b", "größe", "../up", "a/b", ".hidden", "%41"]


def scored(category: str, count: int = 3, patches: tuple[int, int] = (2, 3)) -> list[tables.Scored]:
    plan = Geometry((20, 30), (28, 42), patches, (1.0, 1.0))
    rng = np.random.default_rng(0)
    return [
        tables.Scored(
            ImageRecord(f"id{number}", f"/x/{number}.png", category, "test", "good"),
            Detection(
                0.1 * number, rng.random(patches, np.float32), np.ones(patches, bool), np.zeros(patches, np.int64), plan
            ),
            rng.standard_normal((patches[0] * patches[1], 8)).astype(np.float32),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("category", HOSTILE)
def test_hostile_categories_stay_inside_and_readable_everywhere(tmp_path, category):
    store = Store(tmp_path / "out")
    table = tables.scores_table(scored(category), 0.15, "max", masked=False)
    store.commit(category, "000000", {"scores": table}, {"scored": 3, "failed": 0})
    path = store.path("scores", category, "000000")
    assert path.resolve().parent.parent == store.root / "scores"
    escaped = str(path).replace("'", "''")
    assert duckdb.sql(f"select distinct category from read_parquet('{escaped}')").fetchall() == [(category,)]
    assert pl.read_parquet(path, hive_partitioning=False)["category"].unique().to_list() == [category]
    assert set(pd.read_parquet(path)["category"]) == {category}
    assert ds.dataset(store.root / "scores").to_table()["category"].unique().to_pylist() == [category]
    assert store.read("scores").num_rows == 3


def test_folder_names_are_distinct():
    assert len({folder_name(category) for category in HOSTILE}) == len(HOSTILE)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_embeddings_are_fixed_size_lists_for_every_reader(tmp_path, dtype):
    items = scored("c")
    path = tmp_path / "e.parquet"
    write_table(path, tables.embeddings_table(items, 8, dtype))
    table = pq.read_table(path)
    assert table.schema.field("embedding").type.list_size == 8
    expected = np.concatenate([item.features for item in items])
    for values in (
        np.stack(table["embedding"].to_pylist()),
        np.stack(pl.read_parquet(path)["embedding"].to_list()),
        np.array([row[0] for row in duckdb.sql(f"select embedding from '{path}'").fetchall()]),
    ):
        assert np.abs(values - expected).max() < (1e-7 if dtype == "float32" else 2e-3)


def test_row_groups_hold_whole_images(tmp_path):
    path = tmp_path / "e.parquet"
    write_table(path, tables.embeddings_table(scored("c", count=40), 8, "float32"))
    file = pq.ParquetFile(path)
    assert file.num_row_groups == 3  # 16 + 16 + 8 images
    seen = [set(file.read_row_group(number, ["image_id"])["image_id"].to_pylist()) for number in range(3)]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 40


def test_verdict_compares_what_is_stored():
    rows = tables.scores_table(scored("c"), 0.1, "max", masked=False).to_pylist()
    for row in rows:
        assert row["is_anomalous"] == (row["score"] > row["threshold"])
        assert (row["normalised_score"] > 0.5) == row["is_anomalous"]
    assert tables.scores_table(scored("c"), None, "max", masked=False)["is_anomalous"].null_count == 3


def test_masked_patches_have_null_matches():
    item = scored("c", count=1)[0]
    matched = item.detection.matched_rows.copy()
    matched[0, 0] = -1
    import torch

    from anomalydino_plugin import MemoryBank

    bank = MemoryBank(
        torch.ones(1, 4),
        torch.tensor([[0, 1, 5, 6]], dtype=torch.int32),
        torch.ones(1, dtype=torch.bool),
        ("ref",),
        (0.0, 45.0),
        ((20, 30),),
    )
    rows = tables.patch_scores_table(
        [item._replace(detection=item.detection._replace(matched_rows=matched))], bank
    ).to_pylist()
    assert [rows[0][name] for name in ("match_image_id", "match_row", "match_col", "match_rotation")] == [None] * 4
    assert [rows[1][name] for name in ("match_image_id", "match_row", "match_col", "match_rotation")] == [
        "ref",
        5,
        6,
        45.0,
    ]
    assert [(row["patch_row"], row["patch_col"]) for row in rows[:4]] == [(0, 0), (0, 1), (0, 2), (1, 0)]


def test_claims(tmp_path):
    Store(tmp_path / "out").claim("a")
    Store(tmp_path / "out").claim("a")  # the same run resumes
    with pytest.raises(ConfigError, match="other settings"):
        Store(tmp_path / "out").claim("b")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="not empty"):
        Store(tmp_path / "full").claim("a")


def test_files_without_a_record_are_not_read(tmp_path):
    store = Store(tmp_path / "out")
    write_table(store.path("scores", "c", "000001"), tables.scores_table(scored("c"), 0.1, "max", masked=False))
    store.commit("c", "000000", {"scores": tables.scores_table(scored("c"), 0.1, "max", masked=False)}, {})
    assert store.read("scores").num_rows == 3


def test_schema_version_is_in_every_file():
    for one in (schema.IMAGES, schema.SCORES, schema.PATCH_SCORES, schema.FAILURES, schema.embeddings(8, "float16")):
        assert one.metadata[b"anomalydino_schema_version"] == b"1"
        assert "category" in one.names
        assert not any(pa.types.is_null(field.type) for field in one)
