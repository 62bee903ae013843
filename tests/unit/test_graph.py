"""The traceable form of every stage (``graph/``) against the eager one, stage by stage."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from generated import textured
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from anomalydino_plugin import (
    ConfigError,
    FewShotModel,
    ImageError,
    anomaly_map,
    first_principal_component,
    foreground_mask,
    foreground_or_all,
    image_score,
    load_backbone,
    nearest,
    prepare_image,
)
from anomalydino_plugin import image_tensors as eager_images
from anomalydino_plugin.backbone import POSITION_OFFSET, Backbone, resample_positions
from anomalydino_plugin.graph import foreground as graph_foreground
from anomalydino_plugin.graph import images as graph_images
from anomalydino_plugin.graph import scores as graph_scores
from anomalydino_plugin.graph import tokens as graph_tokens
from anomalydino_plugin.graph.axes import position_axis, resize_axis
from anomalydino_plugin.graph.mutual import mutual_distance
from anomalydino_plugin.graph.pairs import Pair, add, divide, multiply, times
from anomalydino_plugin.masking import CENTRE_MIN_SHARE, FOREGROUND_THRESHOLD
from anomalydino_plugin.mutual import RunningLowest, lowest_count
from anomalydino_plugin.preprocessing import plan_geometry

CPU = torch.device("cpu")
STD = torch.tensor(eager_images.IMAGENET_STD).view(1, 3, 1, 1)


def noise(size: tuple[int, int]) -> np.ndarray:
    """The hardest image to resize alike: every pixel is near some rounding limit."""
    return np.random.default_rng(size[0] * 7919 + size[1]).integers(0, 256, (*size, 3), dtype=np.uint8)


def batch_of(*images: np.ndarray) -> torch.Tensor:
    """As anomalib feeds them."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255


