import numpy as np
import pytest
from generated import save, textured
from PIL import Image

from anomalydino_plugin import BankError, ConfigError, FewShotModel, Geometry, rotate_image
from anomalydino_plugin.few_shot.drawing import GAP, TILE, heat, outline_mask, patch_tile, place_tile, plain, shortened
from anomalydino_plugin.few_shot.explain import explain_picture, matched_patches, save_explanation

WIDE = (80, 130)  # resized to 64 x 104: 8 of its columns are cropped


@pytest.fixture
def model(tiny_backbone):
    return FewShotModel(tiny_backbone, resolution=64, masking="off").fit([textured(0)])


def half_masked(features, grid, morphology):
    return np.arange(grid[0] * grid[1]) < grid[0] * grid[1] // 2


@pytest.fixture
def masked(tiny_backbone, monkeypatch):
    monkeypatch.setattr("anomalydino_plugin.patch_model.patch_foreground", half_masked)
    return FewShotModel(tiny_backbone, resolution=64, masking="on").fit([textured(0)])


def every_patch(detection):
    return [(row, column) for row in range(detection.geometry.grid[0]) for column in range(detection.geometry.grid[1])]


def tiles(picture, row_from_below, column):
    """A tile of the picture's rows, counted from the last row and from the left."""
    top = picture.shape[0] - (row_from_below + 1) * (TILE + GAP) + GAP // 2
    left = GAP + column * (TILE + GAP)
    return picture[top : top + TILE, left : left + TILE]


# What was matched


@pytest.mark.parametrize("size", [(96, 96), WIDE])
def test_a_reference_matches_its_own_patches(tiny_backbone, size):
    model = FewShotModel(tiny_backbone, resolution=64, masking="off").fit([textured(9, size), textured(0, size)])
    detection = model.score(textured(0, size))
    patches = every_patch(detection)
    for match, (row, column) in zip(matched_patches(model, detection, patches=patches), patches, strict=True):
        assert (match.row, match.column) == (row, column)
        assert match.source == ("1", 0.0, row, column)
        assert match.box == match.source_box
        assert match.distance == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("angle", [45, 90, 270])
def test_a_rotated_reference_matches_itself_on_the_rotated_canvas(model, angle):
    detection = model.score(rotate_image(textured(0), angle))
    for match in matched_patches(model, detection, patches=[(1, 2), (3, 0)]):
        assert match.source == ("0", float(angle), match.row, match.column)
        assert match.box == match.source_box


def test_each_match_has_its_reported_distance(model):
    """The patch named as the match, encoded again, is at the distance that is reported."""
    test, reference = textured(4, spot=True), textured(0)
    unit = {}
    for match in matched_patches(model, model.score(test), top=16):
        angle = match.source.rotation
        if angle not in unit:
            features = model.encode([model.prepare(test), model.prepare(rotate_image(reference, angle))])
            unit[angle] = features / features.norm(dim=2, keepdim=True)
        query, found = (
            unit[angle][0][4 * match.row + match.column],
            unit[angle][1][4 * match.source[2] + match.source[3]],
        )
        assert 1 - float(query @ found) == pytest.approx(match.distance, abs=1e-5)


@pytest.mark.parametrize("size", [WIDE, (130, 80), (32, 32), (97, 113)])
def test_boxes_cover_the_pixels_that_become_the_patch(model, size):
    detection = model.score(textured(1, size))
    for match in matched_patches(model, detection, patches=every_patch(detection)):
        image = np.zeros((*size, 3), np.uint8)
        y, x, height, width = match.box
        image[y : y + height, x : x + width] = 255
        prepared = model.prepare(image)[..., 0] / 255.0
        rows, columns = detection.geometry.grid
        share = prepared.reshape(rows, 16, columns, 16).mean(axis=(1, 3))
        assert share[match.row, match.column] > 0.9
        assert share.sum() - share[match.row, match.column] < 0.25


def test_boxes_meet_without_gap_or_overlap(model):
    detection = model.score(textured(1, (97, 113)))
    count = np.zeros((97, 113), int)
    for match in matched_patches(model, detection, patches=every_patch(detection)):
        y, x, height, width = match.box
        count[y : y + height, x : x + width] += 1
    covered = [round(edge * share) for edge, share in zip((97, 113), detection.geometry.coverage, strict=True)]
    assert (count[: covered[0], : covered[1]] == 1).all()
    assert count.sum() == covered[0] * covered[1]


def test_boxes_of_patches_below_a_pixel_stay_inside(tiny_backbone):
    model = FewShotModel(tiny_backbone, resolution=320, rotations="informed", masking="off")
    small = textured(0, (16, 16))  # a grid of 20 x 20 on 16 x 16 pixels
    detection = model.fit([small]).score(small)
    for match in matched_patches(model, detection, patches=every_patch(detection)):
        y, x, height, width = match.box
        assert (height, width) == (1, 1)
        assert 0 <= y < 16
        assert 0 <= x < 16


