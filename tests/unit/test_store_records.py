"""What the store writes, byte for byte, and what it makes of what it finds."""

import errno
import fcntl
import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from anomalydino_plugin import ConfigError, InputError, ResourceError
from jobs.filesystem import _filesystem, checksum
from jobs.store import KINDS, FileRecord, Store, _shard_number, folder_name


def table(*ids: str) -> pa.Table:
    return pa.table({"image_id": list(ids), "category": ["c"] * len(ids)})


@pytest.fixture
def root(tmp_path):
    return tmp_path / "out"


def names(root) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def claimed(root, stage: str = "score", identity: str = "a", kinds=("scores",), joined=None) -> Store:
    store = Store(root, stage, joined)
    store.claim(identity, kinds, {"k": 1})
    return store


def test_a_claim_is_written_and_read(root):
    store = claimed(root, kinds=("scores", "failures"))
    assert json.loads((root / ".state/score/run.json").read_text()) == {
        "identity": "a",
        "kinds": ["scores", "failures"],
        "settings": {"k": 1},
    }
    assert store.identity() == "a"
    assert store.location == str(root)
    claimed(root, "extract", "b", ("embeddings",))
    assert store.stages() == ["extract", "score"]
    assert Store(root).stages() == ["extract", "score"]


def test_resuming_does_not_write_the_claim_again(root):
    claimed(root)
    file = root / ".state/score/run.json"
    file.write_text(file.read_text().replace('"k": 1', '"k": 2'))
    claimed(root)
    assert json.loads(file.read_text())["settings"] == {"k": 2}


def test_json_is_sorted_indented_and_whole(root):
    Store(root).write_json("x.json", {"b": [1], "a": root})
    assert (root / "x.json").read_text() == f'{{\n  "a": "{root}",\n  "b": [\n    1\n  ]\n}}\n'
    assert Store(root).read_json("x.json") == {"a": str(root), "b": [1]}


def test_an_empty_folder_may_be_claimed_and_a_full_one_not(root):
    root.mkdir()
    claimed(root)
    (root / ".state/score/run.json").unlink()
    (root / "notes.txt").touch()
    with pytest.raises(ConfigError, match="not empty: expected a new or empty folder"):
        claimed(root)


def test_a_folder_with_another_stage_may_hold_other_files(root):
    claimed(root)
    (root / "notes.txt").touch()
    assert claimed(root, "extract", "b", ("embeddings",)).stages() == ["extract", "score"]


def test_files_that_only_look_like_claims_are_none(root):
    claimed(root)
    for name in (".state/run.json", ".state/other/deep/run.json", ".state/other/run.json.txt", ".state/x/norun.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")
    assert Store(root).stages() == ["score"]


def test_who_owns_the_kinds_is_told(root):
    claimed(root, "score", "a", ("failures", "scores", "patch_scores"))
    expected = "holds patch_scores of `anomalydino score` already: give another --out to `anomalydino match`"
    with pytest.raises(ConfigError, match=expected):
        claimed(root, "match", "a", ("scores", "patch_scores", "embeddings"))
    assert claimed(root, "match", "a", ("embeddings",)).stages() == ["match", "score"]


def test_a_folder_that_cannot_be_written_says_why(root):
    root.parent.joinpath("file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write to output folder '.*/file/out': Not a directory\.$"):
        claimed(root.parent / "file" / "out")


def test_an_error_without_a_reason_of_the_system_is_told_whole(root, monkeypatch):
    def broken(*_):
        raise OSError("object store is away")

    monkeypatch.setattr(Store, "write_json", broken)
    with pytest.raises(ConfigError, match=r"cannot write to output folder '.*/out': object store is away\.$"):
        claimed(root)


def test_a_file_in_place_of_the_folder(root):
    root.write_text("")
    with pytest.raises(ConfigError, match=rf"'{root}' is a file"):
        Store(root).stages()


def test_identity_of_a_stage_that_did_not_run(root):
    with pytest.raises(InputError, match="no output of `anomalydino match`"):
        Store(root, "match").identity()


def test_finished_is_what_job_json_says(root):
    store = claimed(root)
    assert store.is_finished() is False
    store.write_json("job.json", {"stages": {"extract": {}}})
    assert store.is_finished() is False
    store.write_json("job.json", {"stages": {"extract": {}, "score": {}}})
    assert store.is_finished() is True


@pytest.mark.parametrize(
    ("category", "folder"), [("a/b", "a%2Fb"), (".hidden", "%2Ehidden"), ("..", "%2E."), ("v1.2", "v1.2"), ("X", "X")]
)
def test_a_category_is_one_folder_that_is_not_hidden(category, folder):
    assert folder_name(category) == folder


