"""`anomalydino report` without a browser: what is read, drawn and written."""

import base64
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from generated_run import ANGLE, HOT, MATCHED, PATCH, RESOLUTION, SIZE, THRESHOLD, Made, make_run
from PIL import Image
from rich.console import Console

from anomalydino_plugin import ConfigError, InputError, plan_geometry, read_image, rotate_image
from jobs.cli import main
from jobs.config import ReportConfig
from jobs.evaluate import evaluate
from jobs.patch_reader import read_patches
from jobs.report import command, curves, thumbnails
from jobs.report.drawing import Drawer, _truth
from jobs.run_geometry import RunGeometry
from jobs.run_records import choose, judgement, read_run
from jobs.store import Store

HOSTILE = (
    "<script>alert(1)</script>.png".replace("/", "\u2215"),
    "\"onload='x' &amp; quote.png",
    "\u202egnp.drawkcab.png",
    "\U0001f980 {{ 7*7 }} ünï.png",
    "</script><img src=x onerror=alert(1)>.png".replace("/", "\u2215"),
)


def a_run(folder: Path, **settings) -> Path:
    images = [
        *(Made("01", f"good{number}.png", 0.05 * (number + 1)) for number in range(7)),  # the last is a false alarm
        *(Made("01", f"bad{number}.png", 0.25 + 0.1 * number, "spot") for number in range(3)),  # the first is missed
        Made("plate top", "x.png", 0.2, None),
    ]
    return make_run(folder, images, failed=(("01", "broken.png"),), **settings)


