"""Whole images of every pixel mode, depth and size."""

import struct

import numpy as np
from generated import textured
from PIL import Image, ImageCms

from corpus.kinds import FAILED, ImageKind, content, encoded, png, sample

_GREY = textured(7)[..., 0]
_LEVELS = r"expected (finite|\[0, 1\]|0 to 65535)"
_UNKNOWN = r"cannot identify image file\. Expected a readable PNG, JPEG, TIFF, BMP or WebP file"
_SMALL = r"smaller than one patch; expected at least 16 x 16\. Remove it"
_STRIP = r"needs .* patches .*Cut the strip into pieces or lower the resolution"


def _deep_colour() -> bytes:
    import cv2

    done, data = cv2.imencode(".png", (textured(7).astype(np.uint16) * 257))
    assert done
    return data.tobytes()


def _float(change: dict[tuple[int, int], float] | None = None, scale: float = 1 / 255) -> bytes:
    values = _GREY.astype(np.float32) * scale
    for place, value in (change or {}).items():
        values[place] = value
    return encoded(values, "TIFF")


def _grey_of_few_bits(depth: int, level: int) -> bytes:
    """A grey PNG of 96 x 96 pixels of one level, several in a byte."""
    pixels = sum(level << shift for shift in range(0, 8, depth))
    return png((96, 96), (b"\0" + bytes([pixels]) * (96 * depth // 8)) * 96, depth, colour=0)


def _deep_with_alpha(colour: int, channels: int) -> bytes:
    """A PNG of 16 bits with transparency: levels of 100 of 255, laid at half over black."""
    pixel = struct.pack(">" + "H" * channels, *[100 * 257] * (channels - 1), 0x8000)
    return png((96, 96), (b"\0" + pixel * 96) * 96, 16, colour)


def _double() -> bytes:
    """A TIFF of 64-bit floats in one strip, which Pillow does not write."""
    data = (_GREY.astype("<f8") / 255).tobytes()
    tags = {256: 96, 257: 96, 258: 64, 259: 1, 262: 1, 273: 8, 277: 1, 278: 96, 279: len(data), 339: 3}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


def turned(orientation: int, kind: str = "JPEG") -> bytes:
    """A picture of 140 x 96 pixels whose EXIF data says how to turn it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(sample(8, (96, 140)), kind, exif=exif, **_LOSSLESS.get(kind, {}))


def _frames(kind: str) -> bytes:
    others = [Image.fromarray(np.full((96, 96, 3), 255, np.uint8))]
    return encoded(
        np.full((96, 96, 3), 10, np.uint8), kind, save_all=True, append_images=others, **_LOSSLESS.get(kind, {})
    )


_LOSSLESS = {"WEBP": {"lossless": True}}


def _constant(level: int) -> np.ndarray:
    return np.full((96, 96, 3), level, np.uint8)


def _icc() -> bytes:
    return encoded(sample(), icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes())


def _palette_with_transparency() -> bytes:
    image = sample().quantize(8)
    return encoded(image, transparency=0)


_RGB = {
    "one bit": lambda: encoded(sample().convert("1")),
    "grey": lambda: encoded(_GREY),
    "grey and alpha": lambda: encoded(sample().convert("LA")),
    "palette": lambda: encoded(sample().quantize(16)),
    "palette with transparency": _palette_with_transparency,
    "rgba": lambda: encoded(sample().convert("RGBA")),
    "sixteen bit colour": _deep_colour,
    "damaged colour profile": lambda: encoded(sample(), icc_profile=b"no profile"),
    "foreign colour profile": _icc,
}
_OTHER = {
    "cmyk.jpg": lambda: encoded(sample().convert("CMYK"), "JPEG"),
    "cmyk.tif": lambda: encoded(sample().convert("CMYK"), "TIFF"),
    "lab.tif": lambda: encoded(ImageCms.profileToProfile(*_lab()), "TIFF"),
    "ycbcr.tif": lambda: encoded(sample().convert("YCbCr"), "TIFF"),
    "float 0 to 1.tif": _float,
    "float 0 to 255.tif": lambda: _float(scale=1.0),
    "big-endian sixteen bit.tif": lambda: encoded(_big_endian(), "TIFF"),
    "progressive.jpg": lambda: encoded(sample(), "JPEG", progressive=True),
    "bmp of one bit.bmp": lambda: encoded(sample().convert("1"), "BMP"),
    "lossless.webp": lambda: encoded(sample(), "WEBP", lossless=True),
    "lzw.tif": lambda: encoded(sample(), "TIFF", compression="tiff_lzw"),
    "damaged exif.jpg": lambda: encoded(sample(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
}


def _lab() -> tuple:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return sample(), srgb, lab, ImageCms.Intent.PERCEPTUAL, "LAB"


def _big_endian() -> Image.Image:
    deep = (_GREY.astype(">u2") * 257).astype(">u2")
    return Image.frombytes("I;16B", (96, 96), deep.tobytes())


MODES = (
    *(ImageKind(name, content(data)) for name, data in _RGB.items()),
    *(ImageKind(name, content(data), file=name) for name, data in _OTHER.items()),
    ImageKind("sixteen bit", content(lambda: encoded(np.full((96, 96), 100 * 257, np.uint16))), level=100),
    ImageKind("dark sixteen bit", content(lambda: encoded(np.full((96, 96), 200, np.uint16))), level=1),
    ImageKind("two bits", content(lambda: _grey_of_few_bits(2, 2)), level=170),
    ImageKind("four bits", content(lambda: _grey_of_few_bits(4, 7)), level=119),
    ImageKind("sixteen bit grey and alpha", content(lambda: _deep_with_alpha(4, 2)), level=50),
    ImageKind("sixteen bit rgba", content(lambda: _deep_with_alpha(6, 4)), level=50),
    ImageKind("float of 64 bits", content(_double), FAILED, _UNKNOWN, "float64.tif"),
    ImageKind("all transparent", content(lambda: encoded(np.full((96, 96, 4), (200, 200, 200, 0), np.uint8))), level=0),
    *(
        ImageKind(
            f"integers of {what}",
            content(lambda v=value: encoded(_integers(v), "TIFF")),
            FAILED,
            _LEVELS,
            f"{what}.tif",
        )
        for what, value in (("twenty bits", 1_000_000), ("negative value", -5))
    ),
    *(
        ImageKind(
            f"float with {value}", content(lambda v=value: _float({(3, 3): v})), FAILED, _LEVELS, f"float {value}.tif"
        )
        for value in (np.nan, np.inf, -np.inf, 1000.0, -5.0)
    ),
    *(
        ImageKind(f"constant {level}", content(lambda v=level: encoded(_constant(v))), level=level)
        for level in (0, 128, 255)
    ),
    ImageKind("one pixel", content(lambda: encoded(np.zeros((1, 1, 3), np.uint8))), FAILED, _SMALL),
    ImageKind("one pixel wide", content(lambda: encoded(np.zeros((96, 1, 3), np.uint8))), FAILED, _SMALL),
    ImageKind("just below a patch", content(lambda: encoded(textured(9, (15, 96)))), FAILED, _SMALL),
    ImageKind("just a patch", content(lambda: encoded(textured(9, (16, 16))))),
    ImageKind("20000 pixels wide", content(lambda: encoded(sample(9).resize((20_000, 200))))),
    ImageKind("20000 pixels high", content(lambda: encoded(Image.new("L", (200, 20_000), 77))), level=77),
    ImageKind("strip", content(lambda: encoded(Image.new("L", (80_000, 16)))), FAILED, _STRIP),
    *(
        ImageKind(f"exif orientation {value}", content(lambda v=value: turned(v)), file=f"exif {value}.jpg")
        for value in range(1, 10)
    ),
    *(
        ImageKind(f"exif orientation 6, {ending}", content(lambda k=kind: turned(6, k)), file=f"exif.{ending}")
        for kind, ending in (("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif"))
    ),
    *(
        ImageKind(f"animated {kind}", content(lambda k=kind: _frames(k)), file=f"animated {kind}.{ending}", level=10)
        for kind, ending in (("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif"), ("GIF", "png"))
    ),
)


def _integers(value: int) -> np.ndarray:
    values = np.full((96, 96), 300, np.int32)
    values[3, 3] = value
    return values