def unit_rows(count: int, width: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


# Images


def test_normalisation_constants():
    assert graph_images._MEAN == eager_images.IMAGENET_MEAN
    assert graph_images._STD == eager_images.IMAGENET_STD


@settings(deadline=None, max_examples=500)
@given(
    height=st.integers(14, 5000),
    width=st.integers(14, 5000),
    resolution=st.sampled_from([64, 224, 448, 672, 1036]),
    patch_size=st.sampled_from([14, 16]),
)
@example(height=448, width=5000, resolution=448, patch_size=14)
def test_plan_sizes(height, width, resolution, patch_size):
    try:
        expected = plan_geometry(height, width, resolution, patch_size)
    except ImageError:  # a strip, or smaller than a patch: eager mode refuses it
        return
    sizes = graph_images.plan_sizes(height, width, resolution, patch_size)
    assert sizes == (expected.image_size, expected.resized, expected.grid)


@pytest.mark.parametrize(("source", "resized"), [(32, 448), (1000, 448), (101, 37), (37, 37), (300, 451), (64, 1)])
def test_resize_axis_is_pillows_filter(source, resized):
    identity = Image.fromarray(np.eye(source, dtype=np.float32))  # mode F: nothing is rounded
    expected = np.array(identity.resize((source, resized), Image.Resampling.BICUBIC))
    kept = max(1, resized - 5)
    ours = sum(resize_axis(source, resized, kept, CPU)).numpy()
    assert ours.shape == (kept, source)
    assert np.abs(ours - expected[:kept]).max() <= 1e-6


@pytest.mark.parametrize(
    ("size", "resolution"),
    [
        ((1000, 700), 448),
        ((700, 1000), 448),
        ((32, 32), 448),
        ((448, 448), 448),
        ((448, 611), 448),
        ((611, 448), 448),
        ((513, 513), 448),
        ((672, 900), 448),
        ((97, 131), 224),
        ((896, 1344), 448),
        ((45, 31), 64),
    ],
    ids=str,
)
def test_prepare(size, resolution):
    image = noise(size)
    expected = prepare_image(image, resolution, 14)
    ours = graph_images.prepare(batch_of(image), graph_images.plan_sizes(*size, resolution, 14), 14)
    assert ours.shape == expected.shape
    levels = ((ours - expected) * STD * 255).abs()
    assert levels.max() <= 0.01  # every pixel has Pillow's grey level, though the image is noise


def test_fixed_point_sums_are_exact():
    """What lets float32 round as Pillow's integers do: both parts are short enough for sums without rounding."""
    coarse, fine = resize_axis(4000, 448, 448, CPU)
    units = ((coarse.double() + fine.double()) * 2**22).numpy()
    assert np.array_equal(units, np.round(units))
    pixels = torch.from_numpy(noise((4000, 5))).float()
    for part in (coarse, fine):
        exact = part.double() @ pixels[..., 0].double()
        assert torch.equal((part @ pixels[..., 0]).double(), exact)


@given(
    values=arrays(np.float64, 4, elements=st.floats(0.01, 100)),
    other=arrays(np.float64, 4, elements=st.floats(0.01, 100)),
)
def test_pairs_carry_twice_the_digits(values, other):
    def pair(numbers: np.ndarray) -> Pair:
        high = torch.from_numpy(numbers).float()
        return Pair(high, (torch.from_numpy(numbers) - high.double()).float())

    def exact(found: Pair) -> np.ndarray:
        return (found.high.double() + found.low.double()).numpy()

    x, y = pair(values), pair(other)
    np.testing.assert_allclose(exact(add(x, y)), values + other, rtol=1e-13)
    np.testing.assert_allclose(exact(multiply(x, y)), values * other, rtol=1e-13)
    np.testing.assert_allclose(exact(divide(x, y)), values / other, rtol=1e-13)
    np.testing.assert_allclose(exact(times(x, -0.5)), values * -0.5, rtol=1e-13)


# Patch features


@pytest.mark.parametrize("patches", [1, 2, 13, 32, 36, 38, 48, 90])
def test_position_axis_is_torchs_bicubic(patches):
    axis = torch.eye(37)[None, :, :, None].expand(-1, -1, -1, 2)  # (1, 37, 37, 2): one channel for each source
    scale = ((patches + POSITION_OFFSET) / 37, 1.0)
    expected = F.interpolate(axis, scale_factor=scale, mode="bicubic")[0, :, :, 0].T
    assert (position_axis(37, patches, POSITION_OFFSET, CPU) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("grid", [(32, 32), (37, 37), (37, 50), (20, 37), (42, 32), (1, 1), (2, 70)], ids=str)
def test_positions_of_dinov2(grid, registers):
    positions = torch.randn(1, 37 * 37, 6, generator=torch.Generator().manual_seed(0))
    vit = SimpleNamespace(no_embed_class=registers, patch_embed=SimpleNamespace(grid_size=(37, 37)))
    backbone = SimpleNamespace(dinov2=True, vit=vit)
    expected = resample_positions(positions, grid, registers=registers)
    assert (graph_tokens._positions(positions, grid, backbone) - expected).abs().max() <= 1e-4


@pytest.fixture(scope="module")
def awake():
    """Untrained backbones in which every token counts: layer scales start near 0, positions and prefix tokens, too."""

    @functools.cache
    def get(name: str):
        backbone = load_backbone(name, "random:0")
        generator = torch.Generator().manual_seed(0)
        for key, parameter in backbone.named_parameters():
            if key.endswith("gamma"):
                parameter.data.fill_(1.0)
            elif key.endswith(("pos_embed", "cls_token", "reg_token")):
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
            elif "attn" in key and key.endswith("weight"):
                parameter.data.mul_(3.0)
        return backbone

    return get


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("test_vit", (3, 7)),
        ("test_vit", (10, 10)),  # the trained grid: positions are kept as they are
        ("test_vit", (12, 10)),
        ("test_vit2", (3, 7)),  # a register and no class token, with positions of its own
        ("dinov2_vits14", (3, 7)),
        ("dinov2_vits14", (37, 37)),  # the trained grid
        ("dinov2_vits14_reg", (3, 7)),
    ],
    ids=str,
)
def test_patch_features(awake, name, grid):
    backbone = awake(name)
    size = [edge * backbone.patch_size for edge in grid]
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    if name.startswith("test"):
        images = torch.cat([images, images.flip(3)])
    with torch.inference_mode():
        expected = backbone(images)
        ours = graph_tokens.patch_features(backbone, images, grid)
    assert ours.shape == expected.shape
    assert ((ours - expected).norm(dim=2) / expected.norm(dim=2)).max() <= 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_dinov3",  # rotary positions
        "eva02_tiny_patch14_224",  # learned ones, and rotary ones on top
        "deit_tiny_distilled_patch16_224",  # a token of its own
        "vit_tiny_r_s16_p8_224",  # a convolutional stem
    ],
)
def test_what_cannot_be_traced_is_refused(name):
    with torch.device("meta"):  # no weights are needed to tell
        vit = timm.create_model(name, num_classes=0, dynamic_img_size=True)
    backbone = Backbone(vit, name=name, weights_sha256="random:0", dinov2=False)
    with pytest.raises(ConfigError, match=rf"{name}.*export to torch"):
        graph_tokens.patch_features(backbone, torch.zeros(1, 3, 448, 448, device="meta"), (28, 28))


# Foreground


