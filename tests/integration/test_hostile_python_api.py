"""Every kind of bad image that must fail, given by path to the Python API; and what of bad images passes unseen."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from corpus.images import IMAGES, path_of
from corpus.kinds import FAILED, SCORED, sample
from corpus.modes import turned
from corpus.overwritten import DAMAGE, damaged, whole
from generated import save, textured

from anomalydino_plugin import BatchedModel, FewShotModel, ImageError, read_image

MUST_FAIL = [kind for kind in IMAGES if kind.outcome == FAILED]
SETTINGS = {"resolution": 64, "masking": "off"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    for kind in MUST_FAIL:
        kind.make(path_of(root, kind))
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("good") / "good.png"
    save(path, textured(1))
    return path


@pytest.fixture(scope="module")
def fitted(tiny_backbone, good) -> FewShotModel:
    return FewShotModel(tiny_backbone, **SETTINGS).fit([good])


must_fail = pytest.mark.parametrize("kind", MUST_FAIL, ids=[kind.name for kind in MUST_FAIL])


def assert_named(error: ImageError, path: Path) -> None:
    assert repr(os.fspath(path)) in str(error)


@must_fail
@pytest.mark.timeout(60)
def test_fit_names_the_file(kind, folder, tiny_backbone):
    path = path_of(folder, kind)
    with pytest.raises(ImageError) as raised:
        FewShotModel(tiny_backbone, **SETTINGS).fit([path])
    assert_named(raised.value, path)


@must_fail
@pytest.mark.timeout(60)
def test_score_names_the_file(kind, folder, fitted):
    path = path_of(folder, kind)
    with pytest.raises(ImageError) as raised:
        fitted.score(path)
    assert_named(raised.value, path)


@must_fail
@pytest.mark.timeout(60)
def test_score_set_names_the_file(kind, folder, good, tiny_backbone):
    path = path_of(folder, kind)
    with pytest.raises(ImageError) as raised:
        BatchedModel(tiny_backbone, **SETTINGS).score_set([good, path])
    assert_named(raised.value, path)


def test_a_failure_leaves_the_bank_as_it_was(folder, good, fitted):
    before = fitted.score(good).score
    with pytest.raises(ImageError):
        fitted.score(path_of(folder, MUST_FAIL[0]))
    assert fitted.score(good).score == before


@pytest.mark.parametrize(
    "damage", [damage for damage in DAMAGE if damage.outcome == SCORED], ids=lambda damage: damage.name
)
def test_damage_in_formats_without_checksums_is_not_seen(damage):
    """A limit, not a wish: other pixels, and no word of it. Where this fails, docs/reliability.md has good news to tell."""
    intact, found = read_image(whole(damage)), read_image(damaged(damage))
    assert found.shape == intact.shape
    assert (found != intact).any()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda stored: stored),
        (2, lambda stored: stored[:, ::-1]),
        (3, lambda stored: stored[::-1, ::-1]),
        (4, lambda stored: stored[::-1]),
        (5, lambda stored: stored.transpose(1, 0, 2)),
        (6, lambda stored: np.rot90(stored, -1)),
        (7, lambda stored: np.rot90(stored, 2).transpose(1, 0, 2)),
        (8, np.rot90),
        (9, lambda stored: stored),
    ],
)
def test_exif_orientation_is_applied_once(kind, orientation, upright):
    """By the table of the EXIF standard; other values mean nothing."""
    found, expected = read_image(turned(orientation, kind)), upright(np.asarray(sample(8, (96, 140))))
    assert found.shape == expected.shape
    assert np.abs(found - expected.astype(np.float64)).mean() < (3 if kind == "JPEG" else 1e-9)