class Page(HTMLParser):
    """Scripts by id, and all tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.scripts, self.tags, self._inside = {}, [], None
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = dict(attributes).get("id", "code") if tag == "script" else None

    def handle_data(self, text):
        if self._inside is not None:
            self.scripts[self._inside] = self.scripts.get(self._inside, "") + text

    def handle_endtag(self, tag):
        self._inside = None

    @property
    def cards(self):
        return json.loads(self.scripts["data"])["cards"]

    def picture(self, name: str):
        number = next(i for i, card in enumerate(self.cards) if card["name"].endswith(name))
        return json.loads(self.scripts[f"picture-{number}"])


def report(out: Path, **settings) -> Page:
    command.run(ReportConfig(str(out), **settings), Console(quiet=True))
    return Page(out / "report.html")


def pixels(content: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(content))))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = a_run(tmp_path_factory.mktemp("report"))
    return out, report(out)


def test_every_image_has_a_card_and_pictures(whole):
    _, page = whole
    assert [card.get("judgement") for card in page.cards].count("missed") == 1
    assert [card.get("judgement") for card in page.cards].count("false alarm") == 1
    assert len(page.cards) == 12
    assert sum(name.startswith("picture-") for name in page.scripts) == 11
    for name in ("good0.png", "bad2.png", "x.png"):
        picture = page.picture(name)
        assert picture["notes"] == []
        assert pixels(picture["image"]).shape == (96, 150, 3)
        assert pixels(picture["heat"]).shape[:2] == (96, 150)


def test_heat_is_where_the_hot_patch_is_on_one_scale(whole):
    _, page = whole
    hot = pixels(page.picture("bad2.png")["heat"])[..., 3].astype(float)
    cold = pixels(page.picture("good0.png")["heat"])
    row, column = np.unravel_index(hot.argmax(), hot.shape)
    assert HOT[0] * 24 <= row <= (HOT[0] + 1) * 24
    assert HOT[1] * 24 <= column <= (HOT[1] + 1) * 24
    assert hot.max() > 120
    assert cold.shape[2] == 3 or cold[..., 3].max() < 20  # the same scale: 0.05 is far below the threshold


def test_outlines_and_box(whole):
    _, page = whole
    picture = page.picture("bad0.png")
    assert extent(picture["truth"]) == pytest.approx([48, 24, 72, 48], abs=1)
    assert extent(picture["mask"]) == pytest.approx([0, 24, 144, 96], abs=1)  # not the 6 columns that were cut off
    assert picture["top"]["box"] == [48, 24, 24, 24]
    assert page.picture("good0.png")["truth"] == ""


def extent(path: str) -> list[float]:
    points = np.array([[float(value) for value in pair.split()] for pair in re.findall(r"[\d.]+ [\d.]+", path)])
    return [*points.min(axis=0), *points.max(axis=0)]


def test_the_matched_patch_is_cut_from_the_rotated_reference(whole):
    out, page = whole
    top = page.picture("bad1.png")["top"]
    assert (top["row"], top["col"]) == HOT
    assert (top["match"]["row"], top["match"]["col"], top["match"]["rotation"]) == (*MATCHED, ANGLE)
    assert top["match"]["name"] == "good/ref.png"
    reference = rotate_image(read_image(out.parent / "images/01/train/good/ref.png"), ANGLE)
    patch = reference[MATCHED[0] * 24 : (MATCHED[0] + 1) * 24, MATCHED[1] * 24 : (MATCHED[1] + 1) * 24]
    middle = pixels(top["match"]["patch"])[48:72, 48:72]
    assert np.abs(middle.astype(int) - patch).mean() < 6  # WebP


def test_metrics_are_those_of_evaluate(whole):
    out, _ = whole
    text = (out / "report.html").read_text()
    for row in evaluate(str(out)):
        if row.auroc is not None:
            assert f"<td>{100 * row.auroc:.2f}</td><td>{100 * row.average_precision:.2f}</td>" in text


def test_every_row_of_the_table_has_a_cell_for_each_column(whole):
    names = [name for name, _ in whole[1].tags]
    table = names[names.index("table") : names.index("p", names.index("table"))]
    rows = " ".join(table).split(" tr ")[1:]
    cells = [sum(name in {"th", "td"} for name in row.split()) for row in rows]
    assert cells == [10] * 4  # the header, two categories, their mean


def test_nothing_is_loaded_and_no_other_script_runs(whole):
    out, page = whole
    text = (out / "report.html").read_text()
    assert not re.findall(r"""(?:src|href|action)\s*=\s*["']?(?:https?:|//)""", text)
    policy = next(given["content"] for tag, given in page.tags if given.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    assert not [given for _, given in page.tags if any(name.startswith("on") for name in given) or "style" in given]


def test_hostile_names_are_text(tmp_path):
    images = [Made(name[:-4], name, 0.1, name[:-4]) for name in HOSTILE]
    page = report(make_run(tmp_path, images, failed=tuple((name[:-4], f"f{name}") for name in HOSTILE)))
    assert {card["name"].split("/")[-1] for card in page.cards} == {*HOSTILE, *(f"f{name}" for name in HOSTILE)}
    assert [tag for tag, _ in page.tags].count("script") == len(HOSTILE) + 2
    assert "img" not in [tag for tag, _ in page.tags]
    assert html.escape(HOSTILE[0][:-4]) in (tmp_path / "out" / "report.html").read_text()


def test_files_that_are_gone_leave_notes(tmp_path):
    out = a_run(tmp_path)
    for name in ("test/spot/bad0.png", "test/spot/bad1.png.mask.png", "train/good/ref.png"):
        (tmp_path / "images/01" / name).unlink()
    page = report(out)
    gone = page.picture("bad0.png")
    assert "image" not in gone
    assert "cannot be shown" in gone["notes"][0]
    assert pixels(gone["heat"]).shape[:2] == (96, 150)
    assert "ground truth cannot be shown" in page.picture("bad1.png")["notes"][0]
    assert "cannot be shown" in page.picture("good0.png")["top"]["match"]["note"]
    assert "patch" not in page.picture("good0.png")["top"]["match"]


def test_an_image_that_changed_says_so(tmp_path):
    out = a_run(tmp_path)
    Image.new("RGB", (40, 40)).save(tmp_path / "images/01/test/good/good0.png")
    assert "another size" in report(out).picture("good0.png")["notes"][0]


def test_a_run_without_labels_and_threshold(tmp_path):
    out = make_run(tmp_path, [Made("c", f"{n}.png", 0.1 * n, None) for n in range(3)], threshold=None, masked=False)
    page = report(out)
    assert {card["anomalous"] for card in page.cards} == {None}
    assert "mask" not in page.picture("1.png")
    text = (out / "report.html").read_text()
    assert "No curves: they need labelled images" in text
    assert "This run has no threshold" in text


def test_all_scores_zero(tmp_path):
    out = make_run(tmp_path, [Made("c", f"{n}.png", 0.0) for n in range(2)], threshold=None)
    assert len(report(out).cards) == 2


def test_fewer_cards_than_images(tmp_path):
    page = report(a_run(tmp_path), max_images=5)
    scored = [card for card in page.cards if card["score"] is not None]
    assert len(scored) == 5
    assert {card["judgement"] for card in scored} >= {"missed", "false alarm"}
    assert "Cards of 5 of 11 images" in (tmp_path / "out" / "report.html").read_text()


def test_only_some_categories(tmp_path):
    out = a_run(tmp_path)
    assert {card["category"] for card in report(out, category="plate top").cards} == {"plate top"}
    with pytest.raises(InputError, match=r"no category 'plat'.*found \['01', 'plate top'\]"):
        command.run(ReportConfig(str(out), category="plat"), Console(quiet=True))


def test_the_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    out = a_run(tmp_path)
    (out / "report.html").write_text("earlier")

    def broken(self, row, patches):
        raise MemoryError

    monkeypatch.setattr(command.Drawer, "draw", broken)
    with pytest.raises(MemoryError):
        command.run(ReportConfig(str(out)), Console(quiet=True))
    assert (out / "report.html").read_text() == "earlier"
    assert not list(out.glob(".*tmp"))


def test_the_command_line(tmp_path, capsys):
    out = a_run(tmp_path)
    assert main(["report", str(out), "--file", str(tmp_path / "page.html"), "--max-images", "2"]) == 0
    assert "2 of 11 images have a card" in capsys.readouterr().out
    assert len(Page(tmp_path / "page.html").cards) == 3
    assert not (out / "report.html").exists()
    assert main(["report", str(tmp_path / "none")]) == 1


@pytest.mark.parametrize("change", [{"max_images": -1}, {"thumbnail": 8}])
def test_settings_out_of_range(change):
    with pytest.raises(ConfigError, match="expected"):
        ReportConfig("x", **change)


@pytest.mark.parametrize(
    ("label", "anomalous", "found"),
    [("good", True, "false alarm"), ("good", False, "right"), ("crack", False, "missed"), ("crack", True, "right")],
)
def test_judgement(label, anomalous, found):
    assert judgement({"label": label, "is_anomalous": anomalous}) == found
    assert judgement({"label": None, "is_anomalous": anomalous}) is None
    assert judgement({"label": label, "is_anomalous": None}) is None


@pytest.mark.parametrize("most", [0, 1, 5, 20, 99, 100, 1000])
def test_places_are_shared_and_all_used(most):
    rows = {
        name: [{"id": (name, i), "label": "good", "is_anomalous": i % 9 == 0} for i in range(count)]
        for name, count in (("a", 3), ("b", 40), ("c", 57))
    }
    chosen = [row["id"] for row in choose(rows, most)]
    assert len(chosen) == len(set(chosen)) == min(most, 100)
    if most == 20:
        assert {("a", 0), ("a", 1), ("a", 2), ("b", 0), ("c", 0), ("c", 56)} <= set(chosen)


def test_geometry_is_that_of_the_run(whole):
    out, _ = whole
    geometry = RunGeometry.of(Store(out))
    plan = plan_geometry(*SIZE, RESOLUTION, PATCH)
    assert geometry == (RESOLUTION, PATCH)
    assert geometry.coverage(SIZE, plan.grid) == plan.coverage != (1.0, 1.0)
    assert geometry.coverage(SIZE, (1, 1)) == (1.0, 1.0)
    assert geometry.box(SIZE, plan.grid, 3, 5) == (72, 120, 24, 24)


def test_references_of_banks_elsewhere(tmp_path):
    elsewhere, out = a_run(tmp_path / "a"), a_run(tmp_path / "b")
    job = json.loads((out / "job.json").read_text())
    job["stages"]["score"]["config"]["banks"] = str(elsewhere)
    (out / "job.json").write_text(json.dumps(job))
    assert len(read_run(str(out)).references) >= len(read_run(str(elsewhere)).references)
    job["stages"]["score"]["config"]["banks"] = str(tmp_path / "gone")
    (out / "job.json").write_text(json.dumps(job))
    read_run(str(out))


def test_histogram_counts_everything_once():
    scores = np.array([0.1, 0.2, 0.3, 0.4, 0.9])
    found = curves.histogram(scores, ["good", "a", "a", None, "b"], 1.5)
    assert list(found.counts) == ["good", "a", "b", "unlabelled"]
    assert sum(count.sum() for count in found.counts.values()) == 5
    assert (found.low, found.high) == (0.1, 1.5)
    many = curves.histogram(np.arange(20.0), [f"kind{n}" for n in range(20)], None)
    assert list(many.counts)[-1] == curves.OTHER
    assert len(many.counts) == 7


def test_curves_and_the_point_of_the_threshold():
    scores, labels = np.array([0.1, 0.4, 0.35, 0.8, 0.9]), ["good", "good", "bad", "bad", None]
    roc, precision = curves.curves(scores, labels, 0.37)
    assert np.trapezoid(roc.y, roc.x) == pytest.approx(0.75)
    assert roc.at_threshold == (0.5, 0.5)
    assert precision.at_threshold == (0.5, 0.5)
    assert (np.diff(precision.x) >= 0).all()
    assert curves.curves(scores[:2], labels[:2], None) is None


def test_patch_tiles_are_grey_beyond_the_image():
    image = np.full((50, 50, 3), 200, np.uint8)
    tile = thumbnails.patch_tile(image, (0, 0, 10, 10))
    assert tile.shape == (120, 120, 3)
    assert (tile[:40, :40] == 128).all()
    assert (tile[60:, 60:] == 200).all()


def test_threshold_stands_in_the_page(whole):
    out, _ = whole
    assert f"<td>{THRESHOLD:.4g}</td>" in (out / "report.html").read_text()


def test_a_reference_that_changed_or_is_not_recorded(tmp_path):
    out = a_run(tmp_path)
    Image.new("RGB", (40, 40)).save(tmp_path / "images/01/train/good/ref.png")
    assert "another size now than when it was used" in report(out).picture("good0.png")["top"]["match"]["note"]
    run = read_run(str(out))
    run.references.clear()
    row = run.scores["01"][0]
    (patches,) = read_patches(run.store, {row["image_id"]: (row["grid_rows"], row["grid_cols"])})
    drawn = Drawer(run, 64).draw(row, patches)
    assert "does not say where this image is" in drawn["top"]["match"]["note"]


def test_without_patch_scores_an_image_is_shown_as_it_is(tmp_path):
    run = read_run(str(a_run(tmp_path)))
    drawn = Drawer(run, 64).draw(run.scores["01"][0], None)
    assert "image" in drawn
    assert not {"heat", "top", "mask"} & drawn.keys()


def test_outlines_of_large_ground_truth_are_those_of_a_smaller_one(tmp_path):
    truth = np.zeros((3000, 3000), np.uint8)
    truth[600:1200, 600:1200] = 255
    found = []
    for name, pixels_ in (("large.png", truth), ("small.png", truth[::10, ::10])):
        Image.fromarray(pixels_).save(tmp_path / name)
        found.append(_truth({"mask_uri": str(tmp_path / name), "label": "spot"}, (60, 60), []))
    assert extent(found[0]) == pytest.approx(extent(found[1]), abs=1)


def test_curves_of_many_images_are_thinned_and_a_threshold_above_all_is_on_one_of_them():
    draw = np.random.default_rng(0)
    scores, labels = draw.random(5000), draw.choice(["good", "bad"], 5000).tolist()
    roc, precision = curves.curves(scores, labels, 2.0)
    assert len(roc.x) <= curves._MOST_POINTS
    assert (roc.x[0], roc.x[-1]) == (0.0, 1.0)
    assert (roc.at_threshold, precision.at_threshold) == ((0.0, 0.0), None)
    assert curves.curves(scores, labels, None)[0].at_threshold is None


def test_where_nothing_is_known_of_a_run_the_grid_covers_the_image(tmp_path):
    assert RunGeometry().coverage((96, 150), (4, 6)) == (1.0, 1.0)
    assert RunGeometry.of(Store(tmp_path)) == RunGeometry()
