"""What every job with a backbone needs to know before and when it loads one."""

from __future__ import annotations

from typing import NamedTuple

from rich.console import Console

from jobs.settings import EncodingSettings

_CPU_BATCH, _GPU_BATCH = 4, 32
_BYTES = {"float32": 4, "float16": 2}


class EncoderShape(NamedTuple):
    """Sizes that follow from settings alone.

    Attributes:
        patch_size: pixels.
        patches: of a square image.
        width: features of a patch, D.
    """

    patch_size: int
    patches: int
    width: int

    def row_bytes(self, dtype: str) -> int:
        """Of one stored embedding."""
        return self.width * _BYTES[dtype]


def encoder_shape(config: EncodingSettings) -> EncoderShape:
    """Sizes of a configuration; loads no weights.

    Raises:
        ConfigError: an unknown backbone.
    """
    from anomalydino_plugin import embed_dim_of, patch_size_of

    patch_size = patch_size_of(config.backbone)
    edge = max(1, config.resolution // patch_size)
    return EncoderShape(patch_size, edge * edge, embed_dim_of(config.backbone))


def find_weights(config: EncodingSettings, console: Console) -> tuple[str, str]:
    """Path (or ``random:SEED``) and checksum, resolved once on the driver.

    Args:
        config: settings.
        console: told where weights are untrained, or none that we know.

    Raises:
        WeightsError: none were found, or they do not fit.
    """
    if config.weights is not None and config.weights.partition(":")[0] == "random":
        console.print(f"warning: untrained weights ({config.weights}): scores mean nothing", markup=False)
        return config.weights, config.weights
    from anomalydino_plugin import resolve_weights

    def notify(line: str) -> None:
        console.print(f"warning: {line}", markup=False, soft_wrap=True)

    file = resolve_weights(config.backbone, config.weights, index_source=config.index_source, notify=notify)
    return str(file.path), file.sha256


def batch_size(config: EncodingSettings, device: str) -> int:
    """Images encoded at a time."""
    return config.batch_size or (_CPU_BATCH if device == "cpu" else _GPU_BATCH)
