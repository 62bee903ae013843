"""Runs written by earlier schema versions are still read: by verify, evaluate, other readers, and as banks and embeddings."""

import json
import shutil
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from generated import TINY, save, textured

from anomalydino_plugin import MemoryBank
from jobs import schema
from jobs.cli import main
from jobs.store import Store

WRITTEN = sorted((Path(__file__).parents[1] / "compatibility").glob("schema_*"))


@pytest.fixture(params=WRITTEN, ids=[path.name for path in WRITTEN])
def written(request, tmp_path) -> Path:
    """A copy: commands write locks and metrics."""
    return Path(shutil.copytree(request.param, tmp_path / "run"))


def test_the_present_version_is_among_them():
    assert f"schema_{schema.SCHEMA_VERSION}" in {path.name for path in WRITTEN}


def test_they_are_small():
    for folder in WRITTEN:
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 100_000


def test_verify_finds_nothing_wrong(written, capsys):
    assert main(["verify", str(written)]) == 0, capsys.readouterr().out
    assert "nothing wrong" in capsys.readouterr().out


def test_evaluate(written, capsys):
    assert main(["evaluate", str(written)]) == 0
    assert "plate top" in capsys.readouterr().out


def test_rows_say_what_they_said(written):
    version = json.loads((written / "job.json").read_text())["schema_version"]
    for file in written.rglob("*.parquet"):
        assert pq.read_schema(file).metadata[b"anomalydino_schema_version"].decode() == version
    store = Store(written)
    assert {
        kind: store.read(kind).num_rows for kind in ("images", "scores", "patch_scores", "embeddings", "failures")
    } == {
        "images": 7,  # five to score, a reference for each category
        "scores": 4,
        "patch_scores": 4 * 4 + 2 * 2,
        "embeddings": 4 * 4 + 2 * 2,
        "failures": 1,
    }
    scores = {row["category"]: row for row in store.read("scores").to_pylist() if row["uri"].endswith("spot/0.png")}
    assert set(scores) == {"01", "plate top"}
    assert all(row["score"] > 0 and row["is_anomalous"] == (row["score"] > row["threshold"]) for row in scores.values())
    joined = duckdb.sql(
        f"select count(*) from '{written}/patch_scores/**/*.parquet' p join '{written}/images/**/*.parquet' i "
        "on p.match_image_id = i.image_id where i.status = 'reference'"
    ).fetchall()
    assert joined == [(20,)]


@pytest.mark.thorough
def test_banks_are_used_again(written, tmp_path):
    bank = MemoryBank.load(written / "banks" / "01.safetensors")
    assert (len(bank), bank.fingerprint["backbone"]) == (32, TINY)
    save(tmp_path / "in" / "01" / "test" / "good" / "0.png", textured(2, (32, 32)))
    words = ["--images", str(tmp_path / "in"), "--banks", str(written), "--backbone", TINY, "--weights", "random:0"]
    assert main(["score", *words, "--resolution", "32", "--masking", "off", "--out", str(tmp_path / "out")]) == 0
    new, old = (Store(out).read("scores").to_pylist() for out in (tmp_path / "out", written))
    same = next(row for row in old if row["category"] == "01" and row["uri"].endswith("good/0.png"))
    assert new[0]["score"] == pytest.approx(same["score"], abs=1e-5)
