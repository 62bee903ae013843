"""Every kind of damage is found, named, and nothing else with it."""

import copy
import hashlib
import json
import shutil

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch

from anomalydino_plugin import Detection, Geometry, InputError, MemoryBank
from jobs import schema, tables, verify_banks, verify_files
from jobs.bank_builder import write_bank
from jobs.cli import main
from jobs.decode import Failure
from jobs.inputs import ImageRecord, image_id
from jobs.parquet import write_tables
from jobs.stage import write_job
from jobs.store import FileRecord, Store
from jobs.verify import verify
from jobs.verify_findings import Findings
from jobs.verify_records import ListedFile, StageRecords

PLAN = Geometry((20, 30), (28, 42), (2, 3), (1.0, 1.0))
CATEGORIES = ("01", "plate top")
THRESHOLD = 0.15
KINDS = ["images", "scores", "patch_scores", "embeddings"]
FILES = 2 * (1 + 2 * 4) + 1 + 2  # references and two shards of each category, one failure, two banks


def a_bank(category: str) -> MemoryBank:
    return MemoryBank(
        torch.nn.functional.normalize(torch.ones(6, 8), dim=1),
        torch.tensor([[0, 0, row, column] for row in range(2) for column in range(3)], dtype=torch.int32),
        torch.ones(6, dtype=torch.bool),
        (image_id(category, "train/good/0.png"),),
        (0.0,),
        ((20, 30),),
        {"weights": "random:0"},
    )


def record(category: str, number: int, split: str = "test") -> ImageRecord:
    name = f"{split}/good/{number}.png"
    return ImageRecord(image_id(category, name), f"/x/{category}/{name}", category, split, "good")


def shard_tables(category: str, first: int, failed: bool, plan: Geometry = PLAN) -> dict[str, pa.Table]:
    """Two images, the first one's first patch masked, and perhaps one that failed."""
    rng = np.random.default_rng(first)
    records = sorted(record(category, number) for number in (first, first + 1))
    scored = []
    for place, own in enumerate(records):
        foreground, matched = np.ones(plan.grid, bool), rng.integers(0, 6, plan.grid)
        distances = rng.random(plan.grid, np.float32)
        if place == 0:
            foreground[0, 0], matched[0, 0], distances[0, 0] = False, -1, 0
        detection = Detection(0.1 + 0.1 * place, distances, foreground, matched, plan)
        scored.append(tables.Scored(own, detection, rng.standard_normal((distances.size, 8)).astype(np.float32)))
    failures = [Failure(record(category, 99), "decode", "ImageError", "cannot decode")] if failed else []
    return {
        "images": tables.scored_images(scored, failures),
        "scores": tables.scores_table(scored, THRESHOLD, "max", masked=True),
        "patch_scores": tables.patch_scores_table(scored, tables.bank_source(a_bank(category))),
        "embeddings": tables.scored_embeddings(scored, 8, "float32"),
        "failures": tables.failures_table(failures),
    }


def fit(out) -> None:
    store = Store(out, "fit")
    store.claim("f", ["banks"], {"category": None})
    for category in CATEGORIES:
        summary = {
            "references": [record(category, 0, "train").uri],
            "rows": 6,
            "sha256": write_bank(store, category, a_bank(category)),
            "fingerprint": a_bank(category).fingerprint,
        }
        rows = {"images": tables.reference_images([record(category, 0, "train")], [PLAN])}
        store.commit(category, "references", rows, {"bank": summary})
    write_job(store, {"counts": {"images": 2, "done": 0, "failed": 0}, "weights_sha256": "random:0"})


def finished(out, change=None, joined=None, finish=True):
    """A run as ``anomalydino score`` leaves it; ``change`` edits the tables of the first shard of "01"."""
    fit(out)
    store = Store(out, "score", joined)
    store.claim("s", KINDS, {"category": None, "banks": None, "embedding_dtype": "float32"})
    for category in CATEGORIES:
        for shard in range(2):
            failed = (category, shard) == ("01", 1)
            rows = shard_tables(category, 2 * shard, failed)
            if change is not None and (category, shard) == ("01", 0):
                rows = {**rows, **change(rows)}
            store.commit(category, f"{shard:06d}", rows, {"done": 2, "failed": int(failed), "seconds": 0.1})
    if finish:
        for item in store.unjoined():
            store.join(*item)
        store.drop_parts()
        write_job(store, {"counts": {"images": 9, "done": 8, "failed": 1}, "weights_sha256": "random:0"})
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("whole") / "out")


