"""Banks edited against banks built from scratch: row for row, score for score."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from generated import save, textured

from anomalydino_plugin import (
    BankError,
    ConfigError,
    FewShotModel,
    ImageError,
    MemoryBank,
    drop_images,
    estimate_bank,
    merge_banks,
    nearest,
    subsample_coreset,
    subsample_randomly,
)
from anomalydino_plugin.bank_editing import keep_rows
from anomalydino_plugin.masking import MaskingDecision
from anomalydino_plugin.memory_bank import BankBuilder

FINGERPRINT = {"backbone": "tiny", "resolution": "64"}


def built(*image_ids: str, angles=(0.0, 90.0), fingerprint=None) -> MemoryBank:
    """Rows follow from image and angle alone; every third patch is background."""
    builder = BankBuilder()
    for image_id in image_ids:
        for angle in angles:
            generator = torch.Generator().manual_seed(1000 * ord(image_id[0]) + int(angle))
            builder.add(
                torch.randn(6, 4, generator=generator),
                (2, 3),
                image_id=image_id,
                size=(20 + ord(image_id[0]), 30),
                angle=angle,
                foreground=torch.arange(6) % 3 > 0,
            )
    return builder.freeze(FINGERPRINT if fingerprint is None else fingerprint)


def assert_same_bank(found: MemoryBank, expected: MemoryBank) -> None:
    assert torch.equal(found.rows, expected.rows)
    assert torch.equal(found.foreground, expected.foreground)
    assert [found.source(row) for row in range(len(found))] == [expected.source(row) for row in range(len(expected))]
    assert (found.image_ids, found.sizes, found.fingerprint) == (
        expected.image_ids,
        expected.sizes,
        expected.fingerprint,
    )


# Merge and drop


def test_merged_equals_built_from_scratch():
    merged = merge_banks([built("a", "b"), built("c"), built("d", "e")])
    assert_same_bank(merged, built("a", "b", "c", "d", "e"))
    assert merged.angles == (0.0, 90.0)
    assert merged.sources.dtype == torch.int32


def test_merging_leaves_the_parts_alone():
    parts = [built("a"), built("b")]
    merge_banks(parts).sources.fill_(7)
    assert_same_bank(parts[0], built("a"))
    assert_same_bank(parts[1], built("b"))


def test_one_bank_merges_to_itself():
    assert_same_bank(merge_banks([built("a", "b")]), built("a", "b"))


@pytest.mark.parametrize("angles", [(90.0, 0.0), (45.0,), (180.0, 90.0, 0.0)])
def test_merged_banks_may_list_their_angles_in_another_order(angles):
    first, second = built("a"), built("b", angles=angles)
    merged = merge_banks([first, second])
    expected = [part.source(row) for part in (first, second) for row in range(len(part))]
    assert [merged.source(row) for row in range(len(merged))] == expected
    assert torch.equal(merged.rows, torch.cat([first.rows, second.rows]))


def test_merged_bank_lies_where_the_first_does():
    on_device, on_cpu = built("a"), built("b")
    on_device = dataclasses.replace(
        on_device,
        rows=on_device.rows.to("meta"),
        sources=on_device.sources.to("meta"),
        foreground=on_device.foreground.to("meta"),
    )
    merged = merge_banks([on_device, on_cpu])
    assert {merged.rows.device.type, merged.sources.device.type, merged.foreground.device.type} == {"meta"}
    assert merged.rows.shape == (24, 4)


def test_merging_refuses():
    with pytest.raises(BankError, match="at least one"):
        merge_banks([])
    with pytest.raises(BankError, match=r"more than one bank: \['b'\]"):
        merge_banks([built("a", "b"), built("b", "c")])
    with pytest.raises(BankError, match="resolution: bank '96', model '64'"):
        merge_banks([built("a"), built("b", fingerprint={**FINGERPRINT, "resolution": "96"})])
    with pytest.raises(BankError, match="morphology"):
        merge_banks([built("a"), built("b", fingerprint={**FINGERPRINT, "morphology": "grid"})])


@pytest.mark.parametrize("dropped", [["a"], ["c"], ["b", "d"], ["d", "a", "b"]])
def test_dropped_equals_built_without(dropped):
    kept = [name for name in "abcd" if name not in dropped]
    assert_same_bank(drop_images(built(*"abcd"), dropped), built(*kept))


def test_dropping_takes_any_iterable_and_one_name():
    full = built("a.png", "b.png")
    assert drop_images(full, (name for name in ["a.png"])).image_ids == ("b.png",)
    assert drop_images(full, "b.png").image_ids == ("a.png",)
    assert_same_bank(drop_images(full, []), full)
    assert_same_bank(full, built("a.png", "b.png"))  # untouched


def test_dropping_refuses():
    with pytest.raises(BankError, match=r"not in the bank: \['x', 'y'\].*holds 2"):
        drop_images(built("a", "b"), ["y", "a", "x"])
    with pytest.raises(BankError, match="empty the bank"):
        drop_images(built("a", "b"), ["a", "b"])


def test_notes_by_image_follow_their_images():
    first = dataclasses.replace(built("a"), notes={"tests": '{"a": [1]}', "made": "on a Tuesday"})
    second = dataclasses.replace(built("b"), notes={"tests": '{"b": [2]}', "made": "on a Friday", "list": "[3]"})
    merged = merge_banks([first, second])
    assert merged.notes == {"tests": '{"a": [1], "b": [2]}', "made": "on a Tuesday", "list": "[3]"}
    assert drop_images(merged, ["a"]).notes == {"tests": '{"b": [2]}', "made": "on a Tuesday", "list": "[3]"}


# Subsampling


@pytest.fixture(scope="module")
def large() -> MemoryBank:
    generator = torch.Generator().manual_seed(0)
    builder = BankBuilder()
    for name in "abc":
        builder.add(torch.randn(100, 32, generator=generator), (10, 10), image_id=name, size=(100, 100))
    return builder.freeze(FINGERPRINT)


def kept_in(part: MemoryBank, whole: MemoryBank) -> list[int]:
    """Where each row of a part stands in the whole, by provenance; fails where the row itself is another."""
    position = {whole.source(row): row for row in range(len(whole))}
    rows = [position[part.source(row)] for row in range(len(part))]
    assert torch.equal(part.rows, whole.rows[rows])
    assert torch.equal(part.foreground, whole.foreground[rows])
    return rows


@pytest.mark.parametrize("subsample", [subsample_randomly, subsample_coreset])
@pytest.mark.parametrize(("share", "count"), [(0.1, 30), (0.5, 150), (0.999, 299), (0.0001, 1), (1.0, 300)])
def test_share_of_the_rows_in_their_order(large, subsample, share, count):
    part = subsample(large, share)
    rows = kept_in(part, large)
    assert len(rows) == count
    assert rows == sorted(set(rows))
    assert (part.image_ids, part.sizes, part.fingerprint) == (large.image_ids, large.sizes, large.fingerprint)


@pytest.mark.parametrize("subsample", [subsample_randomly, subsample_coreset])
def test_seed_decides(large, subsample):
    rows = [kept_in(subsample(large, 0.1, seed=seed), large) for seed in (0, 0, 1)]
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]


@pytest.mark.parametrize("subsample", [subsample_randomly, subsample_coreset])
def test_subsampling_leaves_the_global_generators_alone(large, subsample):
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    subsample(large, 0.1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize("subsample", [subsample_randomly, subsample_coreset])
@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_share_out_of_range(large, subsample, share):
    with pytest.raises(ConfigError, match="more than 0 and at most 1"):
        subsample(large, share)


def test_a_coreset_covers_better_than_chance(large):
    radius = {
        subsample: max(float(nearest(large.rows, subsample(large, 0.2, seed).rows).distances.max()) for seed in (0, 1))
        for subsample in (subsample_randomly, subsample_coreset)
    }
    assert radius[subsample_coreset] < radius[subsample_randomly]


def test_a_coreset_is_what_anomalib_selects(large):
    """Our sampler keeps one buffer where anomalib's takes a new one for each centre; the choice is the same."""
    from anomalib.models.components import KCenterGreedy

    sampler = KCenterGreedy(embedding=large.rows, sampling_ratio=0.1)
    sampler.model.random_state = np.random.RandomState(3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = sorted(set(sampler.select_coreset_idxs()))
    found = subsample_coreset(large, sampler.coreset_size / len(large), seed=3)
    assert torch.equal(found.rows, large.rows[expected])


def test_a_coreset_looks_at_every_feature():
    """Each row differs from the first in one feature: a projection that skips a feature skips its row."""
    rows = torch.nn.functional.normalize(torch.cat([torch.ones(1, 64), torch.ones(64, 64) + 20 * torch.eye(64)]), dim=1)
    rows = torch.cat([rows[:1].expand(200, 64), rows[1:]])
    sources = torch.stack([torch.zeros(264), torch.zeros(264), torch.arange(264), torch.zeros(264)], dim=1).int()
    bank = MemoryBank(rows, sources, torch.ones(264, dtype=torch.bool), ("a",), (0.0,), ((4, 4),))
    kept = subsample_coreset(bank, 66 / 264)
    assert (nearest(rows, kept.rows).distances < 1e-6).all()


def test_rows_that_repeat_enter_a_coreset_once():
    bank = built("a")
    bank = dataclasses.replace(bank, rows=bank.rows[[0, 1] * 6])
    kept = subsample_coreset(bank, 0.5)
    sources = [kept.source(row) for row in range(len(kept))]
    assert len(set(sources)) == len(sources) <= 3  # six would be half of the twelve rows
    assert {tuple(row) for row in kept.rows.tolist()} == {tuple(row) for row in bank.rows.tolist()}


def test_keep_rows_by_mask_and_by_index():
    bank = built("a", "b")
    by_index = keep_rows(bank, torch.tensor([3, 20]))
    assert kept_in(by_index, bank) == [3, 20]
    mask = torch.zeros(24, dtype=torch.bool)
    mask[[3, 20]] = True
    assert_same_bank(keep_rows(bank, mask), by_index)
    assert by_index.image_ids == ("a", "b")


# Estimates


@pytest.mark.parametrize("rotations", ["agnostic", "informed", (90, 0, 45)])
def test_estimate_is_exact(tiny_backbone, rotations):
    model = FewShotModel(tiny_backbone, resolution=64, masking="off", rotations=rotations)
    estimate = model.estimate(80, 130, references=2)
    bank = model.fit([textured(0, (80, 130)), textured(1, (80, 130))]).bank
    assert estimate.rows == len(bank)
    assert estimate.bytes == sum(
        part.numel() * part.element_size() for part in (bank.rows, bank.sources, bank.foreground)
    )
    assert estimate == estimate_bank(2, len(model.angles), (4, 6), tiny_backbone.embed_dim)


# The model's own bank

MODELS = {
    "plain": {"masking": "off", "rotations": "informed"},
    "other rotations": {"masking": "off", "rotations": (90, 0, 45)},
    "masked": {"masking": "on", "rotations": (45, 0)},
    "masked references": {"masking": "auto", "reference_masking": True, "rotations": (180, 0, 90), "k": 2},
}


@pytest.fixture
def verdicts(monkeypatch):
    """Masks by the first feature; masking tests answer from this list, then with yes."""
    answers: list[bool] = []

    def judge(features, grid, morphology):
        use_mask = answers.pop(0) if answers else True
        return MaskingDecision(use_mask, 0.9, 0.5, 0.1, float(features[0, 0]), f"mask {use_mask}")

    monkeypatch.setattr("anomalydino_plugin.few_shot.torch_model.masking_test", judge)
    monkeypatch.setattr(
        "anomalydino_plugin.patch_model.patch_foreground",
        lambda features, grid, morphology: features[:, 0] > np.median(features[:, 0]),
    )
    return answers


@pytest.fixture
def images(tmp_path) -> list[Path]:
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for number, path in enumerate(paths):
        save(path, textured(number, (64 + 16 * number, 64)))
    return paths


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def new_model(request, tiny_backbone, verdicts):
    return lambda: FewShotModel(tiny_backbone, resolution=64, **request.param)


def assert_same_model(found: FewShotModel, expected: FewShotModel) -> None:
    assert_same_bank(found.bank, expected.bank)
    assert found.masking_decision == expected.masking_decision
    assert found.use_mask == expected.use_mask
    for probe in (textured(50), textured(1, (80, 64), spot=True)):
        one, other = found.score(probe), expected.score(probe)
        assert one.score == other.score > 0
        assert np.array_equal(one.distances, other.distances)
        assert np.array_equal(one.foreground, other.foreground)
        assert matched(found, one) == matched(expected, other)


def matched(model: FewShotModel, detection) -> list[object]:
    return [model.bank.source(row) if row >= 0 else None for row in detection.matched_rows.reshape(-1).tolist()]


def assert_same_after_a_file(model: FewShotModel, again: FewShotModel, path: Path) -> None:
    model.save_bank(path)
    again.load_bank(path)
    assert_same_model(again, model)


def test_extended_equals_fitted_on_all(new_model, images, tmp_path):
    extended = new_model().fit(images[:2]).extend(images[2:3]).extend(images[3:])
    assert_same_model(extended, new_model().fit(images))
    assert_same_after_a_file(extended, new_model(), tmp_path / "bank.safetensors")


def test_extended_by_arrays_that_are_named_by_position(new_model, images):
    arrays = [textured(number) for number in range(3)]
    extended = new_model().fit(arrays[:1]).extend(arrays[1:])
    assert extended.bank.image_ids == ("0", "1", "2")
    assert_same_model(extended, new_model().fit(arrays))


def test_dropped_equals_fitted_without(new_model, images, tmp_path):
    dropped = new_model().fit(images).drop([str(images[0]), str(images[2])])
    assert_same_model(dropped, new_model().fit([images[1], images[3]]))
    assert_same_after_a_file(dropped, new_model(), tmp_path / "bank.safetensors")


def test_dropped_and_extended_again(new_model, images):
    model = new_model().fit(images).drop(str(images[0])).extend(images[:1])
    assert_same_model(model, new_model().fit([*images[1:], images[0]]))


def test_a_loaded_bank_can_be_extended(new_model, images, tmp_path):
    new_model().fit(images[:2]).save_bank(tmp_path / "bank.safetensors")
    again = new_model()
    again.load_bank(tmp_path / "bank.safetensors")
    assert_same_model(again.extend(images[2:]), new_model().fit(images))


def test_a_merged_bank_can_be_set(new_model, images):
    model = new_model()
    model.set_bank(merge_banks([new_model().fit(images[:1]).bank, new_model().fit(images[1:]).bank]))
    assert_same_model(model, new_model().fit(images))


def test_a_bank_of_other_settings_cannot_be_set_or_merged(tiny_backbone, images):
    plain = FewShotModel(tiny_backbone, resolution=64, masking="off", rotations=(0, 90)).fit(images[:1])
    turned = FewShotModel(tiny_backbone, resolution=64, masking="off", rotations=(90, 0)).fit(images[1:2])
    with pytest.raises(BankError, match="rotations"):
        plain.set_bank(turned.bank)
    with pytest.raises(BankError, match="rotations"):
        merge_banks([plain.bank, turned.bank])
    assert plain.bank.image_ids == (str(images[0]),)


def test_extending_by_an_image_that_is_there(new_model, images):
    model = new_model().fit(images[:2])
    with pytest.raises(BankError, match="more than one bank"):
        model.extend([images[2], images[1]])
    assert_same_model(model, new_model().fit(images[:2]))
    assert_same_model(model.extend(images[2:]), new_model().fit(images))


def test_a_failed_extension(new_model, images, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    model = new_model().fit(images[:2])
    with pytest.raises(ImageError, match=r"broken\.png"):
        model.extend([images[2], broken])
    assert_same_model(model, new_model().fit(images[:2]))
    assert_same_model(model.extend(images[2:]), new_model().fit(images))


def test_what_a_failed_extension_had_added_never_becomes_the_bank(tiny_backbone, images, tmp_path):
    model = FewShotModel(tiny_backbone, resolution=64, masking="off").fit(images[:2])
    with pytest.raises(ImageError):
        model.extend([images[2], tmp_path / "missing.png"])
    model.add_reference(textured(3), "other")
    assert model.freeze().image_ids == ("other",)


def test_an_extension_needs_a_bank(tiny_backbone, images):
    with pytest.raises(BankError, match="empty"):
        FewShotModel(tiny_backbone, resolution=64).extend(images)
    with pytest.raises(BankError, match="at least one reference"):
        FewShotModel(tiny_backbone, resolution=64, masking="off").fit(images[:1]).extend([])


def test_arrays_after_a_drop_get_new_names(tiny_backbone):
    model = FewShotModel(tiny_backbone, resolution=64, masking="off", rotations="informed")
    model.fit([textured(0), textured(1), textured(2)]).drop(["0"]).extend([textured(3)])
    assert model.bank.image_ids[:2] == ("1", "2")
    assert len(set(model.bank.image_ids)) == 3
    assert model.score(textured(3)).score == pytest.approx(0, abs=1e-6)


def test_a_drop_that_would_turn_the_masking_decision_is_refused(tiny_backbone, images, verdicts):
    verdicts[:] = [True, False, True]
    model = FewShotModel(tiny_backbone, resolution=64, masking="auto", reference_masking=True).fit(images[:3])
    rows = model.bank.rows.clone()
    with pytest.raises(BankError, match=r"1\.png' is the first reference.*'mask False'.*fit again"):
        model.drop([str(images[0])])
    assert torch.equal(model.bank.rows, rows)
    assert model.use_mask
    assert model.drop([str(images[1])]).bank.image_ids == (str(images[0]), str(images[2]))
    assert model.drop([str(images[0])]).use_mask  # the third decides as the first did


def test_a_drop_that_turns_nothing_where_masking_is_set(tiny_backbone, images, verdicts):
    verdicts[:] = [True, False]
    model = FewShotModel(tiny_backbone, resolution=64, masking="on").fit(images[:2])
    assert model.drop([str(images[0])]).use_mask


def test_the_first_reference_decides_for_an_extension(tiny_backbone, images, verdicts):
    verdicts[:] = [False, True, True]
    extended = FewShotModel(tiny_backbone, resolution=64, masking="auto", reference_masking=True)
    extended.fit(images[:1]).extend(images[1:3])
    verdicts[:] = [False, True, True]
    scratch = FewShotModel(tiny_backbone, resolution=64, masking="auto", reference_masking=True).fit(images[:3])
    assert not extended.use_mask
    assert_same_model(extended, scratch)


def test_a_subsampled_bank_scores_no_lower(tiny_backbone, images):
    model = FewShotModel(tiny_backbone, resolution=64, masking="off").fit(images)
    before = model.score(textured(50)).distances
    for subsample in (subsample_randomly, subsample_coreset):
        smaller = FewShotModel(tiny_backbone, resolution=64, masking="off")
        smaller.set_bank(subsample(model.bank, 0.3))
        after = smaller.score(textured(50)).distances
        assert (after >= before - 1e-6).all()
        assert (after > before).any()
