"""Files that are no whole image: cut, corrupted, mislabelled, empty, or bombs."""

import struct
import zlib

import numpy as np

from corpus.kinds import FAILED, SCORED, ImageKind, content, encoded, png, png_chunk, sample

_FORMATS = {"png": "PNG", "jpg": "JPEG", "tif": "TIFF", "bmp": "BMP", "webp": "WEBP"}
_REPLACE = r"cannot decode image .*Expected a readable PNG, JPEG, TIFF, BMP or WebP file"
_BOMB = r"more than the limit of 400000000 pixels\. Raise the limit \(max_pixels\)"


def _cut(form: str) -> bytes:
    whole = encoded(_noise(), form)
    return whole[: len(whole) // 2]


def _noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)


def _header_only(form: str) -> bytes:
    return encoded(_noise(), form)[:20]


def _bad_checksum() -> bytes:
    """A PNG whose first IDAT chunk has a wrong CRC."""
    whole = bytearray(encoded(_noise()))
    position = whole.find(b"IDAT") + 12
    whole[position : position + 8] = b"\xff" * 8
    return bytes(whole)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header promises a size that its data does not hold."""
    return png((width, height), b"\0")


def _text_bomb() -> bytes:
    """A PNG with a compressed comment of 80 MB."""
    whole = encoded(sample())
    bomb = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 80_000_000))
    return whole[:33] + bomb + whole[33:]


def bmp_claiming(width: int, height: int) -> bytes:
    whole = bytearray(encoded(sample(), "BMP"))
    whole[18:26] = struct.pack("<ii", width, height)
    return bytes(whole)


def _jpeg_claiming_more() -> bytes:
    """A JPEG of 96 x 96 whose header says 65,535 x 65,535."""
    whole = bytearray(encoded(sample(), "JPEG"))
    start = whole.find(b"\xff\xc0")
    whole[start + 5 : start + 9] = struct.pack(">HH", 65_535, 65_535)
    return bytes(whole)


def _tiff_endless_directory() -> bytes:
    """A TIFF whose directory names itself as the next one."""
    whole = bytearray(encoded(sample(), "TIFF"))
    first = struct.unpack("<I", whole[4:8])[0]
    entries = struct.unpack("<H", whole[first : first + 2])[0]
    end = first + 2 + 12 * entries
    whole[end : end + 4] = struct.pack("<I", first)
    return bytes(whole)


def _tiff_offset_beyond_the_end() -> bytes:
    whole = bytearray(encoded(sample(), "TIFF"))
    whole[4:8] = struct.pack("<I", 0x7FFFFFF0)
    return bytes(whole)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 96\n%%EndComments\nshowpage\n%%EOF\n"
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="96" height="96"/>'

DAMAGED = (
    *(
        ImageKind(f"cut in half, {ending}", content(lambda form=form: _cut(form)), FAILED, _REPLACE, f"cut.{ending}")
        for ending, form in _FORMATS.items()
    ),
    *(
        ImageKind(
            f"header alone, {ending}",
            content(lambda form=form: _header_only(form)),
            FAILED,
            _REPLACE,
            f"header.{ending}",
        )
        for ending, form in _FORMATS.items()
    ),
    ImageKind("wrong checksum", content(_bad_checksum), FAILED, _REPLACE),
    ImageKind("zero bytes", content(b""), FAILED, r"the file is empty \(0 bytes\)\. Replace or remove it"),
    ImageKind("one byte", content(b"\x89"), FAILED, _REPLACE),
    ImageKind("zeros", content(b"\0" * 5000), FAILED, _REPLACE),
    ImageKind("text", content(b"this is no image\n"), FAILED, _REPLACE),
    ImageKind("html page", content(b"<!doctype html><title>404 Not Found</title>"), FAILED, _REPLACE),
    ImageKind(
        "git lfs pointer", content(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), FAILED, _REPLACE
    ),
    ImageKind("svg", content(SVG), FAILED, _REPLACE),
    ImageKind("postscript", content(POSTSCRIPT), FAILED, _REPLACE),
    ImageKind("pdf", content(b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n"), FAILED, _REPLACE),
    ImageKind("zip", content(b"PK\x03\x04" + b"\0" * 60), FAILED, _REPLACE),
    ImageKind("pickle", content(b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."), FAILED, _REPLACE),
    ImageKind("photoshop", content(b"8BPS\0\1" + b"\0" * 60), FAILED, _REPLACE),
    ImageKind("jpeg called png", content(lambda: encoded(sample(), "JPEG"))),
    ImageKind("png called jpg", content(lambda: encoded(sample())), file="png called.jpg"),
    ImageKind("webp called tif", content(lambda: encoded(sample(), "WEBP")), file="webp called.tif"),
    ImageKind("bmp called png", content(lambda: encoded(sample(), "BMP"))),
    ImageKind("png called bmp", content(lambda: encoded(sample())), file="png called.bmp"),
    ImageKind("tiff called png", content(lambda: encoded(sample(), "TIFF"))),
    ImageKind("bytes after the end", content(lambda: encoded(sample()) + b"<script>" * 100)),
    ImageKind("bomb, png header", content(png_claiming(50_000, 50_000)), FAILED, _BOMB),
    ImageKind("bomb, largest png header", content(png_claiming(2**31 - 1, 2**31 - 1)), FAILED, _BOMB),
    ImageKind("bomb, jpeg header", content(_jpeg_claiming_more), FAILED, _BOMB, "bomb.jpg"),
    ImageKind("bomb, bmp header", content(bmp_claiming(40_000, 40_000)), FAILED, _BOMB, "bomb.bmp"),
    ImageKind("bomb, comment", content(_text_bomb), FAILED, _REPLACE),
    ImageKind("png of no pixels", content(png_claiming(0, 0)), FAILED, _REPLACE),
    ImageKind("bmp of negative width", content(bmp_claiming(-96, 96)), FAILED, _BOMB, "negative.bmp"),
    ImageKind("endless tiff", content(_tiff_endless_directory), SCORED, file="endless.tif"),
    ImageKind("tiff offset beyond the end", content(_tiff_offset_beyond_the_end), FAILED, _REPLACE, "offset.tif"),
)
