"""What a kind of bad image is, and how its files are encoded."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from generated import textured
from PIL import Image

SCORED, FAILED = "scored", "failed"


class ImageKind(NamedTuple):
    """One kind of image file or folder entry.

    Attributes:
        name: of the kind; also the file's name without its ending, unless ``file`` says otherwise.
        make: writes the entry at a path.
        outcome: ``scored`` or ``failed``.
        says: regular expression that the message of a failure matches.
        file: name of the file; bytes where it is no UTF-8.
        level: mean grey level of the decoded image, where it is known.
    """

    name: str
    make: Callable[[Path], None]
    outcome: str = SCORED
    says: str = ""
    file: str | bytes = ""
    level: float | None = None

    @property
    def file_name(self) -> str | bytes:
        return self.file or f"{self.name}.png"


def content(data: bytes | Callable[[], bytes]) -> Callable[[Path], None]:
    """Write bytes, made only when they are written."""
    return lambda path: Path(path).write_bytes(data if isinstance(data, bytes) else data())


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def sample(seed: int = 5, size: tuple[int, int] = (96, 96)) -> Image.Image:
    return Image.fromarray(textured(seed, size))


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(size: tuple[int, int], data: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG written by hand, for what Pillow does not write.

    Args:
        size: width and height in its header, which the data need not hold.
        data: rows, each after its filter byte.
        depth: bits of a value.
        colour: PNG's type: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA.
    """
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(data)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
