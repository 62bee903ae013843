"""Bad input is normal input: every pixel mode has one meaning, every damaged file one clear error."""

import io

import numpy as np
import pytest
from PIL import Image

from anomalydino_plugin import ImageError, read_image

GREY = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_grey_is_repeated():
    decoded = read_image(encoded(Image.fromarray(GREY)))
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, np.repeat(GREY[..., None], 3, 2))


def test_sixteen_bit_is_scaled_not_truncated():
    deep = GREY.astype(np.uint16) * 257
    assert np.array_equal(read_image(encoded(Image.fromarray(deep)))[..., 0], GREY)


def test_float_tiff():
    assert np.array_equal(read_image(encoded(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"))[..., 0], GREY)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1000.0, -5.0])
def test_float_tiff_out_of_range(value):
    values = np.full((16, 16), 0.5, np.float32)
    values[3, 3] = value
    with pytest.raises(ImageError):
        read_image(encoded(Image.fromarray(values), "TIFF"))


def test_transparency_is_laid_over_black():
    rgba = np.full((16, 16, 4), 200, np.uint8)
    rgba[..., 3] = 0
    assert read_image(encoded(Image.fromarray(rgba))).max() == 0


def test_palette_and_cmyk():
    image = Image.fromarray(np.full((16, 16, 3), (255, 0, 0), np.uint8))
    assert np.array_equal(read_image(encoded(image.quantize(4)))[0, 0], [255, 0, 0])
    assert read_image(encoded(image.convert("CMYK"), "JPEG", quality=95)).shape == (16, 16, 3)


def test_exif_orientation_is_applied():
    image = Image.fromarray(np.dstack([GREY] * 3)[:, :8])
    exif = image.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    assert read_image(encoded(image, exif=exif.tobytes())).shape == (8, 16, 3)


def test_first_frame_of_an_animation():
    frames = [Image.fromarray(np.full((16, 16), level, np.uint8)) for level in (10, 200)]
    assert read_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])).max() == 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"just text", "UnidentifiedImageError"),
        (encoded(Image.fromarray(GREY))[:50], "cannot decode"),
    ],
)
def test_damaged_files_are_named(tmp_path, content, message):
    path = tmp_path / "part.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=message) as caught:
        read_image(path)
    assert "part.png" in str(caught.value)


def test_truncated_jpeg(tmp_path):
    path = tmp_path / "cut.jpg"
    path.write_bytes(
        encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), "JPEG")[:-400]
    )
    with pytest.raises(ImageError, match="cut.jpg"):
        read_image(path)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(ImageError, match="Check path"):
            read_image(path)


def test_pixel_limit():
    with pytest.raises(ImageError, match="limit of 100"):
        read_image(encoded(Image.fromarray(GREY)), max_pixels=100)