def test_an_empty_table_keeps_none_of_the_others_from_their_files(root):
    store = claimed(root, joined={"scores": 2})
    store.commit("c", "000000", {"images": table(), "scores": table("a"), "failures": table("b")}, {})
    assert names(root)[1:] == [
        ".state/score/parts/scores/c/000000.parquet",
        ".state/score/run.json",
        "failures/score-c-000000.parquet",
    ]


def test_a_commit_is_its_files_and_then_its_record(root):
    store = claimed(root)
    tables = {"scores": table("a", "b"), "failures": table("c"), "images": table()}
    store.commit("a/b", "000007", tables, {"done": 2, "failed": 1})
    score, failure = "scores/a%2Fb/000007.parquet", "failures/score-a%2Fb-000007.parquet"
    record = ".state/score/done/a%2Fb/000007.json"
    assert names(root) == [record, ".state/score/run.json", failure, score]
    found = json.loads((root / record).read_text())
    size, sha256 = checksum(root / score)
    assert {key: found[key] for key in ("done", "failed", "category", "shard", "parts")} == {
        "done": 2,
        "failed": 1,
        "category": "a/b",
        "shard": "000007",
        "parts": {},
    }
    assert found["files"][0] == {"kind": "scores", "file": score, "rows": 2, "size": size, "sha256": sha256}
    assert store.record_name("a/b", "000007") == record
    assert store.is_done("a/b", "000007")
    assert not store.is_done("a/b", "000008")
    assert store.done_shards() == {("a%2Fb", "000007")}
    assert store.done() == [found]
    assert [file.kind for file in store.files()] == ["failures", "scores"]
    assert store.files()[1] == FileRecord("scores", score, 2, size, sha256)
    assert store.read("scores", ["image_id"]).to_pydict() == {"image_id": ["a", "b"]}


def test_files_of_all_stages_where_none_is_named(root):
    claimed(root).commit("c", "000000", {"scores": table("a")}, {})
    claimed(root, "extract", "b", ("embeddings",)).commit("c", "000000", {"embeddings": table("a")}, {})
    assert [file.kind for file in Store(root).files()] == ["embeddings", "scores"]
    assert [file.kind for file in Store(root, "extract").files()] == ["embeddings"]
    assert Store(root).read("scores").num_rows == 1


def test_nothing_to_read(root):
    claimed(root).commit("c", "000000", {"scores": table("a")}, {})
    with pytest.raises(InputError, match="no images under"):
        Store(root).read("images")


def test_rows_are_read_file_by_file_in_their_order(root):
    store = claimed(root)
    for shard, ids in (("000001", ["c"]), ("000000", ["a", "b"])):
        store.commit("c", shard, {"scores": table(*ids)}, {})
    assert store.read("scores").column("image_id").to_pylist() == ["a", "b", "c"]


