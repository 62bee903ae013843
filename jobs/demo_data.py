"""Sample images that may be shipped: real photographs, cut into normal tiles and tiles with defects.

The photographs are ``brick``, ``grass`` and ``gravel`` of scikit-image, which carries them in its wheel; they come from
CC0 Textures and are in the public domain (CC0 1.0; scikit-image's ``data/README.txt``). 512 x 512 pixels, grey. Train
and test tiles never overlap.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from anomalydino_plugin import read_image
from jobs.demo_defects import DEFECTS

CATEGORIES = ("brick", "grass", "gravel")
LICENCE = """Cut from the photographs brick.png, grass.png and gravel.png that scikit-image carries. They come from
CC0 Textures and are dedicated to the public domain (CC0 1.0). The defects were added by anomalydino demo.
"""
_TILE, _OUTPUT = 170, 340  # pixels cut, and pixels written
_TRAIN_ROW = 0  # the top third of a photograph is for references, the rest for tests
_DEFECTS_EACH = 2
_TINTS = {"brick": (0.95, 0.72, 0.62), "grass": (0.72, 0.88, 0.55), "gravel": (0.92, 0.9, 0.86)}


def make_demo_images(folder: Path, *, seed: int = 0) -> list[str]:
    """Write an MVTec-style tree; the same seed gives the same bytes.

    Args:
        folder: to write into.
        seed: of defects.

    Returns:
        The categories.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "LICENSE.txt").write_text(LICENCE)
    for category in CATEGORIES:
        # zlib, not hash(): Python's hash differs between processes
        _write_category(folder / category, category, np.random.default_rng([seed, zlib.crc32(category.encode())]))
    return list(CATEGORIES)


def _write_category(folder: Path, category: str, rng: np.random.Generator) -> None:
    photograph = _photograph(category)
    train, test = list(_tiles(photograph, train=True)), list(_tiles(photograph, train=False))
    for number, tile in enumerate(train):
        _write(folder / "train" / "good" / f"{number:03d}.png", tile)
    for number, tile in enumerate(test):
        _write(folder / "test" / "good" / f"{number:03d}.png", tile)
    for name, defect in DEFECTS.items():
        for number in range(_DEFECTS_EACH):
            clean = (test[int(rng.integers(len(test)))] / 255).astype(np.float32)
            damaged, alpha = defect(clean, rng)
            _write(folder / "test" / name / f"{number:03d}.png", np.round(damaged * 255).astype(np.uint8))
            mask = np.where(alpha > 0, 255, 0).astype(np.uint8)
            _write(folder / "ground_truth" / name / f"{number:03d}_mask.png", mask)


def _photograph(category: str) -> NDArray[np.uint8]:
    """(512, 512, 3) uint8; a slight tint, since cameras on a line see colour."""
    import skimage

    grey = read_image(Path(skimage.__file__).parent / "data" / f"{category}.png")
    tinted: NDArray[np.uint8] = np.round(grey * np.array(_TINTS[category])).astype(np.uint8)
    return tinted


def _tiles(photograph: NDArray[np.uint8], *, train: bool) -> Iterator[NDArray[np.uint8]]:
    """Tiles of one part of the photograph, 2 x enlarged."""
    for row in range(3):
        for column in range(3):
            if (row == _TRAIN_ROW) == train:
                top, left = row * _TILE, column * _TILE
                tile = photograph[top : top + _TILE, left : left + _TILE]
                yield np.asarray(cv2.resize(tile, (_OUTPUT, _OUTPUT), interpolation=cv2.INTER_CUBIC), dtype=np.uint8)


def _write(path: Path, image: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    bgr = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    if not cv2.imwrite(str(path), bgr):
        raise OSError(f"cannot write {str(path)!r}")