@pytest.fixture
def out(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "out")


def found(out) -> list[str]:
    return list(map(str, verify(str(out)).problems))


def only(out) -> str:
    """The one problem there is."""
    lines = found(out)
    assert len(lines) == 1, lines
    return lines[0]


def column(table: pa.Table, name: str, values: list) -> pa.Table:
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))


def edited(kind: str, name: str, edit):
    """A change of a table: ``edit`` changes a column's list of values."""

    def change(rows):
        values = rows[kind][name].to_pylist()
        edit(values)
        return {kind: column(rows[kind], name, values)}

    return change


def test_a_whole_run(whole, capsys):
    report = verify(str(whole))
    assert report.problems == report.notes == []
    assert report.files == FILES
    assert report.images == 9
    assert report.rows == 2 + 9 + 8 + 2 * 8 * 6 + 1
    assert main(["verify", str(whole)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{FILES} files, 116 rows, 9 images: nothing wrong"


def test_joined_files(tmp_path):
    out = finished(tmp_path / "out", joined=dict.fromkeys([*KINDS, "failures"], 2))
    assert (out / "scores" / "01" / "000000-000001.parquet").is_file()
    assert found(out) == []


def test_problems_are_listed_with_exit_code_1(out, capsys):
    (out / "scores" / "01" / "000000.parquet").unlink()
    assert main(["verify", str(out)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("scores/01/000000.parquet: not there; expected 2 rows of scores") for line in lines)
    assert "1 problem(s)" in lines[-1]


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_a_folder_that_is_no_run(tmp_path, kind, capsys):
    place = tmp_path / "place"
    if kind != "missing":
        place.mkdir() if kind == "empty" else place.touch()
    with pytest.raises(InputError, match="no run under .*expected the --out folder"):
        verify(str(place))
    assert main(["verify", str(place)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


# Files


@pytest.mark.parametrize("kind", [*KINDS, "failures"])
def test_truncated_file(out, kind):
    path = sorted((out / kind).rglob("*.parquet"))[0]
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{size - 100} bytes; expected {size} bytes" in only(out)


@pytest.mark.parametrize("kind", [*KINDS, "failures"])
def test_flipped_byte(out, kind):
    path = sorted((out / kind).rglob("*.parquet"))[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    assert "its content was changed" in only(out)


@pytest.mark.parametrize("kind", [*KINDS, "failures"])
def test_deleted_file(out, kind):
    sorted((out / kind).rglob("*.parquet"))[0].unlink()
    assert "not there" in only(out)


def test_a_file_that_was_written_damaged(out):
    """Record and content agree, yet it is no Parquet file."""
    path = out / "patch_scores" / "01" / "000000.parquet"
    state = out / ".state" / "score" / "done" / "01" / "000000.json"
    content = json.loads(state.read_text())
    (entry,) = (file for file in content["files"] if file["kind"] == "patch_scores")
    path.write_bytes(b"PAR1 this is none")
    entry.update(size=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    state.write_text(json.dumps(content))
    assert "cannot be read as Parquet" in only(out)


@pytest.mark.parametrize(
    "name", ["scores/01/extra.parquet", "failures/old.parquet", "banks/02.safetensors", "images/a"]
)
def test_extra_file(out, name):
    (out / name).parent.mkdir(exist_ok=True, parents=True)
    (out / name).write_bytes(b"x")
    assert only(out).startswith(f"{name}: a file that no record lists")


def test_what_others_put_beside_is_left_alone(out):
    (out / "metrics.json").write_text("{}")
    (out / "gallery").mkdir()
    (out / "gallery" / "a.png").touch()
    assert found(out) == []


@pytest.mark.parametrize("folder", ["scores/01", ".state/score/done/01", "banks"])
def test_temporary_file_left(out, folder):
    (out / folder / ".000000.parquet.1.abc.tmp").touch()
    assert "a temporary file of an interrupted run" in only(out)


def test_parts_left(out):
    place = out / ".state" / "score" / "parts" / "scores" / "01"
    place.mkdir(parents=True)
    (place / "000000.parquet").touch()
    assert "a small file that was joined" in only(out)


@pytest.mark.parametrize(
    ("alter", "expected"),
    [
        (
            lambda table: table.replace_schema_metadata({"anomalydino_schema_version": "2"}),
            "schema version 2; expected",
        ),
        (lambda table: table.replace_schema_metadata(None), "schema version none; expected version 1"),
        (
            lambda table: table.set_column(4, "score", table["score"].cast(pa.float64())),
            "columns score: double; expected score: float not null",
        ),
        (lambda table: table.drop_columns(["statistic"]), "expected statistic: string not null"),
    ],
)
def test_schema(tmp_path, alter, expected):
    assert expected in only(finished(tmp_path / "out", lambda rows: {"scores": alter(rows["scores"])}))


@pytest.mark.parametrize(("width", "dtype"), [(4, "float32"), (8, "float16")])
def test_width_and_type_of_embeddings(tmp_path, width, dtype):
    def change(rows):
        item = rows["embeddings"]
        values = pa.array(np.zeros(item.num_rows * width, dtype))
        own = schema.embeddings(width, dtype)
        vectors = pa.FixedSizeListArray.from_arrays(values, type=own.field("embedding").type)
        return {"embeddings": pa.Table.from_arrays([*item.columns[:-1], vectors], schema=own)}

    # Width is the run's: where job.json does not say, the first file's, so that the others differ.
    lines = found(finished(tmp_path / "out", change))
    assert lines
    assert all("embedding: fixed_size_list" in line for line in lines)


# Records


@pytest.mark.parametrize("joined", [None, dict.fromkeys(KINDS, 2)])
def test_unfinished_stage(tmp_path, joined):
    """Only that is said: rows that are not there yet are no damage."""
    out = finished(tmp_path / "out", joined=joined, finish=False)
    assert "stage 'score' is not finished (4 shards are)" in only(out)


@pytest.mark.parametrize("name", [".state/score/run.json", ".state/score/done/01/000000.json", "job.json"])
@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}'])
def test_damaged_records(out, name, content):
    (out / name).write_text(content)
    assert any(line.startswith(f"{name}: cannot be read") for line in found(out))


def test_a_shard_is_gone(out):
    """Its record and all its files: counts tell."""
    for path in (*out.rglob("plate*/000001.parquet"), *out.rglob("plate*/000001.json")):
        path.unlink()
    assert found(out) == [
        "job.json: stage 'score' with images=9; expected 7, as its shards say",
        "job.json: stage 'score' with done=8; expected 6, as its shards say",
    ]


def test_a_shard_that_no_joined_file_holds(tmp_path):
    out = finished(tmp_path / "out", joined={"scores": 2})
    (out / ".state" / "score" / "files" / "scores" / "01" / "000000-000001.json").unlink()
    lines = found(out)
    assert any("2 small files of finished shards that no joined file holds" in line for line in lines)
    assert any(line.startswith("scores/01/000000-000001.parquet: a file that no record lists") for line in lines)
    assert any(line.startswith("scores/01: 4 done images without rows") for line in lines)


# Images


def test_doubled_image(tmp_path):
    def change(rows):
        return {"images": pa.concat_tables([rows["images"], rows["images"].slice(0, 1)])}

    lines = found(finished(tmp_path / "out", change))
    name = min(record("01", number).image_id for number in (0, 1))
    assert lines == [
        f"images/01/000000.parquet: 1 images that have a row already (first: {name}); expected one row for each image",
        "images/01: 6 rows of score in category '01'; expected 5, as its completion records say",
    ]


def test_missing_image(tmp_path):
    lines = found(finished(tmp_path / "out", lambda rows: {"images": rows["images"].slice(1)}))
    assert "images/01: 4 rows of score in category '01'; expected 5, as its completion records say" in lines
    for kind in ("scores", "patch_scores", "embeddings"):
        assert any(line.startswith(f"{kind}/01/000000.parquet: 1 images that images/ does not list") for line in lines)


def test_an_id_in_two_categories(tmp_path):
    def change(rows):
        twin = record("plate top", 0).image_id
        ids = dict.fromkeys(rows["images"]["image_id"].to_pylist()[:1], twin)
        return {
            kind: column(table, "image_id", [ids.get(name, name) for name in table["image_id"].to_pylist()])
            for kind, table in rows.items()
            if kind != "failures"
        }

    assert "images: 1 ids in several categories" in only(finished(tmp_path / "out", change))


def test_wrong_category_folder(tmp_path):
    """Rows of one category under another's folder."""
    change = edited("scores", "category", lambda values: values.__setitem__(0, "plate top"))
    assert only(finished(tmp_path / "out", change)).startswith(
        "scores/01/000000.parquet: 1 rows of category 'plate top'"
    )


def test_a_file_under_another_folder(out):
    (out / "scores" / "other").mkdir()
    (out / "scores" / "01" / "000000.parquet").rename(out / "scores" / "other" / "000000.parquet")
    state = out / ".state" / "score" / "done" / "01" / "000000.json"
    state.write_text(
        state.read_text().replace("scores/01/", "scores/other/").replace("patch_scores/other", "patch_scores/01")
    )
    assert only(out) == "scores/other/000000.parquet: a file of category '01'; expected it under scores/01/"


def test_status_that_the_stage_does_not_write(tmp_path):
    change = edited("images", "status", lambda values: values.__setitem__(0, "extracted"))
    assert "1 images with status 'extracted'" in only(finished(tmp_path / "out", change))


def test_failures_and_failed_images_belong_together(tmp_path):
    made_up = tables.failures_table([Failure(record("01", 0), "decode", "ImageError", "x")])
    lines = found(finished(tmp_path / "one", lambda rows: {"failures": made_up}))
    assert any("images that images/ does not list as failed" in line for line in lines)

    def failed(rows):
        status = rows["images"]["status"].to_pylist()
        return {"images": column(rows["images"], "status", ["failed", *status[1:]])}

    lines = found(finished(tmp_path / "two", failed))
    assert any(line.startswith("failures/ (category '01'): 1 failed images without rows") for line in lines)


# Scores


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("is_anomalous", True, "1 wrong verdicts"),
        ("is_anomalous", None, "1 wrong verdicts"),
        ("score", float("nan"), "1 scores or thresholds that are not finite"),
        ("threshold", float("inf"), "1 scores or thresholds that are not finite"),
        ("normalised_score", 0.9, "1 wrong normalised scores"),
        ("mode", "musc", "1 rows with mode 'musc'"),
    ],
)
def test_wrong_scores(tmp_path, name, value, expected):
    change = edited("scores", name, lambda values: values.__setitem__(0, value))
    assert expected in only(finished(tmp_path / "out", change))


def test_missing_and_doubled_scores(tmp_path):
    lines = found(finished(tmp_path / "one", lambda rows: {"scores": rows["scores"].slice(1)}))
    assert any(line.startswith("scores/01: 1 done images without rows") for line in lines)
    twice = found(finished(tmp_path / "two", lambda rows: {"scores": pa.concat_tables([rows["scores"]] * 2)}))
    assert any("2 images that have rows already" in line for line in twice)


# Patches


@pytest.mark.parametrize("kind", ["patch_scores", "embeddings"])
def test_missing_patch_rows(tmp_path, kind):
    line = only(finished(tmp_path / "one", lambda rows: {kind: rows[kind].slice(1)}))
    assert line.startswith(f"{kind}/01/000000.parquet: 1 images with too few or too many patch rows")
    assert "with 5 instead of 6" in line
    assert only(finished(tmp_path / "two", lambda rows: {kind: rows[kind].slice(6)})).startswith(
        f"{kind}/01: 1 done images without rows"
    )


@pytest.mark.parametrize("kind", ["patch_scores", "embeddings"])
def test_patches_out_of_order(tmp_path, kind):
    def change(rows):
        return {kind: rows[kind].take([1, 0, *range(2, 12)])}

    assert "patches missing, doubled or out of order" in only(finished(tmp_path / "out", change))


@pytest.mark.parametrize(
    ("name", "row", "value", "expected"),
    [
        ("distance", 1, 2.5, "1 distances that are not in [0, 2]"),
        ("distance", 1, float("nan"), "1 distances that are not in [0, 2]"),
        ("distance", 0, 0.5, "1 masked patches with a distance"),
        ("match_row", 0, 1, "1 masked patches with a match"),
        ("match_rotation", 1, None, "1 patches without a match that are not masked"),
        ("match_image_id", 1, "nobody", "1 matches that name no row of images"),
        ("match_col", 1, 3, "1 matches outside the patch grid"),
    ],
)
def test_wrong_patch_scores(tmp_path, name, row, value, expected):
    change = edited("patch_scores", name, lambda values: values.__setitem__(row, value))
    assert expected in only(finished(tmp_path / "out", change))


def test_embeddings_that_are_not_finite(tmp_path):
    def change(rows):
        values = rows["embeddings"]["embedding"].to_pylist()
        values[3][2] = float("nan")
        return {"embeddings": column(rows["embeddings"], "embedding", values)}

    assert "1 embeddings that are not finite" in only(finished(tmp_path / "out", change))


# Banks


def test_damaged_bank(out):
    path = out / "banks" / "01.safetensors"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    assert "its content was changed" in only(out)
    path.unlink()
    assert only(out).startswith("banks/01.safetensors: not there")


@pytest.mark.parametrize("cut", [0.3, 0.9])
def test_bank_that_does_not_load(out, cut):
    """Without a checksum in its record, as a bank from elsewhere has none."""
    forget(out, "sha256")
    path = out / "banks" / "01.safetensors"
    path.write_bytes(path.read_bytes()[: int(cut * path.stat().st_size)])
    assert "banks/01.safetensors: cannot be read" in only(out)


def test_bank_of_another_run(out):
    forget(out, "sha256")
    bank = a_bank("plate top")
    write_bank(
        Store(out, "fit"),
        "01",
        MemoryBank(
            bank.rows[:4] * 2,
            *[getattr(bank, name)[:4] for name in ("sources", "foreground")],
            bank.image_ids,
            bank.angles,
            bank.sizes,
            {"weights": "other"},
        ),
    )
    lines = "\n".join(found(out))
    for part in (
        "4 rows; expected 6",
        "fingerprint {'weights': 'other'}; expected {'weights': 'random:0'}",
        "not of length 1",
        "made with weights other; expected random:0",
        "reference images that only the bank or only images/ has",
    ):
        assert part in lines


def forget(out, key):
    state = out / ".state" / "fit" / "done" / "01" / "references.json"
    content = json.loads(state.read_text())
    del content["bank"][key]
    state.write_text(json.dumps(content))


# Other stages


def mutual(out, extracted=None, masking_test=True):
    """What ``extract`` and ``match`` leave, in one folder or two."""
    source = Store(extracted or out, "extract")
    source.claim("e", ["images", "embeddings"], {"category": None, "embedding_dtype": "float32"})
    rows = shard_tables("01", 0, failed=True)
    images = rows["images"]
    status = ["extracted" if value == "scored" else value for value in images["status"].to_pylist()]
    own = {"images": column(images, "status", status), "embeddings": rows["embeddings"], "failures": rows["failures"]}
    source.commit("01", "000000", own, {"done": 2, "failed": 1, "seconds": 0.1})
    write_job(source, {"counts": {"images": 3, "done": 2, "failed": 1}, "embedding_width": 8})

    ids = rows["scores"]["image_id"].to_pylist()
    matched = [
        None if name is None else ids[1 - ids.index(own)]
        for own, name in zip(
            *(rows["patch_scores"][key].to_pylist() for key in ("image_id", "match_image_id")), strict=True
        )
    ]
    store = Store(out, "match")
    apart = {"images": images.filter(pc.field("status") == "scored")} if extracted else {}
    store.claim("m", ["scores", "patch_scores", *apart], {"category": ["01"], "embeddings": str(extracted or out)})
    scores = column(rows["scores"], "mode", ["official"] * 2)
    for name in ("threshold", "is_anomalous", "normalised_score"):
        scores = column(scores, name, [None] * 2)
    result = {"scores": scores, "patch_scores": column(rows["patch_scores"], "match_image_id", matched), **apart}
    store.commit("01", "000000", result, {"done": 2, "failed": 0, "seconds": 0.1})
    write_job(store, {"counts": {"images": 2, "done": 2, "failed": 0}})
    return out


def test_batched_zero_shot(tmp_path):
    assert found(mutual(tmp_path / "one")) == []
    assert found(mutual(tmp_path / "two", tmp_path / "extracted")) == []
    assert found(tmp_path / "extracted") == []


def test_an_image_matched_to_itself(tmp_path):
    out = mutual(tmp_path / "out")
    store = Store(out, "match")
    rows = store.read("patch_scores").replace_schema_metadata(schema.PATCH_SCORES.metadata)
    own = [
        None if name is None else own
        for own, name in zip(rows["image_id"].to_pylist(), rows["match_image_id"].to_pylist(), strict=True)
    ]
    tables_ = {"scores": store.read("scores"), "patch_scores": column(rows, "match_image_id", own)}
    store.commit("01", "000000", tables_, {"done": 2, "failed": 0, "seconds": 0.1})
    assert "11 patches matched to their own image" in only(out)


def test_banks_elsewhere(tmp_path, whole):
    """Matches are checked against the images of the banks' folder, as long as that is there."""
    out, banks = tmp_path / "out", tmp_path / "banks"
    shutil.copytree(whole, out)
    fit(banks)
    shutil.rmtree(out / "banks")
    shutil.rmtree(out / ".state" / "fit")
    for path in out.glob("images/*/references.parquet"):
        path.unlink()
    state = out / ".state" / "score" / "run.json"
    content = json.loads(state.read_text())
    content["settings"]["banks"] = str(banks)
    state.write_text(json.dumps(content))
    assert found(out) == []
    shutil.rmtree(banks)
    report = verify(str(out))
    assert report.problems == []
    assert "not checked: matches of category '01'" in report.notes[0]


# Memory, and what readers can skip


def many(path, images: int = 40) -> list[str]:
    """A file of three row groups and more: 1,600 patches an image."""
    plan = Geometry((20, 30), (28, 42), (32, 50), (1.0, 1.0))
    parts = [shard_tables("01", 2 * number, failed=False, plan=plan)["embeddings"] for number in range(images // 2)]
    rows = pa.concat_tables(parts).sort_by(
        [("image_id", "ascending"), ("patch_row", "ascending"), ("patch_col", "ascending")]
    )
    write_tables(path, [rows])
    return sorted(set(rows["image_id"].to_pylist()))


def test_one_row_group_is_in_memory_at_a_time(tmp_path, monkeypatch):
    path = tmp_path / "e.parquet"
    many(path)
    read = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        verify_files.pq.ParquetFile, "read_row_group", lambda *a, **k: read.append(a[1]) or original(*a, **k)
    )
    monkeypatch.delattr(verify_files.pq, "read_table")
    store = Store(tmp_path / "out", "extract")
    store.claim("e", ["embeddings"], {})
    with store.folder.writing("embeddings/01/000000.parquet") as target:
        shutil.copyfile(path, target)
    written = verify_files.checksum(path)
    listed = ListedFile("extract", "01", FileRecord("embeddings", "embeddings/01/000000.parquet", 64000, *written))
    stage = StageRecords("extract", ("embeddings",), {}, (), (), None)
    groups = verify_files.FileChecker(store.folder, [stage], Findings()).row_groups(listed)
    for number, table in enumerate(groups):
        assert read == list(range(number + 1))  # the next one is read when this one is done with
        assert table.num_rows <= 11 * 1600
    assert len(read) == 4


@pytest.mark.parametrize("name", ["image_id", "category"])
def test_row_groups_can_be_skipped_by_id_and_category(tmp_path, name):
    """Statistics of every row group say which images and which category it holds."""
    ids = many(tmp_path / "e.parquet")
    other = shard_tables("plate top", 0, failed=False)["embeddings"]
    write_tables(tmp_path / "other.parquet", [other])
    data = ds.dataset([tmp_path / "e.parquet", tmp_path / "other.parquet"])
    wanted, groups = (ids[-1], 1) if name == "image_id" else ("plate top", 1)
    kept = [len(fragment.split_by_row_group(ds.field(name) == wanted)) for fragment in data.get_fragments()]
    assert sum(kept) == groups
    assert sum(len(fragment.row_groups) for fragment in data.get_fragments()) == 5


def test_duckdb_pushes_filters_into_the_scan(tmp_path):
    ids = many(tmp_path / "e.parquet")
    query = f"from '{tmp_path}/*.parquet' where category = '01' and image_id = '{ids[-1]}'"
    plan = "".join(row[1] for row in duckdb.sql(f"explain select count(*) {query}").fetchall())
    assert "Filters" in plan
    assert "FILTER" not in plan  # no operator of its own: the scan drops row groups by their statistics
    names = duckdb.sql(
        f"select row_group_id, stats_min_value, stats_max_value from parquet_metadata('{tmp_path}/e.parquet') "
        "where path_in_schema = 'image_id' order by 1"
    ).fetchall()
    assert len(names) == 4
    assert sum(low <= ids[-1] <= high for _, low, high in names) == 1
    assert duckdb.sql(f"select count(*) {query}").fetchall() == [(1600,)]


@pytest.fixture
def bucket(monkeypatch):
    """An S3-compatible server that the test starts."""
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    fs.S3FileSystem(endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True).create_dir("runs")
    yield "s3://runs"
    server.stop()


def test_a_run_on_an_object_store(bucket):
    out = finished(f"{bucket}/some run", joined={"scores": 2})
    assert verify(out).problems == []
    folder = Store(out).folder
    folder.remove("patch_scores/01/000000.parquet")
    content = bytearray(folder.read("embeddings/01/000001.parquet"))
    content[100] ^= 1
    folder.write("embeddings/01/000001.parquet", bytes(content))
    folder.write("images/01/more.parquet", b"x")
    lines = sorted(map(str, verify(out).problems))
    assert len(lines) == 3
    for line, start in zip(
        lines, ("embeddings/01/000001.parquet: sha256", "images/01/more", "patch_scores/01/000000"), strict=True
    ):
        assert line.startswith(start)
    for place in (f"{bucket}/nothing", "s3://no-such-bucket/out"):
        with pytest.raises(InputError):
            verify(place)


def test_provenance_of_another_shape_or_of_no_image(out):
    path = sorted((out / "banks").rglob("*.safetensors"))[0]
    bank = MemoryBank.load(path)
    findings = Findings()
    for sources in (bank.sources[:, :3], bank.sources + 1):
        changed = copy.copy(bank)
        object.__setattr__(changed, "sources", sources)  # a bank does not let itself be made so
        verify_banks._check_content("b", changed, {"rows": len(bank)}, findings)
    lines = "\n".join(map(str, findings.problems))
    assert "provenance (6, 3), foreground (6,); expected a row each" in lines
    assert "provenance that names no image or angle" in lines


def test_an_image_without_a_grid(tmp_path):
    out = finished(tmp_path / "out", edited("images", "grid_rows", lambda values: values.__setitem__(0, None)))
    assert any("images without size or patch grid" in line for line in found(out))


def test_a_job_file_of_another_schema(out):
    path = out / "job.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "schema_version": "0"}))
    assert any("schema_version '0' instead of" in line for line in found(out))


def test_a_file_of_other_rows_than_its_record_says(out):
    record_file = next((out / ".state" / "score" / "done" / "01").glob("*.json"))
    content = json.loads(record_file.read_text())
    for entry in content["files"]:
        entry["rows"] += 1
    record_file.write_text(json.dumps(content))
    assert any("rows; expected" in line for line in found(out))
