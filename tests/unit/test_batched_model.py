import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from generated import save, textured
from torch.utils.data import DataLoader

from anomalydino_plugin import BatchedModel, ConfigError, ImageError, InputError, match_set
from anomalydino_plugin.batched import feature_store, torch_model, whole_set
from anomalydino_plugin.batched.feature_store import FeatureStore
from anomalydino_plugin.batched.first_pass import read_all
from anomalydino_plugin.batched.whole_set import set_bytes
from anomalydino_plugin.kernels import rows as kernel_rows
from anomalydino_plugin.preprocessing import plan_geometry


@pytest.fixture
def model(tiny_backbone):
    return BatchedModel(tiny_backbone, resolution=64, masking="off")


IMAGES = [textured(seed) for seed in range(5)]


def by_hand(model: BatchedModel, images: list[np.ndarray], which: int, mode: str = "official") -> np.ndarray:
    """(P,) distances from the definition, in float64."""
    rows = [torch.nn.functional.normalize(model.encode([model.prepare(image)])[0], dim=1).double() for image in images]
    distances = [1 - rows[which] @ other.T for index, other in enumerate(rows) if index != which]
    if mode == "musc":
        minima = torch.stack([part.amin(1) for part in distances], 1).sort(1).values
        return minima[:, : max(1, int(0.3 * len(distances)))].mean(1).numpy()
    everything = torch.cat(distances, 1).sort(1).values
    return everything[:, : max(1, int(0.001 * everything.shape[1]) - 1)].mean(1).numpy()


@pytest.mark.parametrize("mode", ["official", "musc"])
def test_scores_follow_the_definition(tiny_backbone, mode):
    model = BatchedModel(tiny_backbone, resolution=64, masking="off", mode=mode)
    for index, detection in enumerate(model.score_set(IMAGES)):
        expected = by_hand(model, IMAGES, index, mode)
        np.testing.assert_allclose(detection.distances.reshape(-1), expected, atol=1e-6)
        assert detection.score == pytest.approx(expected.max(), abs=1e-6)  # 1 % of 16 patches: the largest


def test_a_share_in_place_of_the_papers(tiny_backbone):
    model = BatchedModel(tiny_backbone, resolution=64, masking="off", share=0.5)
    everything = BatchedModel(tiny_backbone, resolution=64, masking="off", share=1.0)
    half, full = model.score_set(IMAGES)[0].distances, everything.score_set(IMAGES)[0].distances
    assert (half < full).all()


def test_the_order_of_the_set_changes_nothing(model):
    forward = [detection.score for detection in model.score_set(IMAGES)]
    backward = [detection.score for detection in model.score_set(IMAGES[::-1])]
    np.testing.assert_allclose(forward, backward[::-1], atol=1e-7)


def test_a_defect_scores_highest(model):
    scores = [d.score for d in model.score_set([*(textured(1) for _ in range(4)), textured(1, spot=True)])]
    assert scores[4] > 0.1 > max(scores[:4])


def test_duplicates_are_each_others_match(model):
    detections = model.score_set([IMAGES[0], IMAGES[1], IMAGES[0]])
    assert detections[0].score == detections[2].score == pytest.approx(0, abs=1e-6)
    assert model.source(int(detections[0].matched_rows[1, 2])) == ("2", 1, 2)


def test_mixed_patch_grids(model):
    images = [textured(0), textured(1, (64, 130)), textured(2, (150, 96))]
    detections = model.score_set(images)
    assert [detection.geometry.grid for detection in detections] == [(4, 4), (4, 8), (6, 4)]
    for index, detection in enumerate(detections):
        np.testing.assert_allclose(detection.distances.reshape(-1), by_hand(model, images, index), atol=1e-6)
    key, row, column = model.source(int(detections[0].matched_rows[0, 0]))
    assert key in {"1", "2"}
    assert 0 <= row < 6
    assert 0 <= column < 8


