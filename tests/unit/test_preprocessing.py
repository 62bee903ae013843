import numpy as np
import pytest
import torch

from anomalydino_plugin import ConfigError, ImageError, plan_geometry, prepare_image, prepare_pixels, rotate_image
from anomalydino_plugin.image_tensors import to_uint8
from anomalydino_plugin.preprocessing import AGNOSTIC_ANGLES, rotation_angles


@pytest.mark.parametrize(
    ("size", "resolution", "resized", "grid"),
    [
        ((900, 900), 448, (448, 448), (32, 32)),
        ((768, 576), 448, (597, 448), (42, 32)),
        ((576, 768), 448, (448, 597), (32, 42)),
        ((448, 1000), 448, (448, 1000), (32, 71)),
        ((100, 100), 672, (672, 672), (48, 48)),
    ],
)
def test_geometry(size, resolution, resized, grid):
    plan = plan_geometry(*size, resolution, 14)
    assert (plan.resized, plan.grid) == (resized, grid)
    assert plan.coverage == (grid[0] * 14 / resized[0], grid[1] * 14 / resized[1])
    image = np.zeros((*size, 3), np.uint8)
    assert prepare_pixels(image, resolution, 14).shape == (grid[0] * 14, grid[1] * 14, 3)


def test_three_pixel_image_is_refused():
    with pytest.raises(ImageError, match="smaller than one patch"):
        plan_geometry(1, 3, 448, 14)


def test_strip_is_refused():
    with pytest.raises(ImageError, match="at most 65536"):
        plan_geometry(20, 100_000, 448, 14)


def test_resolution_below_a_patch():
    with pytest.raises(ConfigError, match="at least one patch"):
        plan_geometry(100, 100, 13, 14)


def test_quarter_turns_are_exact_and_counter_clockwise():
    image = np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8)
    turned = rotate_image(image, 90)
    # about (w/2, h/2), not about the centre of the pixel grid: one row is off the canvas
    assert np.array_equal(turned[1:, :], np.rot90(image)[:-1, :])


def test_normalisation_values():
    white = prepare_image(np.full((28, 28, 3), 255, np.uint8), 28, 14)
    assert white[0, :, 0, 0].tolist() == pytest.approx([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])


def test_float_images_are_recovered_exactly():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(1, 1, 1, 3)
    recovered = to_uint8(pixels.permute(0, 3, 1, 2).float() / 255)
    assert np.array_equal(recovered, pixels.numpy())


def test_normalised_images_are_refused():
    with pytest.raises(ImageError, match="Remove Normalize"):
        to_uint8(torch.full((1, 3, 16, 16), -1.5))


def test_rotation_names():
    assert rotation_angles("agnostic") == AGNOSTIC_ANGLES == tuple(range(0, 360, 45))
    assert rotation_angles("informed") == (0,)
    assert rotation_angles([0, 90, 90]) == (0.0, 90.0)
    for wrong in ("upright", []):
        with pytest.raises(ConfigError, match="expected"):
            rotation_angles(wrong)
