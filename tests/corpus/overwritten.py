"""Whole files whose bytes were overwritten behind a good header: what is seen of it depends on the format.

PNG has checksums. JPEG, WebP, BMP and uncompressed TIFF have none: their decoders stop at what cannot be, such as a
marker that must not stand there, and make a picture of everything else. It is scored, and nothing is said; these
kinds keep that limit in view, as ``SCORED``.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from corpus.kinds import FAILED, SCORED, ImageKind, content, encoded

_BROKEN = r"cannot decode image .*Expected a readable PNG, JPEG, TIFF, BMP or WebP file"
_ZEROS = bytes(64)
_SECOND_FRAME = b"\xff\xc0"  # JPEG's marker of a frame, of which a file has one
_END = b"\xff\xd9"  # JPEG's marker of its end: what follows is not looked at


class Damage(NamedTuple):
    """What is written over the middle of a file of noise, whose bytes are all pixels."""

    name: str
    format: str
    ending: str
    written: bytes
    outcome: str


DAMAGE = (
    Damage("zeros in a png", "PNG", "png", _ZEROS, FAILED),
    Damage("zeros in a jpeg", "JPEG", "jpg", _ZEROS, SCORED),
    Damage("zeros in a webp", "WEBP", "webp", _ZEROS, SCORED),
    Damage("zeros in a tiff", "TIFF", "tif", _ZEROS, SCORED),
    Damage("zeros in a bmp", "BMP", "bmp", _ZEROS, SCORED),
    Damage("second frame in a jpeg", "JPEG", "jpg", _SECOND_FRAME, FAILED),
    Damage("early end in a jpeg", "JPEG", "jpg", _END, SCORED),
    Damage("many ones in a webp", "WEBP", "webp", b"\xff" * 1685, FAILED),
)


def whole(damage: Damage) -> bytes:
    """The file before it was damaged."""
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)
    return encoded(noise, damage.format)


def damaged(damage: Damage) -> bytes:
    data, written = whole(damage), damage.written
    middle = len(data) // 2
    return data[:middle] + written + data[middle + len(written) :]


def _maker(damage: Damage) -> Callable[[], bytes]:
    return lambda: damaged(damage)


OVERWRITTEN = tuple(
    ImageKind(
        damage.name,
        content(_maker(damage)),
        damage.outcome,
        _BROKEN if damage.outcome == FAILED else "",
        f"{damage.name}.{damage.ending}",
    )
    for damage in DAMAGE
)
