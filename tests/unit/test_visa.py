"""VisA's two layouts load to the same images, labels, masks and reference images."""

import numpy as np
import pytest
from generated_visa import HEADER, make_visa

from anomalydino_plugin import InputError
from jobs.inputs import choose_references, discover


@pytest.fixture(scope="module")
def visa(tmp_path_factory):
    """One category in both layouts: (as downloaded, one-class)."""
    original, one_class = tmp_path_factory.mktemp("VisA"), tmp_path_factory.mktemp("1cls")
    make_visa(original, one_class)
    return original, one_class


def names(records):
    return sorted(
        (r.category, r.split, r.label, r.uri.rsplit("/", 1)[1], (r.mask_uri or "/").rsplit("/", 1)[1]) for r in records
    )


def test_both_layouts_hold_the_same(visa):
    original, one_class = (discover(str(root)) for root in visa)
    assert names(original.images) == names(one_class.images)
    assert [(r.label, r.mask_uri is None) for r in sorted(original.images, key=lambda r: r.uri)] == [
        *[("bad", False)] * 2,
        *[("good", True)] * 2,
    ]
    for seed in (0, 1, 2):
        chosen = [choose_references(found.references["pcb1"], 1, seed, "pcb1") for found in (original, one_class)]
        assert names(chosen[0]) == names(chosen[1])


def test_the_split_file_itself_may_be_given(visa, monkeypatch):
    root = visa[0]
    whole = discover(str(root))
    assert discover(str(root / "split_csv" / "1cls.csv")) == whole
    monkeypatch.chdir(root)
    assert discover("split_csv/1cls.csv") == whole


def test_masks_are_read_whatever_their_values(visa):
    from jobs.truth import read_mask

    both = [
        [read_mask(r.mask_uri, (96, 96)) for r in sorted(discover(str(root)).images, key=lambda r: r.uri) if r.mask_uri]
        for root in visa
    ]
    assert np.array_equal(*both)
    assert both[0][0].sum() == 81


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("pcb1,valid,normal,pcb1/a.JPG,", "row 1: object 'pcb1', split 'valid'"),
        ("pcb1,test,good,pcb1/a.JPG,", "label 'good'; expected"),
        ("pcb1,test,normal,../a.JPG,", "row 1: file '../a.JPG', expected a path inside"),
        ("pcb1,test,normal,,", "row 1: file ''"),
    ],
)
def test_rows_that_are_not_visas_are_refused(tmp_path, row, message):
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv" / "1cls.csv").write_text(f"{HEADER}\n{row}\n")
    with pytest.raises(InputError, match=message):
        discover(str(tmp_path))


def test_another_table_is_refused(tmp_path):
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv" / "1cls.csv").write_text("uri\na.png\n")
    with pytest.raises(InputError, match=r"has columns \['uri'\]: expected"):
        discover(str(tmp_path))
