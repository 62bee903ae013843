"""Explanations of real defects: where the top patches lie, and that they are at the distance that is reported."""

import numpy as np
import pytest

from anomalydino_plugin import FewShotModel, read_image, rotate_image
from anomalydino_plugin.few_shot.explain import explain_picture


@pytest.fixture(scope="module")
def screws(assets, dinov2):
    folder = assets / "data" / "mvtec" / "screw"
    return folder, FewShotModel(dinov2).fit([folder / "train" / "good" / "000.png"])


def test_top_patches_of_a_scratched_screw(screws):
    folder, model = screws
    test = folder / "test" / "scratch_neck" / "003.png"
    picture, matches = explain_picture(model, test, top=4)
    truth = read_image(folder / "ground_truth" / "scratch_neck" / "003_mask.png")[..., 0] > 0
    assert model.use_mask  # decided by the masking test
    assert (picture == (80, 180, 255)).all(axis=2).any()  # and drawn
    for match in matches:
        y, x, height, width = match.box
        assert truth[y : y + height, x : x + width].any(), match
        assert distance(model, test, match) == pytest.approx(match.distance, abs=1e-4)


def distance(model, test, match):
    """Cosine distance of the two patches, both encoded again."""
    reference = rotate_image(read_image(match.source.image_id), match.source.rotation)
    query, found = model.encode([model.prepare(read_image(test)), model.prepare(reference)]).numpy()
    a, b = query[32 * match.row + match.column], found[32 * match.source.row + match.source.column]
    return 1 - np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
