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
from jobs.parquet import ROWS_IN_GROUP, write_tables
from jobs.store import Store, folder_name

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
    store = Store(tmp_path / "out", "score")
    store.claim("a", ["scores"], {})
    table = tables.scores_table(scored(category), 0.15, "max", masked=False)
    store.commit(category, "000000", {"scores": table}, {"done": 3, "failed": 0})
    path = tmp_path / "out" / store.file_name("scores", category, "000000")
    assert path.resolve().parent.parent == (tmp_path / "out" / "scores").resolve()
    escaped = str(path).replace("'", "''")
    assert duckdb.sql(f"select distinct category from read_parquet('{escaped}')").fetchall() == [(category,)]
    assert pl.read_parquet(path, hive_partitioning=False)["category"].unique().to_list() == [category]
    assert set(pd.read_parquet(path)["category"]) == {category}
    assert ds.dataset(tmp_path / "out" / "scores").to_table()["category"].unique().to_pylist() == [category]
    assert store.read("scores").num_rows == 3


def test_folder_names_are_distinct():
    assert len({folder_name(category) for category in HOSTILE}) == len(HOSTILE)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_embeddings_are_fixed_size_lists_for_every_reader(tmp_path, dtype):
    items = scored("c")
    path = tmp_path / "e.parquet"
    write_tables(path, [tables.scored_embeddings(items, 8, dtype)])
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
    items = scored("c", count=40, patches=(32, 50))
    parts = [tables.scored_embeddings(items[start : start + 7], 8, "float32") for start in range(0, 40, 7)]
    assert write_tables(path, parts) == 40 * 1600
    file = pq.ParquetFile(path)
    assert file.num_row_groups == 4  # 11 images of 1600 patches are the first to exceed 16,384 rows
    assert file.metadata.row_group(0).num_rows == 11 * 1600 >= ROWS_IN_GROUP
    seen = [set(file.read_row_group(number, ["image_id"])["image_id"].to_pylist()) for number in range(4)]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 40
    statistics = file.metadata.row_group(0).column(0).statistics
    assert (statistics.min, statistics.max) == (min(seen[0]), max(seen[0]))


def test_rows_of_images_are_not_cut_into_tiny_groups(tmp_path):
    path = tmp_path / "s.parquet"
    table = tables.scores_table(scored("c", count=100), 0.1, "max", masked=False)
    write_tables(path, [table, table])
    assert pq.ParquetFile(path).num_row_groups == 1


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
        [item._replace(detection=item.detection._replace(matched_rows=matched))], tables.bank_source(bank)
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
    Store(tmp_path / "out", "score").claim("a", ["scores"], {})
    Store(tmp_path / "out", "score").claim("a", ["scores"], {})  # the same run resumes
    with pytest.raises(ConfigError, match="other settings"):
        Store(tmp_path / "out", "score").claim("b", ["scores"], {})
    with pytest.raises(ConfigError, match="holds scores of `anomalydino score`"):
        Store(tmp_path / "out", "match").claim("a", ["scores"], {})
    Store(tmp_path / "out", "extract").claim("a", ["embeddings"], {})  # another stage beside it
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="not empty"):
        Store(tmp_path / "full", "score").claim("a", ["scores"], {})
    with pytest.raises(ConfigError, match="is a file"):
        Store(tmp_path / "full" / "thesis.tex", "score").claim("a", ["scores"], {})


def test_a_second_run_on_a_folder_is_refused(tmp_path):
    store = Store(tmp_path / "out", "score")
    with store.exclusive(), pytest.raises(ConfigError, match="another run works"), store.exclusive():
        pass
    with store.exclusive():
        pass


def small_table(first: int = 0, count: int = 3) -> pa.Table:
    return tables.scores_table(scored("c", count=first + count)[first:], 0.1, "max", masked=False)


def test_files_without_a_record_are_not_read_and_go_on_resume(tmp_path):
    store = Store(tmp_path / "out", "score")
    store.claim("a", ["scores"], {})
    store.commit("c", "000000", {"scores": small_table()}, {})
    left = tmp_path / "out" / store.file_name("scores", "c", "000001")
    write_tables(left, [small_table()])
    (left.parent / ".000002.parquet.1.tmp").touch()
    assert store.read("scores").num_rows == 3
    store.claim("a", ["scores"], {})
    assert [path.name for path in left.parent.iterdir()] == ["000000.parquet"]


def test_small_files_are_joined_once_and_again_when_shards_come(tmp_path):
    store = Store(tmp_path / "out", "score", {"scores": 2})
    store.claim("a", ["scores"], {})
    for number in (0, 2):
        store.commit("c", f"{number:06d}", {"scores": small_table(number * 3)}, {})
    assert not list((tmp_path / "out").glob("scores/**/*.parquet"))  # nothing is shown before it is joined
    for item in store.unjoined():
        store.join(*item)
    assert store.unjoined() == []
    store.commit("c", "000001", {"scores": small_table(3)}, {})
    ((kind, category, name, parts),) = store.unjoined()
    assert (kind, category, name, len(parts)) == ("scores", "c", "000000-000001", 2)
    store.join(kind, category, name, parts)
    store.drop_parts()
    assert store.unjoined() == []
    assert store.read("scores")["image_id"].to_pylist() == [f"id{number}" for number in range(9)]
    assert not list((tmp_path / "out" / ".state").rglob("*.parquet"))
    assert sorted(path.name for path in (tmp_path / "out" / "scores" / "c").iterdir()) == [
        "000000-000001.parquet",
        "000002-000003.parquet",
    ]


def test_schema_version_is_in_every_file():
    for one in (schema.IMAGES, schema.SCORES, schema.PATCH_SCORES, schema.FAILURES, schema.embeddings(8, "float16")):
        assert one.metadata[b"anomalydino_schema_version"] == b"1"
        assert "category" in one.names
        assert not any(pa.types.is_null(field.type) for field in one)
