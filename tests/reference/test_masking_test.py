"""The masking test on real references: the paper's outcome, and images whose right answer is plain."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage
import torch

from anomalydino_plugin import masking_test, plan_geometry, prepare_image, read_image

TEXTURES = ("brick", "grass", "gravel")


def decide(backbone, image: np.ndarray, resolution: int = 448):
    grid = plan_geometry(*image.shape[:2], resolution, 14).grid
    with torch.inference_mode():
        features = backbone(prepare_image(image, resolution, 14))[0].numpy()
    return masking_test(features, grid)


@pytest.mark.parametrize("resolution", [448, 672])
@pytest.mark.parametrize(
    ("category", "expected"),
    [("mvtec/bottle", False), ("mvtec/screw", True), ("hazelnut_toy", True), ("cookie_nonsquare", True)],
)
def test_paper_outcome(assets, dinov2, category, expected, resolution):
    first = sorted((assets / "data" / category / "train" / "good").iterdir())[0]
    decision = decide(dinov2, read_image(first), resolution)
    assert decision.use_mask is expected, decision.reason
    assert not decision.confirm_by_eye


@pytest.mark.thorough
@pytest.mark.parametrize("category", ["bottle", "screw"])
def test_other_references_of_the_same_object(assets, dinov2, category):
    for path in sorted((assets / "data" / "mvtec" / category / "train" / "good").iterdir())[1:5]:
        assert decide(dinov2, read_image(path)).use_mask is (category == "screw")


@pytest.mark.parametrize("name", TEXTURES)
@pytest.mark.parametrize("edge", [512, 256])
def test_textures_get_no_mask(dinov2, name, edge):
    image = read_image(Path(skimage.__file__).parent / "data" / f"{name}.png")[:edge, :edge]
    decision = decide(dinov2, np.ascontiguousarray(image))
    assert not decision.use_mask, decision.reason


def test_close_up_of_an_object_is_a_texture(assets, dinov2):
    image = read_image(sorted((assets / "data" / "hazelnut_toy" / "train" / "good").iterdir())[0])
    height, width = image.shape[:2]
    close_up = image[int(0.38 * height) : int(0.62 * height), int(0.38 * width) : int(0.62 * width)]
    assert not decide(dinov2, np.ascontiguousarray(close_up)).use_mask


def test_the_frame_filler_at_half_its_size_is_an_object(assets, dinov2):
    image = read_image(sorted((assets / "data" / "mvtec" / "bottle" / "train" / "good").iterdir())[0])
    small = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    page = np.full_like(image, np.median(image[:5].reshape(-1, 3), axis=0).astype(np.uint8))
    top, left = (page.shape[0] - small.shape[0]) // 2, (page.shape[1] - small.shape[1]) // 2
    page[top : top + small.shape[0], left : left + small.shape[1]] = small
    assert decide(dinov2, page).use_mask
