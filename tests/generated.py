"""Generated images, and the smallest backbone: what tests need where no real data is."""

from pathlib import Path

import numpy as np
from PIL import Image

TINY = "test_vit.r160_in1k"  # timm's smallest vision transformer: patches of 16 pixels, 64 features


def textured(seed: int, size: tuple[int, int] = (96, 96), spot: bool = False) -> np.ndarray:
    """A generated image, (H, W, 3) uint8: smooth noise, with a bright spot as defect."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 200, (8, 8, 3), dtype=np.uint8)
    image = np.array(Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC))
    if spot:
        image[size[0] // 3 : size[0] // 2, size[1] // 3 : size[1] // 2] = (255, 0, 255)
    return image


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
