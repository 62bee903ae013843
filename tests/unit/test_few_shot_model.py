import copy

import numpy as np
import pytest
import torch
from generated import textured

from anomalydino_plugin import BankError, ConfigError, FewShotModel, ImageError, calibrate


@pytest.fixture
def model(tiny_backbone):
    return FewShotModel(tiny_backbone, resolution=64, masking="off").fit([textured(0)])


def test_a_reference_image_has_distance_zero_to_itself(model):
    detection = model.score(textured(0))
    assert detection.score == pytest.approx(0, abs=1e-6)
    assert detection.distances.shape == detection.geometry.grid == (4, 4)


def test_matches_name_image_rotation_and_position(model):
    detection = model.score(textured(0))
    source = model.bank.source(int(detection.matched_rows[1, 2]))
    assert (source.image_id, source.rotation, source.row, source.column) == ("0", 0.0, 1, 2)


def test_eight_rotations_enter_the_bank(model):
    assert len(model.memory.rows) == 8 * 16
    assert model.bank.angles == tuple(float(angle) for angle in range(0, 360, 45))


def test_a_defect_scores_higher(model):
    assert model.score(textured(0, spot=True)).score > 0.1 > model.score(textured(0)).score


def test_the_bank_is_where_the_backbone_is(tiny_backbone):
    elsewhere = copy.deepcopy(tiny_backbone).to("meta")  # stands for a GPU
    assert FewShotModel(elsewhere, resolution=64).memory.rows.device.type == "meta"


def test_k_neighbours_are_averaged(tiny_backbone):
    three = FewShotModel(tiny_backbone, resolution=64, masking="off", k=3).fit([textured(0)])
    one = FewShotModel(tiny_backbone, resolution=64, masking="off").fit([textured(0)])
    assert (three.score(textured(1)).distances >= one.score(textured(1)).distances - 1e-7).all()


def test_masked_patches_have_distance_zero_and_no_match(tiny_backbone, monkeypatch):
    monkeypatch.setattr(
        "anomalydino_plugin.patch_model.patch_foreground", lambda features, grid, morphology: np.arange(16) < 8
    )
    masked = FewShotModel(tiny_backbone, resolution=64, masking="on").fit([textured(0)])
    detection = masked.score(textured(1))
    assert (detection.distances[2:] == 0).all()
    assert (detection.matched_rows[2:] == -1).all()
    assert (detection.distances[:2] > 0).all()


def test_bank_survives_a_file_and_a_state_dict(model, tiny_backbone, tmp_path):
    expected = model.score(textured(3)).score
    model.save_bank(tmp_path / "bank.safetensors")
    from_file = FewShotModel(tiny_backbone, resolution=64, masking="off")
    from_file.load_bank(tmp_path / "bank.safetensors")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    from_state = FewShotModel(tiny_backbone, resolution=64, masking="off")
    from_state.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for again in (from_file, from_state):
        assert again.score(textured(3)).score == expected
        assert again.bank.source(17) == model.bank.source(17)


@pytest.mark.parametrize("change", [{"resolution": 96}, {"rotations": "informed"}, {"reference_masking": True}])
def test_a_bank_of_other_settings_is_refused(model, tiny_backbone, tmp_path, change):
    model.save_bank(tmp_path / "bank.safetensors")
    settings = {"resolution": 64, "masking": "off", **change}
    with pytest.raises(BankError, match=next(iter(change))):
        FewShotModel(tiny_backbone, **settings).load_bank(tmp_path / "bank.safetensors")
    with pytest.raises(BankError, match=next(iter(change))):
        FewShotModel(tiny_backbone, **settings).load_state_dict(model.state_dict())


def test_empty_bank(tiny_backbone):
    empty = FewShotModel(tiny_backbone, resolution=64)
    with pytest.raises(BankError, match="fit the model"):
        empty.score(textured(0))
    with pytest.raises(BankError, match="at least one reference"):
        empty.fit([])


@pytest.mark.parametrize(
    "change",
    [
        {"k": 0},
        {"masking": True},
        {"morphology": "disc"},
        {"map_area": "all"},
        {"resolution": 8},
        {"statistic": "mean"},
    ],
)
def test_settings_out_of_range(tiny_backbone, change):
    with pytest.raises(ConfigError, match="expected"):
        FewShotModel(tiny_backbone, **change)


def test_arrays_of_other_kinds(model):
    for wrong in (np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3), np.float32)):
        with pytest.raises(ImageError, match="uint8 RGB"):
            model.score(wrong)


def test_any_aspect_ratio_and_map_size(model):
    detection = model.score(textured(5, (80, 130)))
    assert detection.geometry.grid == (4, 6)
    assert model.anomaly_map(detection).shape == (80, 130)


def test_forward_equals_score(model):
    images = torch.stack([torch.from_numpy(textured(seed)).permute(2, 0, 1) / 255 for seed in (1, 2)])
    prediction = model(images)
    assert prediction.anomaly_map.shape == (2, 1, 96, 96)
    for score, seed in zip(prediction.pred_score, (1, 2), strict=True):
        assert score.item() == pytest.approx(model.score(textured(seed)).score, abs=1e-6)


def test_calibration_sources(model, tiny_backbone):
    assert calibrate(model)[2:4] == ("rotations", 8)
    assert calibrate(model, [textured(1), textured(2)])[2:4] == ("held-out", 2)
    three = FewShotModel(tiny_backbone, resolution=64, masking="off").fit([textured(seed) for seed in range(3)])
    calibration = calibrate(three)
    assert calibration[2:4] == ("leave-one-out", 3)
    without = FewShotModel(tiny_backbone, resolution=64, masking="off").fit([textured(1), textured(2)])
    assert calibration.image_threshold >= without.score(textured(0)).score  # the first image left out
    single = FewShotModel(tiny_backbone, resolution=64, masking="off", rotations="informed").fit([textured(0)])
    with pytest.raises(BankError, match="single unrotated"):
        calibrate(single)