def test_blocks_change_nothing(model, monkeypatch):
    expected = [detection.distances for detection in model.score_set(IMAGES)]
    for rows in (1, 16, 33, 48):
        monkeypatch.setattr("anomalydino_plugin.batched.torch_model.block_rows", lambda *_, rows=rows: rows)
        for before, after in zip(expected, model.score_set(IMAGES), strict=True):
            np.testing.assert_allclose(before, after.distances, atol=1e-6)


@pytest.mark.parametrize("budget", [0, 16 * 64 * 4 * 2, 10**9])
def test_features_on_disk_give_the_same_scores(tiny_backbone, tmp_path, budget):
    in_memory = BatchedModel(tiny_backbone, resolution=64, masking="off")
    spilled = BatchedModel(
        tiny_backbone, resolution=64, masking="off", memory_budget=budget, spill_folder=str(tmp_path)
    )
    expected = [detection.score for detection in in_memory.score_set(IMAGES)]
    assert [detection.score for detection in spilled.score_set(IMAGES)] == expected
    on_disk = max(0, 5 - budget // (16 * 64 * 4))
    assert spilled.store.bytes_on_disk == on_disk * 16 * 64 * 4
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == spilled.store.bytes_on_disk
    spilled.clear()
    assert list(tmp_path.iterdir()) == []


def test_float16_features(tiny_backbone):
    exact = BatchedModel(tiny_backbone, resolution=64, masking="off")
    half = BatchedModel(tiny_backbone, resolution=64, masking="off", feature_type="float16")
    for before, after in zip(exact.score_set(IMAGES), half.score_set(IMAGES), strict=True):
        assert after.score == pytest.approx(before.score, abs=5e-4)
        assert after.score != before.score


def test_masks(tiny_backbone, monkeypatch):
    monkeypatch.setattr(
        "anomalydino_plugin.masking.foreground_mask", lambda component, grid, morphology: np.arange(16) < 8
    )
    on = BatchedModel(tiny_backbone, resolution=64, masking="on").score_set(IMAGES)[0]
    off = BatchedModel(tiny_backbone, resolution=64, masking="off").score_set(IMAGES)[0]
    assert (on.distances[2:] == 0).all()
    assert (on.matched_rows[2:] == -1).all()
    np.testing.assert_array_equal(on.distances[:2], off.distances[:2])  # masks hide queries, never references


@pytest.mark.parametrize(("votes", "expected"), [([True, True, False], True), ([True, False], False), ([False], False)])
def test_auto_masking_is_a_vote_of_the_set(tiny_backbone, votes, expected):
    model = BatchedModel(tiny_backbone, resolution=64, masking="auto")
    plan = plan_geometry(96, 96, 64, 16)
    for vote in votes:
        model.store.add(str(vote), torch.zeros(16, 64), np.ones((4, 4), bool), vote, plan)
    assert model.use_mask is expected


def test_a_batch_scores_itself(model):
    batch = torch.stack([torch.from_numpy(image).permute(2, 0, 1) / 255 for image in IMAGES])
    prediction = model(batch)
    expected = [detection.score for detection in model.score_set(IMAGES)]
    np.testing.assert_allclose(prediction.pred_score.numpy(), expected, atol=1e-6)
    assert prediction.anomaly_map.shape == (5, 1, 96, 96)


def test_one_image_alone(model):
    with pytest.raises(InputError, match="at least two"):
        model.score_set(IMAGES[:1])
    with pytest.raises(InputError, match="at least two"):
        model(torch.zeros(1, 3, 96, 96))
    with pytest.raises(InputError, match="at least two"):
        model.score_set([])


def test_a_stranger_is_scored_against_the_whole_set(model):
    model.score_set(IMAGES)
    assert model.score_stranger(IMAGES[2]).score == pytest.approx(0, abs=1e-6)


def test_unreadable_images_are_named(model, tmp_path):
    save(tmp_path / "good.png", IMAGES[0])
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(ImageError, match=r"bad\.png"):
        model.score_set([tmp_path / "good.png", tmp_path / "bad.png"])
    with pytest.raises(ImageError, match="'1': image of 8 x 8 pixels"):
        model.score_set([IMAGES[0], np.zeros((8, 8, 3), np.uint8)])


@pytest.mark.parametrize(
    "change", [{"mode": "mean"}, {"share": 0.0}, {"feature_type": "int8"}, {"memory_budget": -1}, {"sigma": -1.0}]
)
def test_settings_out_of_range(tiny_backbone, change):
    with pytest.raises(ConfigError, match="expected"):
        BatchedModel(tiny_backbone, resolution=64, **change)


def test_a_copy_takes_no_images_along(model):
    model.score_set(IMAGES)
    assert len(copy.deepcopy(model).store) == 0
    assert len(model.store) == 5


def test_a_row_names_its_image(model):
    model.score_set(IMAGES)
    assert model.source(0) == ("0", 0, 0)
    assert model.source(5 * 16 - 1) == ("4", 3, 3)
    with pytest.raises(ConfigError, match="expected 0 to 79"):
        model.source(80)


def test_blocks_of_a_store_hold_whole_images():
    store = FeatureStore(2)
    for index, patches in enumerate([4, 9, 4, 16]):
        side = int(patches**0.5)
        plan = plan_geometry(16 * side, 16 * side, 16 * side, 16)
        store.add(str(index), torch.full((patches, 2), float(index)), np.ones((side, side), bool), None, plan)
    blocks = list(store.blocks(13))
    assert [(block.first, block.lengths) for block in blocks] == [(0, [4, 9]), (2, [4]), (3, [16])]
    assert blocks[0].rows[:, 0].tolist() == [0.0] * 4 + [1.0] * 9


def test_blocks_in_memory_are_not_copied(monkeypatch):
    monkeypatch.setattr(feature_store, "BLOCK_ROWS", 13)
    plan = plan_geometry(32, 32, 32, 16)
    for kind, copied in (("float32", False), ("float16", True)):
        store = FeatureStore(2, kind)
        for index, patches in enumerate([4, 9, 4, 16, 4]):  # blocks of 13, 4, 16 and 4
            rows = torch.arange(2.0 * patches).view(patches, 2) + 100 * index
            store.add(str(index), rows, np.ones(patches, bool), None, plan)
        blocks = list(store.blocks(13))
        assert [(block.first, block.lengths) for block in blocks] == [(0, [4, 9]), (2, [4]), (3, [16]), (4, [4])]
        assert store.bytes_to_copy == (37 * 2 * 4 if copied else 0)
        for block in blocks:
            for place, own in enumerate(torch.split(block.rows, block.lengths), block.first):
                held = store.features(place)
                assert own.tolist() == held.tolist()
                assert held[0, 0] == 100 * place
                assert (own.data_ptr() != held.data_ptr()) == copied
        (whole,) = store.blocks(100)  # of more than one block: joined
        assert whole.rows.tolist() == [row for block in blocks for row in block.rows.tolist()]


def test_a_tensor_of_images_is_matched_where_it_lies():
    rows = torch.nn.functional.normalize(torch.randn(5, 16, 8, generator=torch.Generator().manual_seed(0)), dim=2)
    blocks = list(whole_set._joined(rows))
    assert blocks[0].rows.data_ptr() == rows.data_ptr()
    for one, other in zip(match_set(rows), match_set(list(rows)), strict=True):
        assert one.distances.tolist() == other.distances.tolist()
        assert one.rows.tolist() == other.rows.tolist()


def test_the_temporary_file_is_private(tiny_backbone, tmp_path):
    model = BatchedModel(tiny_backbone, resolution=64, masking="off", memory_budget=0, spill_folder=str(tmp_path))
    model.score_set(IMAGES)
    (file,) = Path(tmp_path).iterdir()
    assert file.stat().st_mode & 0o077 == 0


def test_queries_go_in_groups_that_fit_the_memory_budget(tiny_backbone, monkeypatch):
    model = BatchedModel(tiny_backbone, resolution=64, masking="off", kernel="torch")
    model.collect((str(place), image) for place, image in enumerate(IMAGES))
    together = model.score_stored(range(len(IMAGES)))
    sizes, match = [], model._match
    monkeypatch.setattr(model, "_match", lambda queries: sizes.append(len(queries)) or match(queries))
    model.memory_budget = 2 * 4 * 16 * (tiny_backbone.embed_dim + 1)  # two images of 16 patches, one distance each
    in_groups = model.score_stored(range(len(IMAGES)))
    assert max(sizes) == 2
    assert sum(sizes) == len(IMAGES)
    for one, other in zip(together, in_groups, strict=True):
        np.testing.assert_array_equal(one.distances, other.distances)


class TestWholeSetAtOnce:
    """What `match_all` finds is what `score_stored` would find by itself."""

    @pytest.fixture
    def collected(self, tiny_backbone):
        kernel = "tiles_f32" if not kernel_rows._missing("tiles_f32", "cpu", tiny_backbone.embed_dim) else "torch"
        if kernel == "torch":
            pytest.skip("needs numba and a processor with AVX-512")
        model = BatchedModel(tiny_backbone, resolution=64, masking="off", kernel=kernel)
        model.collect((str(place), image) for place, image in enumerate(IMAGES))
        return model

    def test_scores_are_the_same(self, collected):
        alone = collected.score_stored(range(len(IMAGES)))
        assert collected.match_all()
        assert collected.store.matches is not None
        for one, other in zip(alone, collected.score_stored(range(len(IMAGES))), strict=True):
            np.testing.assert_array_equal(one.distances, other.distances)
            np.testing.assert_array_equal(one.matched_rows, other.matched_rows)

    def test_not_beyond_the_memory_budget(self, collected):
        needed = set_bytes([16] * len(IMAGES), collected.backbone.embed_dim, "official", None)
        collected.memory_budget = needed - 1
        assert not collected.match_all()
        collected.memory_budget = needed
        assert collected.match_all()

    def test_only_where_a_kernel_compares_each_pair_once(self, tiny_backbone):
        for settings in ({"kernel": "torch"}, {"kernel": "auto", "mode": "musc"}):
            model = BatchedModel(tiny_backbone, resolution=64, masking="off", **settings)
            model.collect((str(place), image) for place, image in enumerate(IMAGES))
            assert not model.match_all()

    def test_matches_go_with_the_set(self, collected):
        collected.match_all()
        assert copy.deepcopy(collected).store.matches is None
        collected.clear()
        assert collected.store.matches is None
        with pytest.raises(InputError, match="at least two"):
            collected.match_all()

    def test_steps_are_shown(self, collected, monkeypatch):
        monkeypatch.setattr(torch_model, "BLOCK_ROWS", 32)
        seen: list[int] = []

        def steps(numbers):
            for number in numbers:
                seen.append(number)
                yield number

        collected.match_all(steps)
        assert seen == [0, 1, 2]


def test_a_closed_store_says_so(tiny_backbone, tmp_path):
    model = BatchedModel(tiny_backbone, resolution=64, masking="off", memory_budget=0, spill_folder=str(tmp_path))
    model.collect((str(number), image) for number, image in enumerate(IMAGES))
    store = model.store
    assert len(store.features(0)) == 16
    known = list(store.images)
    store.close()
    store.images.extend(known)
    with pytest.raises(ConfigError, match="the feature store was closed"):
        store.features(0)


@pytest.mark.parametrize(
    ("loader", "message"),
    [([1, 2], "list as a loader: expected torch's DataLoader"), (DataLoader([1, 2]), "yields int without an image")],
)
def test_loaders_that_cannot_be_read_first_are_refused(loader, message):
    with pytest.raises(ConfigError, match=message):
        list(read_all(loader, 1.0, None))


def test_one_call_encodes_images_of_one_size(model):
    small, large = model.prepare(textured(1)), model.prepare(textured(2, (96, 192)))
    model.batch_size = 1
    with pytest.raises(ImageError, match=r"\(64, 64, 3\), \(64, 128, 3\); expected at least one, all of one size"):
        model.encode([small, large])
    with pytest.raises(ImageError, match="images to encode: none"):
        model.encode([])
    assert torch.equal(model.encode(np.stack([small, small])), model.encode([small, small]))