def test_sweeping_names_what_no_record_lists(root):
    store = claimed(root, joined={"scores": 2})
    claimed(root, "extract", "b", ("embeddings",)).commit("c", "000000", {"embeddings": table("a")}, {})
    store.commit("c", "000000", {"scores": table("a"), "failures": table("b")}, {})
    kept = names(root)
    left = [
        ".state/score/parts/scores/c/000001.parquet",
        *(f"{kind}/c/000009.parquet" for kind in KINDS),
        "banks/c.safetensors.1.tmp",
    ]
    for name in [*left, "scores/c/notes.txt", "banks/c.safetensors", "report.html"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    assert sorted(store.sweep()) == sorted(left)
    assert names(root) == sorted([*kept, "scores/c/notes.txt", "banks/c.safetensors", "report.html"])
    assert store.sweep() == []


def test_parts_of_several_shards_are_joined(root):
    store = claimed(root, joined={"scores": 3})
    for shard in ("000002", "000000", "000004"):
        store.commit("c", shard, {"scores": table(shard), "failures": table()}, {})
    store.commit("b", "references", {"scores": table("r")}, {})
    part = ".state/score/parts/scores/c/{}.parquet"
    assert pq.read_table(root / part.format("000002")).num_rows == 1
    assert store.done()[0]["parts"] == {"scores": ".state/score/parts/scores/b/references.parquet"}
    assert store.done()[0]["files"] == []
    waiting = store.unjoined()
    assert waiting == [
        ("scores", "b", "000000-000002", [".state/score/parts/scores/b/references.parquet"]),
        ("scores", "c", "000000-000002", [part.format("000000"), part.format("000002")]),
        ("scores", "c", "000003-000005", [part.format("000004")]),
    ]
    store.join(*waiting[1])
    file = "scores/c/000000-000002.parquet"
    size, sha256 = checksum(root / file)
    written = json.loads((root / ".state/score/files/scores/c/000000-000002.json").read_text())
    assert written == {
        **{"kind": "scores", "file": file, "rows": 2, "size": size, "sha256": sha256},
        **{"category": "c", "parts": waiting[1][3]},
    }
    assert store.unjoined() == [waiting[0], waiting[2]]
    store.drop_parts()  # two files wait: nothing goes
    assert (root / part.format("000000")).is_file()
    assert store.files() == [FileRecord("scores", file, 2, size, sha256)]
    store.join(*waiting[0])
    store.join(*waiting[2])
    store.drop_parts()
    assert not list((root / ".state/score/parts").rglob("*.parquet"))
    assert store.read("scores").column("image_id").to_pylist() == ["r", "000000", "000002", "000004"]


def test_one_shard_in_a_file_needs_no_joining(root):
    store = claimed(root, joined={"scores": 1})
    store.commit("c", "000000", {"scores": table("a")}, {})
    assert store.unjoined() == []
    assert store.done()[0]["parts"] == {}


def test_parts_of_a_run_that_joined_are_found_without_its_settings(root):
    claimed(root, joined={"scores": 3}).commit("c", "000002", {"scores": table("a")}, {})
    ((kind, category, name, _),) = Store(root, "score").unjoined()
    assert (kind, category, name) == ("scores", "c", "000002-000002")


@pytest.mark.parametrize(("shard", "number"), [("000000", 0), ("000012", 12), ("references", 0), ("-1", 0)])
def test_numbers_of_shards(shard, number):
    assert _shard_number(shard) == number


def test_the_lock_is_taken_and_given_back(root):
    store = Store(root, "score")
    with store.exclusive():
        assert (root / ".state/score/lock").is_file()
        with Store(root, "extract").exclusive():  # another stage
            pass
        with (root / ".state/score/lock").open("w") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (root / ".state/score/lock").open("w") as file:
        assert fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) is None


def test_the_lock_may_be_taken_again(root):
    taken = 0
    for _ in range(2):
        with Store(root, "score").exclusive():
            taken += 1
    assert taken == 2


@pytest.mark.parametrize(("number", "reason"), [(errno.EROFS, "Read-only file system"), (errno.EIO, None)])
def test_a_lock_that_cannot_be_written_says_why(root, monkeypatch, number, reason):
    def refuse(*_, **__):
        raise OSError(number, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError if reason is None else ResourceError) as found, Store(root, "score").exclusive():
        pass
    assert reason is None or str(found.value) == (
        f"cannot write to {str(root)!r}: Read-only file system. Make it writable. What is committed stays. Repeat the "
        "command to go on."
    )


def test_a_folder_without_locks_goes_without(root, monkeypatch):
    def no_locks(*_):
        raise OSError("not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    entered = False
    with Store(root, "score").exclusive():
        entered = True
    assert entered


@pytest.fixture
def remote(tmp_path):
    """A folder behind a scheme of its own, as fsspec's packages bring them."""

    class Shelf(DirFileSystem):
        cachable = False

        def __init__(self):
            super().__init__(path=str(tmp_path), fs=LocalFileSystem(auto_mkdir=True))

    fsspec.register_implementation("shelf", Shelf, clobber=True)
    _filesystem.cache_clear()
    return "shelf://out"


def test_the_same_on_another_filesystem(remote):
    store = Store(remote, "score", {"failures": 2})
    with store.exclusive():
        store.claim("a", ("scores", "failures"), {})
        for shard in ("000000", "000001"):
            store.commit("c", shard, {"scores": table(shard), "failures": table(shard)}, {})
    assert [record["shard"] for record in store.done()] == ["000000", "000001"]
    ((kind, category, name, parts),) = store.unjoined()
    store.join(kind, category, name, parts)
    store.drop_parts()
    assert store.sweep() == []
    assert [file.file for file in store.files()] == [
        "failures/score-c-000000-000001.parquet",
        "scores/c/000000.parquet",
        "scores/c/000001.parquet",
    ]
    assert store.read("failures").column("image_id").to_pylist() == ["000000", "000001"]
    with pytest.raises(ConfigError, match="other settings"):
        Store(remote, "score").claim("b", ("scores",), {})