def test_source_boxes_follow_the_size_of_the_reference(tiny_backbone):
    model = FewShotModel(tiny_backbone, resolution=64, rotations="informed", masking="off").fit([textured(0, WIDE)])
    for match in matched_patches(model, model.score(textured(1)), top=16):
        assert match.box == (24 * match.row, 24 * match.column, 24, 24)
        assert match.source_box == (20 * match.source.row, 20 * match.source.column, 20, 20)


# Which patches


def test_the_top_patch_is_the_drawn_spot(tiny_backbone):
    model = FewShotModel(tiny_backbone, resolution=96, masking="off").fit([textured(0)])
    (match,) = matched_patches(model, model.score(textured(0, spot=True)), top=1)
    assert match.box == (32, 32, 16, 16)


def test_top_patches_come_by_distance_then_in_reading_order(model):
    detection = model.score(textured(1))
    distances = np.array([[0, 3, 1, 3], [2, 3, 0, 0], [0, 0, 0, 4], [0, 0, 0, 0]], np.float32) / 4
    matches = matched_patches(model, detection._replace(distances=distances), top=6)
    assert [(m.row, m.column) for m in matches] == [(2, 3), (0, 1), (0, 3), (1, 1), (1, 0), (0, 2)]
    assert [m.distance for m in matches] == [1, 0.75, 0.75, 0.75, 0.5, 0.25]


def test_patches_asked_for_come_in_the_order_asked(model):
    detection = model.score(textured(1))
    matches = matched_patches(model, detection, patches=[(3, 1), (0, 2)])
    assert [(m.row, m.column, m.distance) for m in matches] == [
        (3, 1, detection.distances[3, 1]),
        (0, 2, detection.distances[0, 2]),
    ]


def test_masked_patches_are_left_out_and_refused_by_name(masked):
    detection = masked.score(textured(1))
    assert {match.row for match in matched_patches(masked, detection, top=100)} == {0, 1}
    with pytest.raises(ConfigError, match=r"patch \(2, 0\) is background"):
        matched_patches(masked, detection, patches=[(0, 0), (2, 0)])


@pytest.mark.parametrize("patch", [(4, 0), (0, 4), (-1, 0), (0, -1)])
def test_patches_outside_the_grid(model, patch):
    with pytest.raises(ConfigError, match=r"expected a row below 4 and a column below 4"):
        matched_patches(model, model.score(textured(1)), patches=[patch])


def test_other_arguments_out_of_range(model, tiny_backbone):
    detection = model.score(textured(1))
    with pytest.raises(ConfigError, match="top=0: expected at least 1"):
        matched_patches(model, detection, top=0)
    other = Geometry((96, 96), (96, 96), (6, 6), (1.0, 1.0))
    with pytest.raises(ConfigError, match="made by this model"):
        matched_patches(model, detection._replace(geometry=other))
    with pytest.raises(BankError, match="empty"):
        matched_patches(FewShotModel(tiny_backbone, resolution=64, masking="off"), detection)


# The picture


def fitted_from_files(backbone, folder, names=("a.png",), **settings):
    paths = [folder / name for name in names]
    for seed, path in enumerate(paths):
        save(path, textured(seed))
    return FewShotModel(backbone, resolution=64, masking="off", **settings).fit(paths), paths


def test_test_and_reference_crops_stand_side_by_side(tiny_backbone, tmp_path):
    model, (path,) = fitted_from_files(tiny_backbone, tmp_path)
    picture, matches = explain_picture(model, path, top=3)
    assert picture.dtype == np.uint8
    assert len(matches) == 3
    for row in range(3):
        assert np.array_equal(tiles(picture, row, 0), tiles(picture, row, 1))
        expected = patch_tile(textured(0), matches[2 - row].box)
        assert np.array_equal(tiles(picture, row, 0), expected)
    test = textured(5)
    picture, (match,) = explain_picture(model, test, top=1)
    view = rotate_image(textured(0), match.source.rotation)
    assert np.array_equal(tiles(picture, 0, 0), patch_tile(test, match.box))
    assert np.array_equal(tiles(picture, 0, 1), patch_tile(view, match.source_box))
    assert np.array_equal(tiles(picture, 0, 2), place_tile(view, match.source_box))


def test_a_crop_shows_the_patch_in_its_middle_and_grey_outside():
    image = np.zeros((60, 60, 3), np.uint8)
    image[0:10, 50:60] = (255, 0, 0)
    tile = patch_tile(image, (0, 50, 10, 10))
    assert (tile[90:107, 90:107] == (255, 0, 0)).all()
    assert (tile[:80] == 200).all()  # above the image
    assert (tile[:, 116:] == 200).all()  # right of it
    assert (tile[120:, :80] == 0).all()


def test_a_read_function_serves_ids_that_are_no_paths(model):
    readable, matches = explain_picture(model, textured(5), top=2, read=lambda name: {"0": textured(0)}[name])
    assert not is_notice(tiles(readable, 0, 1))
    assert matches == explain_picture(model, textured(5), top=2)[1]


def is_notice(tile):
    """Grey with text, and no patch outlined."""
    outlined = (tile == (0, 255, 255)).all(axis=2).any()
    return not outlined and (tile[-4:] == 200).all() and (tile < 60).all(axis=2).any()