def object_features(grid: tuple[int, int], width: int, seed: int, strength: float = 60.0) -> np.ndarray:
    """An object in the middle whose features differ in one direction, on a background with directions of its own."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices(grid)
    inside = (np.abs(rows - grid[0] / 2) < grid[0] / 4) & (np.abs(columns - grid[1] / 2) < grid[1] / 4)
    direction = rng.normal(size=width) / np.sqrt(width)
    features = rng.normal(size=(grid[0] * grid[1], width)) + 3.0
    return (features + strength * inside.reshape(-1, 1) * direction).astype(np.float32)


GRIDS = [(32, 32), (42, 32), (8, 9), (3, 4), (1, 12), (2, 1)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_first_component(grid, seed):
    features = np.stack([object_features(grid, 48, 2 * seed + number) for number in range(2)])
    ours = graph_foreground.first_component(torch.from_numpy(features)).numpy()
    for one, component in zip(features, ours, strict=True):
        expected = first_principal_component(one)
        assert np.abs(component - expected).max() <= 1e-3 * np.abs(expected).max()


def masks(component: torch.Tensor, grid: tuple[int, int], morphology: str) -> np.ndarray:
    ours = graph_foreground.foreground(component, grid, FOREGROUND_THRESHOLD, CENTRE_MIN_SHARE, morphology)
    assert set(ours.unique().tolist()) <= {0.0, 1.0}
    return ours.numpy() > 0


@pytest.mark.parametrize("morphology", ["official", "grid"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_masks_of_features(grid, morphology):
    features = np.stack([object_features(grid, 48, seed) for seed in range(6)])
    ours = masks(graph_foreground.first_component(torch.from_numpy(features)), grid, morphology)
    for one, mask in zip(features, ours, strict=True):
        expected = foreground_mask(first_principal_component(one), grid, morphology=morphology)
        assert np.array_equal(mask, foreground_or_all(expected))


components = st.tuples(st.integers(1, 14), st.integers(1, 14)).flatmap(
    lambda grid: arrays(np.float32, grid, elements=st.sampled_from([-30.0, -10.0, 0.0, 10.0, 10.5, 30.0]))
)


@settings(deadline=None, max_examples=300)
@given(component=components, morphology=st.sampled_from(["official", "grid"]))
def test_masks_of_any_component(component, morphology):
    grid, flat = component.shape, component.reshape(-1)
    expected = foreground_or_all(foreground_mask(flat.astype(np.float64), grid, morphology=morphology))
    assert np.array_equal(masks(torch.from_numpy(flat)[None], grid, morphology)[0], expected)


def test_the_other_sign_at_exactly_the_limit():
    component = torch.full((7, 8), -30.0)  # the central window has 4 x 5 patches
    component[1, 1:6] = component[2, 1:3] = 30.0  # 7 of them: 35 %
    flat = component.reshape(1, -1)
    ours = masks(flat, (7, 8), "official")[0]
    assert np.array_equal(ours, foreground_mask(flat[0].double().numpy(), (7, 8)))
    assert ours[-1]  # a corner: the sign was turned
    flat[0, 2 * 8 + 3] = 30.0
    assert not masks(flat, (7, 8), "official")[0][-1]


@pytest.mark.parametrize("value", [0.0, 1.7, -250.3])
def test_constant_features_hide_nothing(value):
    component = graph_foreground.first_component(torch.full((2, 12, 5), value))
    assert torch.isfinite(component).all()
    assert masks(component, (3, 4), "official").all()  # no foreground: the mask would hide all


@pytest.mark.parametrize("other", [2, 7])
def test_central_window(other):
    for edge in range(1, 1001):
        for grid in ((edge, other), (other, edge)):
            rows, columns = ((int(n * 0.2), int(n * 0.8)) for n in grid)
            expected = torch.zeros(grid)
            expected[slice(*rows), slice(*columns)] = 1
            if not expected.any():
                expected[:] = 1
            assert torch.equal(graph_foreground._central_window(grid, CPU), expected.reshape(-1)), grid


# Distances


@pytest.mark.parametrize("block", [7, 33, 299, 300, 16_384])  # the last block holds 6, 3 and 1 of 300 rows, or all
@pytest.mark.parametrize("k", [1, 3])
def test_nearest_distance(monkeypatch, block, k):
    monkeypatch.setattr(graph_scores, "BANK_BLOCK", block)
    queries, bank = unit_rows(50, 24, 0).reshape(2, 25, 24), unit_rows(300, 24, 1)
    ours = graph_scores.nearest_distance(queries, bank, k)
    for image, distances in zip(queries, ours, strict=True):
        expected = nearest(image, bank, k=k).distances.mean(dim=1)
        assert (distances - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("k", [1, 3])
def test_duplicates_have_distance_zero(monkeypatch, k):
    monkeypatch.setattr(graph_scores, "BANK_BLOCK", 40)
    bank = unit_rows(60, 24, 2).repeat(3, 1)
    ours = graph_scores.nearest_distance(bank[None, 50:70], bank, k)
    assert ours.max() == 0
    assert nearest(bank[50:70], bank, k=k).distances.max() <= 1e-6


@pytest.mark.parametrize("mode", ["official", "musc"])
@pytest.mark.parametrize("share", [None, 0.02, 0.5])
def test_mutual_distance(mode, share):
    rows = unit_rows(4 * 30, 16, 3).reshape(4, 30, 16)
    ours = mutual_distance(rows, mode, share)
    for image in range(4):
        others = torch.cat([rows[other] for other in range(4) if other != image])
        lowest = RunningLowest(rows[image], lowest_count(mode, 3, 90, share), mode)
        lowest.update(others, [30, 30, 30], 0)
        assert (ours[image] - lowest.result().distances).abs().max() <= 1e-6


# Scores and maps

STATISTICS = [
    "max",
    *(f"mean_top:{fraction}" for fraction in (0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 1.0)),
    *(f"quantile:{fraction}" for fraction in (0.001, 0.5, 0.9, 0.99, 0.999, 1.0)),
]


@settings(deadline=None, max_examples=400)
@given(
    values=arrays(np.float32, st.integers(1, 300), elements=st.floats(0, 2, width=32)),
    statistic=st.sampled_from(STATISTICS),
)
@example(values=np.array([0.0] + [1.0] * 261, np.float32), statistic="quantile:0.001")  # 1.4e-5 off, once
def test_image_score(values, statistic):
    distances = torch.from_numpy(values)
    ours = graph_scores.image_score(torch.stack([distances, distances.flip(0)]), *image_statistic(statistic))
    expected = image_score(distances, statistic).item()
    assert ours.tolist() == pytest.approx([expected, expected], rel=1e-5, abs=1e-5)


def image_statistic(statistic: str) -> tuple[str, float]:
    from anomalydino_plugin.scoring import parse_statistic

    return parse_statistic(statistic)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_image_score_of_every_length(statistic):
    """Ranks are cut where eager mode cuts them, for every number of patches."""
    for patches in range(1, 301):
        distances = torch.linspace(2, 0, patches).square() / 2
        ours = graph_scores.image_score(distances[None], *image_statistic(statistic))
        assert ours.item() == pytest.approx(image_score(distances, statistic).item(), rel=1e-5, abs=1e-6), patches


@pytest.mark.parametrize(("statistic", "patches"), [("mean_top:0.29", 100), ("mean_top:0.7", 90)])
def test_fractions_that_floating_point_rounds_down(statistic, patches):
    distances = torch.linspace(2, 0, patches)
    ours = graph_scores.image_score(distances[None], *image_statistic(statistic))
    assert ours.item() == pytest.approx(image_score(distances, statistic).item(), rel=1e-5)


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("sigma", [0.0, 0.1, 4.0, 9.0])  # radius 0, 0, 16 and 36: beyond the small images, twice
@pytest.mark.parametrize(
    "size", [(14, 14), (15, 23), (16, 40), (96, 96), (80, 130), (131, 77), (300, 1000), (1200, 900)], ids=str
)
def test_anomaly_map(size, sigma, crop):
    geometry = plan_geometry(*size, 70, 14)
    sizes = graph_images.plan_sizes(*size, 70, 14)
    grids = torch.rand(2, *geometry.grid, generator=torch.Generator().manual_seed(sum(size)))
    ours = graph_scores.anomaly_map(grids.flatten(1), sizes, sigma, 14, crop=crop)
    coverage = geometry.coverage if crop else (1.0, 1.0)
    expected = anomaly_map(grids, size, sigma=sigma, coverage=coverage)
    assert ours.shape == (2, 1, *size)
    assert (ours[:, 0] - expected).abs().max() <= 1e-5


# All stages together


@pytest.mark.parametrize("size", [(96, 96), (80, 131), (31, 64)], ids=str)
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"k": 3, "statistic": "quantile:0.9"},
        {"masking": "on", "morphology": "grid"},
        {"masking": "on", "map_area": "official", "statistic": "max", "sigma": 0.0},
    ],
    ids=str,
)
def test_whole_model(tiny_backbone, size, change):
    model = FewShotModel(tiny_backbone, **{"resolution": 64, "masking": "off", **change}).fit([textured(0)])
    norm = tiny_backbone.vit.norm.weight
    images = batch_of(*(textured(seed, size, spot=seed == 2) for seed in (1, 2)))
    with torch.inference_mode():
        norm.mul_(8)  # components beyond the foreground threshold, which trained features reach
        try:
            expected, ours = model(images), model._traced(images)
        finally:
            norm.div_(8)
    assert (expected.pred_score > 0).all()
    assert torch.allclose(ours.pred_score, expected.pred_score, rtol=1e-3)
    assert (ours.anomaly_map - expected.anomaly_map).abs().max() <= 1e-2 * expected.anomaly_map.max()
