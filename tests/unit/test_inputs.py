import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from generated import save, textured

from anomalydino_plugin import ConfigError, InputError
from jobs.inputs import choose_references, discover, image_id
from jobs.manifest import is_manifest


def test_tree(mvtec_tree):
    inputs = discover(str(mvtec_tree))
    assert inputs.categories == ("01", "plate top")
    assert len(inputs.images) == 12
    assert [len(records) for records in inputs.references.values()] == [4, 4]
    spot = next(record for record in inputs.images if record.uri.endswith("plate top/test/spot/001.png"))
    assert (spot.label, spot.split) == ("spot", "test")
    assert spot.mask_uri.endswith("ground_truth/spot/001_mask.png")
    good = next(record for record in inputs.images if "/test/good/" in record.uri)
    assert (good.label, good.mask_uri) == ("good", None)


def test_ids_are_the_same_from_the_tree_and_from_the_category(mvtec_tree):
    whole = {record.uri: record.image_id for record in discover(str(mvtec_tree), categories=["01"]).images}
    part = {record.uri: record.image_id for record in discover(str(mvtec_tree / "01")).images}
    assert whole == part
    assert image_id("01", "test/good/000.png") in part.values()


def test_ids_survive_a_move_and_new_files(mvtec_tree, tmp_path):
    import shutil

    before = {record.image_id for record in discover(str(mvtec_tree)).images}
    shutil.copytree(mvtec_tree, tmp_path / "moved")
    save(tmp_path / "moved" / "01" / "test" / "good" / "0.png", textured(1))
    after = {record.image_id for record in discover(str(tmp_path / "moved")).images}
    assert before < after
    assert len(after) == len(before) + 1


def test_flat_folder_with_references(mvtec_tree):
    inputs = discover(str(mvtec_tree / "01" / "test"), references=str(mvtec_tree / "01" / "train" / "good"))
    assert len(inputs.images) == 6
    assert inputs.images[0].label is None
    assert len(inputs.references["test"]) == 4


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_manifest(mvtec_tree, tmp_path, kind):
    rows = {
        "uri": [str(mvtec_tree / "01/train/good/000.png"), str(mvtec_tree / "01/test/spot/000.png")],
        "category": ["01", "01"],
        "split": ["train", "test"],
        "label": ["good", "spot"],
    }
    path = tmp_path / f"manifest.{kind}"
    if kind == "csv":
        lines = [",".join(rows), *(",".join(values) for values in zip(*rows.values(), strict=True))]
        path.write_text("\n".join(lines) + "\n")
    else:
        pq.write_table(pa.table(rows), path)
    inputs = discover(str(path))
    assert [(record.category, record.label) for record in inputs.images] == [("01", "spot")]  # 01 stays text
    assert len(inputs.references["01"]) == 1


def test_manifest_faults(tmp_path):
    path = tmp_path / "manifest.csv"
    path.write_text("file,label\na.png,good\n")
    with pytest.raises(InputError, match=r"columns \['file', 'label'\]: expected 'uri'"):
        discover(str(path))
    path.write_text("uri,label\n,good\n")
    with pytest.raises(InputError, match="no 'uri' in row 1"):
        discover(str(path))
    path.write_text("uri\na.png\na.png\n")
    with pytest.raises(InputError, match="one row for each image"):
        discover(str(path), references=str(tmp_path))
    path.write_text("uri,label\na.png,good\nb.png\n")
    with pytest.raises(InputError, match="Row #3: Expected 2 columns, got 1"):
        discover(str(path))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="manifest ending in"):
        discover(str(tmp_path / "notes.txt"))


def test_nothing_to_score(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        discover(str(tmp_path / "none"))
    with pytest.raises(InputError, match="no images to score"):
        discover(str(tmp_path))
    save(tmp_path / "a" / "test" / "good" / "0.png", textured(0))
    with pytest.raises(InputError, match="'a' has no normal images.*--references.*anomalydino batched"):
        discover(str(tmp_path))
    with pytest.raises(InputError, match="has no images: expected a folder of normal"):
        discover(str(tmp_path), references=str(tmp_path / "none"))
    with pytest.raises(InputError, match="no category 'b'"):
        discover(str(tmp_path), categories=["b"])


def test_official_choice_of_references(mvtec_tree):
    available = discover(str(mvtec_tree)).references["01"]
    names = [record.uri.rsplit("/", 1)[1] for record in choose_references(available, 2, 1, "01")]
    assert names == ["002.png", "003.png"]
    assert choose_references(available, None, 0, "01") == available
    with pytest.raises(InputError, match="needs 6 normal images, found 4"):
        choose_references(available, 3, 1, "01")


@pytest.mark.parametrize("place", ["s3://3:]/b/a.png", "s3://key:hunter2@[x/a.png"])
def test_a_location_that_only_looks_like_a_uri_is_named_by_its_row(tmp_path, place):
    """Found by fuzzing; what the host holds may be a secret, so that it is not repeated."""
    (tmp_path / "list.csv").write_text(f"uri\n{place}\n")
    with pytest.raises(InputError, match=r"row 1: a s3:// location is no URI") as told:
        discover(str(tmp_path / "list.csv"), normal=False)
    assert "hunter2" not in str(told.value)
    with pytest.raises(ConfigError, match="a s3:// location is no URI"):
        discover(place)


@pytest.mark.parametrize("name", ["[x", "a#b.csv", "a?b.csv"])
def test_the_name_of_a_local_manifest_is_no_uri(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "1.png", textured(1))
    file = tmp_path / name
    file.write_text("uri\n1.png\n")
    assert is_manifest(f"//{name}") == name.endswith(".csv")
    if name.endswith(".csv"):
        assert len(discover(str(file), normal=False).images) == 1