@pytest.mark.parametrize(
    "read",
    [
        {}.__getitem__,
        lambda name: textured(0, (50, 50)),  # replaced by an image of another size
        lambda name: np.zeros((96, 96), np.uint8),
    ],
)
def test_unreadable_references_leave_a_grey_tile(model, read):
    picture, matches = explain_picture(model, textured(5), top=2, read=read)
    assert matches == matched_patches(model, model.score(textured(5)), top=2)
    for row in range(2):
        assert is_notice(tiles(picture, row, 1))
        assert not is_notice(tiles(picture, row, 0))
        assert (tiles(picture, row, 2) == 255).all()


def test_a_deleted_reference_leaves_a_grey_tile_and_the_others_stay(tiny_backbone, tmp_path):
    model, (_, gone) = fitted_from_files(tiny_backbone, tmp_path, ("kept.png", "gone.png"))
    gone.unlink()
    rows = [explain_picture(model, textured(seed), patches=[(0, 0)])[0] for seed in (0, 1)]
    assert [is_notice(tiles(picture, 0, 1)) for picture in rows] == [False, True]


def test_errors_of_the_reader_itself_are_not_hidden(model):
    def broken(name):
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        explain_picture(model, textured(5), top=1, read=broken)


@pytest.mark.parametrize("name", ["螺丝_ä.png", "x" * 200 + ".png", "new\nline.png"])
def test_any_file_name(tiny_backbone, tmp_path, name):
    model, (path,) = fitted_from_files(tiny_backbone, tmp_path / ("folder" * 30), (name,))
    picture, _ = explain_picture(model, path, top=1)
    assert (picture[:, -4:] == 255).all()  # no caption runs over the edge
    assert not is_notice(tiles(picture, 0, 1))


def test_names_stay_apart_in_ascii_and_keep_both_ends():
    assert plain("螺丝.png") == r"\u87ba\u4e1d.png" != plain("螺母.png")
    assert plain("\udcff") == r"\udcff"  # a file name that is no text
    short = shortened("start" + "x" * 5000 + "007.png", 15, 200)
    assert short.startswith("start")
    assert short.endswith("007.png")
    assert shortened("short.png", 15, 200) == "short.png"


def test_the_mask_is_outlined_only_where_one_is_used(tiny_backbone, model, masked):
    blue = [
        (explain_picture(each, textured(5), top=1)[0] == (80, 180, 255)).all(axis=2).sum() for each in (model, masked)
    ]
    assert blue[0] == 0
    assert blue[1] > 500


def test_the_mask_lies_on_the_cropped_area():
    image = np.zeros((100, 200, 3), np.uint8)
    outline_mask(image, np.ones((2, 4), bool), (1.0, 0.5))
    drawn = np.flatnonzero(image.any(axis=(0, 2)))
    assert drawn.min() <= 1
    assert 98 <= drawn.max() <= 101


def test_an_image_that_is_all_background_is_explained_without_a_mask(tiny_backbone, monkeypatch):
    model = FewShotModel(tiny_backbone, resolution=64, masking="on").fit([textured(0)])
    unmasked = FewShotModel(tiny_backbone, resolution=64, masking="off").fit([textured(0)])
    monkeypatch.setattr(
        "anomalydino_plugin.patch_model.patch_foreground", lambda features, grid, morphology: np.zeros(16, bool)
    )
    picture, matches = explain_picture(model, textured(5))
    assert [match[:3] for match in matches] == [match[:3] for match in explain_picture(unmasked, textured(5))[1]] != []
    assert (picture == (0, 255, 255)).all(axis=2).any()  # patches are outlined


def test_heat_is_where_the_values_are():
    image = np.full((40, 40, 3), 120, np.uint8)
    values = np.zeros((40, 40), np.float32)
    values[:20, :20] = 0.5
    drawn = heat(image, values, 0.5)
    assert (drawn[25:, 25:] == 120).all()
    assert drawn[5, 5, 0] > 220  # the brightest colour of the map is a light yellow
    assert (heat(image, np.zeros_like(values), 0.0) == 120).all()


@pytest.mark.parametrize("size", [(64, 1024), (1024, 64), (16, 16)])
def test_any_shape_of_image(tiny_backbone, size):
    image = textured(0, size)
    model = FewShotModel(tiny_backbone, resolution=64, rotations="informed", masking="off").fit([image])
    picture, matches = explain_picture(model, image, top=12, read=lambda name: image)
    assert len(matches) == 12
    assert picture.shape[1] == 1160
    assert not is_notice(tiles(picture, 0, 1))


def test_the_png_is_the_picture_and_replaces_an_older_one(model, tmp_path):
    picture, _ = explain_picture(model, textured(5), top=1)
    path = tmp_path / "new" / "folder" / "explanation.png"
    save_explanation(picture[:10], path)
    save_explanation(picture, path)
    assert np.array_equal(np.array(Image.open(path)), picture)
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "explanation.png"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        save_explanation(np.zeros((4, 4, 7), np.uint8), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
