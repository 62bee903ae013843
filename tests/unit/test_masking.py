import re
import subprocess
import sys

import numpy as np
import pytest
from scipy.ndimage import binary_closing, binary_dilation
from sklearn.decomposition import PCA
from threadpoolctl import ThreadpoolController

from anomalydino_plugin import ConfigError, first_principal_component, foreground_mask, masking, masking_test
from anomalydino_plugin.masking import (
    MaskingDecision,
    centre_share,
    foreground_and_test,
    foreground_or_all,
    judge_mask,
    patch_foreground,
    threshold_component,
    vote_on_masks,
)


@pytest.mark.parametrize("shape", [(200, 16), (10, 40)])
def test_component_equals_exact_pca(shape):
    features = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    features[: shape[0] // 3] += 5
    expected = PCA(1, svd_solver="full").fit_transform(features.astype(np.float64))[:, 0]
    assert np.abs(first_principal_component(features) - expected).max() < 1e-4  # sign included: scikit-learn's rule


def test_openblas_works_on_one_thread_and_gets_its_threads_back(monkeypatch):
    """Several threads wait for each other, busily: beside other work a mask took seven times as long."""
    loaded = ThreadpoolController().select(internal_api="openblas").info()
    # Other packages bring an OpenBLAS of their own (faiss does): no mask runs on it.
    own = [pool["filepath"] for pool in loaded if re.search(r"[/\\](numpy|scipy)\b", pool["filepath"])]
    pools = ThreadpoolController().select(filepath=own)
    seen: list[set[int]] = []
    find = masking._leading_eigenvector

    def watched(matrix):
        seen.append({pool["num_threads"] for pool in pools.info()})
        return find(matrix)

    monkeypatch.setattr(masking, "_leading_eigenvector", watched)
    features = np.random.default_rng(0).standard_normal((200, 16)).astype(np.float32)
    with pools.limit(limits=2):
        first_principal_component(features)
        first_principal_component(features[:10])
        assert all(pool["num_threads"] == 2 for pool in pools.info())
    assert seen == [{1} for _ in range(2)] or not own  # no OpenBLAS, nothing to set


@pytest.mark.skipif(sys.platform != "linux", reason="ceilings of address space hold on Linux")
def test_too_little_memory_is_an_error_in_place_of_an_endless_wait():
    """OpenBLAS waits for ever where it gets no working memory."""
    code = """
import re, resource
import numpy as np
from anomalydino_plugin.masking import first_principal_component
used = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 40 * 1024**2,) * 2)
first_principal_component(np.ones((500, 384), np.float32))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "MemoryError: eigenvectors of a mask need 134 MB" in done.stderr


def square(grid, inner, value=50.0):
    component = np.full(grid, -value)
    component[inner] = value
    return component.reshape(-1)


CENTRE = (slice(8, 24), slice(8, 24))


@pytest.mark.parametrize("sign", [1, -1])
def test_sign_that_fills_the_centre_is_chosen(sign):
    mask = foreground_mask(sign * square((32, 32), CENTRE), (32, 32), morphology="grid").reshape(32, 32)
    assert mask[16, 16]
    assert not mask[0, 0]


def test_official_morphology_runs_along_the_flattened_order_and_wraps_over_row_ends():
    component = square((10, 10), (slice(2, 8), slice(0, 7)))
    official = foreground_mask(component, (10, 10)).reshape(10, 10)
    assert official[1, 9]  # the patch before row 2 column 0: a wrap
    assert not official[1, 0]  # no vertical growth
    grid = foreground_mask(component, (10, 10), morphology="grid").reshape(10, 10)
    assert grid[1, 0]
    assert not grid[1, 9]


def test_grid_that_does_not_fit():
    with pytest.raises(ConfigError, match="one for each patch"):
        foreground_mask(np.zeros(10), (3, 4))
    with pytest.raises(ConfigError, match="morphology"):
        foreground_mask(np.zeros(12), (3, 4), morphology="round")


def test_judgements():
    disc = np.hypot(*(np.indices((32, 32)) - 15.5)) < 9
    assert judge_mask(disc.reshape(-1), disc.reshape(-1), (32, 32)).use_mask
    large = np.hypot(*(np.indices((32, 32)) - 15.5)) < 14
    decision = judge_mask(large.reshape(-1), large.reshape(-1), (32, 32))
    assert not decision.use_mask
    assert "foreground" in decision.reason
    noise = np.random.default_rng(0).random(1024) < 0.3
    assert not judge_mask(noise, noise, (32, 32)).use_mask
    empty = np.zeros(1024, bool)
    assert not judge_mask(empty, empty, (32, 32)).use_mask


def test_flat_features_get_no_mask():
    assert not masking_test(np.ones((64, 8), np.float32), (8, 8)).use_mask


def test_a_component_of_flat_features_is_zero():
    assert first_principal_component(np.ones((6, 9), np.float32)).tolist() == [0.0] * 6
    assert first_principal_component(np.full((9, 6), 3, np.float32)).tolist() == [0.0] * 9


@pytest.mark.parametrize("shape", [(5, 5), (5, 6), (6, 5)])
def test_component_of_square_and_nearly_square_features(shape):
    features = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    expected = PCA(1, svd_solver="full").fit_transform(features.astype(np.float64))[:, 0]
    assert np.abs(first_principal_component(features) - expected).max() < 1e-9


def test_component_in_double_precision():
    """Features far from zero: a mean in float32 would leave an error of their size times 1e-7."""
    features = (1e4 + np.random.default_rng(2).standard_normal((400, 6))).astype(np.float32)
    expected = PCA(1, svd_solver="full").fit_transform(features.astype(np.float64))[:, 0]
    assert np.abs(first_principal_component(features) - expected).max() < 1e-6


def test_ten_itself_is_background():
    component = np.full(100, 10.0)
    assert not foreground_mask(component, (10, 10)).any()
    assert foreground_mask(component + 1e-9, (10, 10)).all()
    assert foreground_mask(component, (10, 10), threshold=9.99).all()
    assert not threshold_component(-component, (10, 10)).any()
    assert threshold_component(-component - 1e-9, (10, 10)).all()


@pytest.mark.parametrize(("kept", "same_sign"), [(35, False), (36, True)])
def test_the_sign_changes_at_thirty_five_per_cent_of_the_central_window(kept, same_sign):
    grid = (17, 17)
    component = np.full(grid, -20.0)
    window = np.full(100, -20.0)
    window[:kept] = 20.0
    component[3:13, 3:13] = window.reshape(10, 10)  # int(.2 * 17) = 3, int(.8 * 17) = 13
    found = threshold_component(component.reshape(-1), grid)
    assert np.array_equal(found, component.reshape(-1) > 10 if same_sign else component.reshape(-1) < -10)


def test_centre_share_of_a_window_that_is_no_square():
    mask = np.zeros((20, 10), bool)
    mask[4:16, 2:5] = True  # half of rows 4 to 15, columns 2 to 7
    mask[:4] = mask[:, 8:] = True
    assert centre_share(mask.reshape(-1), (20, 10)) == 0.5


@pytest.mark.parametrize("grid", [(1, 8), (8, 1), (1, 1)])
def test_grids_without_a_central_window_are_judged_as_a_whole(grid):
    mask = np.zeros(grid[0] * grid[1], bool)
    mask[0] = True
    assert centre_share(mask, grid) == 1 / mask.size


def test_patch_foreground_is_the_mask_of_the_component():
    rng = np.random.default_rng(3)
    features = rng.standard_normal((144, 8)).astype(np.float32)
    features.reshape(12, 12, 8)[3:9, 4:9] += 40 * rng.standard_normal(8).astype(np.float32)
    component = first_principal_component(features)
    for morphology in ("official", "grid"):
        expected = foreground_mask(component, (12, 12), morphology=morphology)
        assert np.array_equal(patch_foreground(features, (12, 12), morphology), expected)
        mask, decision = foreground_and_test(features, (12, 12), morphology)
        assert np.array_equal(mask, expected)
        assert decision == masking_test(features, (12, 12), morphology)
        assert decision == judge_mask(expected, threshold_component(component, (12, 12)), (12, 12))
    official = foreground_mask(component, (12, 12))
    assert np.array_equal(patch_foreground(features, (12, 12)), official)
    assert np.array_equal(foreground_and_test(features, (12, 12))[0], official)
    assert masking_test(features, (12, 12)) == masking_test(features, (12, 12), "official")
    assert not np.array_equal(official, expected)  # the two windows differ here


@pytest.mark.parametrize(
    ("votes", "verdict"), [([], False), ([True], True), ([True, False], False), ([True, True, False], True)]
)
def test_masks_need_more_than_half_of_the_votes(votes, verdict):
    assert vote_on_masks(iter(votes)) is verdict


def rectangle(grid, rows, columns):
    mask = np.zeros(grid, bool)
    mask[rows, columns] = True
    return mask.reshape(-1)


def test_the_figures_of_a_judgement():
    """A rectangle of 10 x 14 patches in a grid of 20 x 24, against the same before morphology with a border."""
    grid = (20, 24)
    mask = rectangle(grid, slice(5, 15), slice(5, 19))
    thresholded = rectangle(grid, slice(0, 10), slice(5, 19))
    decision = judge_mask(mask, thresholded, grid)
    assert decision.foreground_share == 140 / 480
    assert decision.border_share == 14 / (2 * 20 + 2 * 22)
    assert decision.outline == pytest.approx((14 + 10 + 10) / np.sqrt(140) * np.sqrt(32 / 20))
    assert not decision.use_mask
    assert decision.reason == "no mask: foreground 17% of the border (objects leave it free, below 10%)"
    assert decision.confidence == pytest.approx((14 / 84 - 0.10) / 0.07)


@pytest.mark.parametrize(
    ("mask", "use", "reason", "confidence"),
    [
        (
            rectangle((32, 32), slice(2, 30), slice(2, 18)),
            True,
            "mask: foreground 44% of the patches (object masks keep less than 50%)",
            (0.5 - 28 * 16 / 1024) / 0.10,
        ),
        (
            rectangle((32, 32), slice(2, 30), slice(2, 22)),
            False,
            "no mask: foreground 55% of the patches (object masks keep less than 50%)",
            (28 * 20 / 1024 - 0.5) / 0.10,
        ),
        (
            rectangle((32, 32), slice(10, 14), slice(10, 14)),
            False,
            "no mask: foreground 1.6% of the patches (an object keeps at least 2%)",
            (0.02 - 16 / 1024) / 0.03,
        ),
        (
            rectangle((32, 32), slice(10, 15), slice(10, 15)),
            True,
            "mask: foreground 2.4% of the patches (an object keeps at least 2%)",
            (25 / 1024 - 0.02) / 0.03,
        ),
        (rectangle((32, 32), slice(4, 20), slice(4, 20)), True, None, 1.0),
    ],
)
def test_what_decides_and_how_clearly(mask, use, reason, confidence):
    decision = judge_mask(mask, mask, (32, 32))
    assert decision.use_mask is use
    assert decision.confidence == pytest.approx(confidence)
    assert reason is None or decision.reason == reason
    assert decision.confirm_by_eye == (confidence < 0.5)


def test_a_ragged_outline_decides():
    """Separate patches: four edges for each, over the square root of their number."""
    grid = (32, 32)
    dots = np.zeros(grid, bool)
    dots[4:28:3, 4:28:4] = True  # 8 x 6
    decision = judge_mask(dots.reshape(-1), dots.reshape(-1), grid)
    assert decision.outline == pytest.approx(4 * 48 / np.sqrt(48))
    assert decision.outline > 13
    assert decision.reason == "no mask: outline 27.7 (objects below 13, textures above)"


def test_exactly_at_a_limit_there_is_no_mask():
    half = np.zeros(1024, bool)
    half[:512] = True
    inner = rectangle((32, 32), slice(8, 24), slice(8, 24))
    decision = judge_mask(half, inner, (32, 32))
    assert not decision.use_mask
    assert decision.confidence == 0.0
    assert decision.reason.startswith("no mask: foreground 50% of the patches")
    assert decision.confirm_by_eye


def test_an_eye_confirms_below_one_half():
    sure = MaskingDecision(True, 0.5, 0.1, 0.0, 4.0, "")
    assert not sure.confirm_by_eye
    assert sure._replace(confidence=0.499).confirm_by_eye


def test_morphology_dilates_and_then_closes():
    """Gaps of up to four patches close (two by dilation, two by closing); a wider one stays, smaller by two."""
    component = np.full((1, 40), -50.0)
    component[0, 8:12] = component[0, 16:32] = 50.0  # gap of four
    found = foreground_mask(component.reshape(-1), (1, 40), morphology="grid")
    assert np.flatnonzero(found).tolist() == list(range(7, 33))
    component[0, 16] = -50.0  # gap of five
    found = foreground_mask(component.reshape(-1), (1, 40), morphology="grid")
    assert np.flatnonzero(found).tolist() == [*range(7, 13), *range(16, 33)]


def test_official_morphology_is_a_window_of_three_along_the_flattened_order():
    component = square((10, 10), (slice(2, 8), slice(0, 6)))  # gaps of four between rows: two after dilation
    component[75] = -50.0  # and one of five
    expected = binary_closing(binary_dilation(component > 10, np.ones(3)), np.ones(3))
    found = foreground_mask(component, (10, 10))
    assert found.shape == (100,)
    assert np.array_equal(found, expected)
    assert np.count_nonzero(found) == 57


def dots(count: int) -> np.ndarray:
    """Separate patches in a grid of 32 x 32, away from its border: four edges each."""
    mask = np.zeros((32, 32), bool)
    for number in range(count):
        mask[4 + 3 * (number // 6), 4 + 4 * (number % 6)] = True
    return mask.reshape(-1)


@pytest.mark.parametrize(("count", "outline"), [(0, 0.0), (1, 4.0), (9, 12.0), (11, 4 * np.sqrt(11))])
def test_the_outline_of_separate_patches(count, outline):
    decision = judge_mask(rectangle((32, 32), slice(8, 24), slice(8, 24)), dots(count), (32, 32))
    assert decision.outline == pytest.approx(outline)
    assert decision.use_mask is (count < 11)
    if count >= 9:
        assert decision.confidence == pytest.approx(abs(13 - outline) / 3)


def test_a_mask_that_hides_everything_hides_nothing():
    empty, one = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    one[2, 1] = True
    whole = foreground_or_all(empty)
    assert (whole.shape, whole.dtype) == ((4, 4), bool)
    assert whole.all()
    assert np.array_equal(foreground_or_all(one), one)
    assert foreground_or_all(np.ones(16, bool)).all()
