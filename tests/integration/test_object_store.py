"""Images, manifests, banks and output on an S3-compatible server that the tests start (moto's, a real HTTP server)."""

import io
import os
from pathlib import Path

import duckdb
import pytest
from generated import TINY
from pyarrow import fs
from rich.console import Console

from anomalydino_plugin import ConfigError, ImageError, InputError
from jobs.config import BatchedConfig, FitConfig, MatchConfig, ScoreConfig
from jobs.filesystem import Folder, read_bytes

ENCODING = {"backbone": TINY, "weights": "random:0", "resolution": 64}
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def bucket(mvtec_tree):
    """``s3://parts/tree`` holds the generated tree; the environment points at the server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(name, value)
        patch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
        remote = fs.S3FileSystem(endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True)
        remote.create_dir("parts")
        for path in sorted(mvtec_tree.rglob("*.png")):
            with remote.open_output_stream(f"parts/tree/{path.relative_to(mvtec_tree).as_posix()}") as file:
                file.write(path.read_bytes())
        yield f"{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def _ray_session(bucket):
    """Started when the environment is set: workers inherit it."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def quiet() -> Console:
    return Console(file=io.StringIO())


def tables(folder: Folder, kind: str) -> list[dict]:
    import pyarrow.parquet as pq

    return [row for name in folder.files(kind) for row in pq.read_table(folder.open(name)).to_pylist()]


def test_files_come_and_go(bucket, tmp_path):
    folder = Folder("s3://parts/here and there/")
    assert not folder.exists()
    folder.write("a b/größe.bin", b"123")
    with folder.writing("c") as path:
        path.write_bytes(b"45")
    assert folder.files() == ["a b/größe.bin", "c"]
    assert folder.files("a b") == ["a b/größe.bin"]
    assert (folder.has("c"), folder.has("d"), folder.exists()) == (True, False, True)
    assert read_bytes(folder.uri("a b/größe.bin")) == b"123"
    with folder.fetched("c") as path:
        assert path.read_bytes() == b"45"
    folder.remove("c")
    folder.remove("c")
    assert not folder.has("c")
    with pytest.raises(ZeroDivisionError), folder.writing("e"):
        1 / 0  # noqa: B018
    assert not folder.has("e")


def test_credentials_in_a_uri_are_refused_and_not_repeated():
    with pytest.raises(ConfigError, match="holds credentials") as caught:
        Folder("s3://AKIAKEY:very-secret@parts/tree").files()
    assert "very-secret" not in str(caught.value)


def test_unknown_filesystems_and_unreachable_buckets(bucket):
    with pytest.raises(ConfigError, match="no filesystem for nowhere://"):
        Folder("nowhere://a/b").files()
    from jobs.inputs import discover

    with pytest.raises(InputError, match="no images to score under 's3://parts/empty'"):
        discover("s3://parts/empty")


def test_a_missing_object_is_a_failure_with_its_address(bucket):
    from jobs.decode import read

    with pytest.raises(ImageError, match="s3://parts/tree/none.png"):
        read("s3://parts/tree/none.png")


def test_local_paths_may_be_written_as_uris(mvtec_tree, tmp_path):
    assert Folder(f"file://{mvtec_tree}").local == Folder(mvtec_tree).local
    assert Folder(f"file://{tmp_path}/a%20b").local == tmp_path / "a b"


@pytest.fixture(scope="module")
def scored(_ray_session) -> Folder:
    from jobs import score

    config = ScoreConfig(images="s3://parts/tree", out="s3://parts/runs/a", masking="off", shots=2, **ENCODING)
    assert score.run(config, quiet()).done == 12
    return Folder(config.out)


@pytest.mark.thorough
@pytest.mark.usefixtures("_ray_session")
class TestRuns:
    def test_scores_equal_those_of_local_files(self, scored, mvtec_tree, tmp_path):
        from jobs import score

        score.run(ScoreConfig(images=str(mvtec_tree), out=str(tmp_path), masking="off", shots=2, **ENCODING), quiet())
        local = {row["image_id"]: row["score"] for row in tables(Folder(tmp_path), "scores")}
        remote = {row["image_id"]: row["score"] for row in tables(scored, "scores")}
        assert remote == local
        assert all(row["uri"].startswith("s3://parts/tree/") for row in tables(scored, "scores"))

    def test_a_finished_run_is_found_finished(self, scored):
        from jobs import score

        before = {name: read_bytes(scored.uri(name)) for name in scored.files("scores")}
        config = ScoreConfig(images="s3://parts/tree", out="s3://parts/runs/a", masking="off", shots=2, **ENCODING)
        assert score.run(config, quiet()).done == 12
        assert {name: read_bytes(scored.uri(name)) for name in scored.files("scores")} == before
        with pytest.raises(ConfigError, match="other settings"):
            score.run(ScoreConfig(images="s3://parts/tree", out="s3://parts/runs/a", shots=1, **ENCODING), quiet())

    @pytest.mark.slow
    def test_banks_embeddings_and_matches(self, scored, tmp_path):
        from jobs import batched, fit, match, score

        fit.run(FitConfig(images="s3://parts/tree", out="s3://parts/runs/banks", shots=2, masking="off", **ENCODING))
        zero = "s3://parts/runs/zero"
        batched.run(BatchedConfig(images="s3://parts/tree", out=zero, masking="off", **ENCODING), quiet())
        match.run(MatchConfig(embeddings=zero, out=str(tmp_path / "local"), masking="off"), quiet())
        remote = {row["image_id"]: row["score"] for row in tables(Folder(zero), "scores")}
        assert remote == {row["image_id"]: row["score"] for row in tables(Folder(tmp_path / "local"), "scores")}
        config = ScoreConfig(
            embeddings=zero, banks="s3://parts/runs/banks", out="s3://parts/runs/few", masking="off", resolution=64
        )
        score.run(config, quiet())
        few = {row["image_id"]: row["score"] for row in tables(Folder(config.out), "scores")}
        assert few == pytest.approx({row["image_id"]: row["score"] for row in tables(scored, "scores")}, abs=1e-6)

    def test_a_manifest_of_remote_images(self, scored, tmp_path):
        from jobs import score

        lines = [
            "uri,category,split,label",
            "tree/01/train/good/000.png,01,train,good",
            "tree/01/test/spot/000.png,01,test,spot",
        ]
        Folder("s3://parts").write("list.csv", "\n".join(lines).encode())
        summary = score.run(
            ScoreConfig(images="s3://parts/list.csv", out=str(tmp_path), masking="off", **ENCODING), quiet()
        )
        assert summary.done == 1
        (row,) = tables(Folder(tmp_path), "scores")
        assert (row["uri"], row["category"]) == ("s3://parts/tree/01/test/spot/000.png", "01")

    def test_nothing_is_left_in_temporary_folders(self, scored, monkeypatch, tmp_path):
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        import tempfile

        monkeypatch.setattr(tempfile, "tempdir", None)
        with scored.fetched(scored.files("scores")[0]):
            assert list(tmp_path.iterdir())
        assert not list(Path(tmp_path).iterdir())
        assert os.environ["AWS_ENDPOINT_URL"]

    def test_duckdb_reads_what_was_written(self, scored, tmp_path):
        for number, name in enumerate(scored.files("scores")):
            (tmp_path / f"{number}.parquet").write_bytes(read_bytes(scored.uri(name)))
        assert duckdb.sql(f"select count(*) from '{tmp_path}/*.parquet'").fetchall() == [(12,)]
