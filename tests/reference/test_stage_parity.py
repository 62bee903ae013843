"""Every stage against the official code's figures (golden/stages), within DESIGN's tolerances."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from anomalydino_plugin import (
    FewShotModel,
    anomaly_map,
    first_principal_component,
    foreground_mask,
    image_score,
    nearest,
    prepare_image,
    read_image,
    rotate_image,
)

MASKED = ("screw",)


class Case(NamedTuple):
    name: str
    resolution: int
    reference: str
    test: str


CASES = [
    Case(
        "bottle_broken_large_000_448", 448, "mvtec/bottle/train/good/000.png", "mvtec/bottle/test/broken_large/000.png"
    ),
    Case(
        "bottle_broken_large_000_672", 672, "mvtec/bottle/train/good/000.png", "mvtec/bottle/test/broken_large/000.png"
    ),
    Case("bottle_good_000_448", 448, "mvtec/bottle/train/good/000.png", "mvtec/bottle/test/good/000.png"),
    Case(
        "cookie_nonsquare_448",
        448,
        "cookie_nonsquare/train/good/normal-1.jpg",
        "cookie_nonsquare/test/anomaly/anomaly-1.jpg",
    ),
    Case("screw_good_000_448", 448, "mvtec/screw/train/good/000.png", "mvtec/screw/test/good/000.png"),
    Case("screw_scratch_head_000_448", 448, "mvtec/screw/train/good/000.png", "mvtec/screw/test/scratch_head/000.png"),
]
pytestmark = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture
def golden(assets: Path, case: Case):
    return np.load(assets / "golden" / "stages" / f"{case.name}.npz")


@pytest.fixture
def tested(assets: Path, case: Case):
    return read_image(assets / "data" / case.test)


@pytest.fixture(scope="module")
def models(dinov2):
    """One fitted model for each reference and resolution: 8 forward passes, shared."""
    made: dict[tuple[str, int], FewShotModel] = {}

    def get(case: Case, assets: Path) -> FewShotModel:
        if (case.reference, case.resolution) not in made:
            masking = "on" if case.name.startswith(MASKED) else "off"
            model = FewShotModel(dinov2, resolution=case.resolution, masking=masking, map_area="official")
            made[case.reference, case.resolution] = model.fit([assets / "data" / case.reference])
        return made[case.reference, case.resolution]

    return get


def test_prepared_image(golden, tested, case):
    if "prepared_image" not in golden:
        pytest.skip("this case has no prepared image")
    ours = prepare_image(tested, case.resolution, 14)[0].numpy()
    assert ours.shape == golden["prepared_image"].shape
    assert np.abs(ours - golden["prepared_image"]).max() <= 1e-6


def test_rotated_reference(assets, case):
    path = assets / "golden" / "stages" / f"{case.name}_reference_rot45.png"
    if not path.exists():
        pytest.skip("this case has no rotated reference")
    ours = rotate_image(read_image(assets / "data" / case.reference), 45)
    assert np.array_equal(ours, np.array(Image.open(path).convert("RGB")))


def test_patch_features(golden, tested, dinov2, case):
    prepared = torch.from_numpy(golden["prepared_image"])[None] if "prepared_image" in golden else None
    with torch.inference_mode():
        ours = dinov2(prepare_image(tested, case.resolution, 14) if prepared is None else prepared)[0].numpy()
    reference = golden["patch_features"]
    relative = np.linalg.norm(ours - reference, axis=1) / np.linalg.norm(reference, axis=1)
    assert relative.max() <= 1e-4


def test_first_principal_component(golden, case):
    ours, reference = first_principal_component(golden["patch_features"]), golden["first_pc_fullsvd"]
    sign = np.sign(np.dot(ours, reference))
    assert np.abs(ours - sign * reference).max() <= 1e-3 * np.abs(reference).max()


def test_foreground(golden, case):
    if not case.name.startswith(MASKED):
        pytest.skip("the official code does not mask this object")
    ours = foreground_mask(first_principal_component(golden["patch_features"]), tuple(golden["grid_size"]))
    assert np.count_nonzero(ours != golden["foreground"]) <= 2


def test_bank_rows(golden, assets, models, case):
    model = models(case, assets)
    assert len(model.memory.rows) == golden["bank_rows"]
    for ours, reference in ((model.memory.rows[0], "bank_first_row"), (model.memory.rows[-1], "bank_last_row")):
        expected = golden[reference] / np.linalg.norm(golden[reference])
        assert np.linalg.norm(ours.numpy() - expected) <= 1e-4


def test_distances_and_matched_rows(golden, assets, models, case):
    model, foreground = models(case, assets), golden["foreground"]
    queries = torch.nn.functional.normalize(torch.from_numpy(golden["patch_features"][foreground]), dim=1)
    match = nearest(queries, model.memory.rows)
    expected = golden["distances"].reshape(-1)[foreground]
    assert np.abs(match.distances[:, 0].numpy() - expected).max() <= 1e-4 * expected.max()
    differing = np.flatnonzero(match.rows[:, 0].numpy() != golden["nn_row"].reshape(-1))
    for query in differing:  # only where both rows are equally near
        theirs = model.memory.rows[int(golden["nn_row"].reshape(-1)[query])]
        assert abs((1 - queries[query] @ theirs).item() - match.distances[query, 0].item()) <= 1e-6


def test_score_from_golden_distances(golden, case):
    score = image_score(torch.from_numpy(golden["distances"].reshape(-1))).item()
    assert score == pytest.approx(float(golden["score"]), rel=1e-4)


def test_map_from_golden_distances(golden, case):
    ours = anomaly_map(torch.from_numpy(golden["distances"].astype(np.float32)), tuple(golden["map_shape"])).numpy()
    assert ours.shape == tuple(golden["map_shape"])
    assert np.abs(ours[::8, ::8] - golden["map_stride8"]).max() <= 1e-4 * golden["map_stride8"].max()


def test_whole_path(golden, assets, models, case):
    detection = models(case, assets).score(assets / "data" / case.test)
    assert detection.score == pytest.approx(float(golden["score"]), rel=1e-4)
    reference = golden["distances"]
    assert np.abs(detection.distances - reference).max() <= 1e-4 * reference.max()
    ours = models(case, assets).anomaly_map(detection)
    assert np.abs(ours[::8, ::8] - golden["map_stride8"]).max() <= 1e-4 * golden["map_stride8"].max()
