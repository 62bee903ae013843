"""The picture of README.md: ``python docs/site/picture.py`` -> docs/images/result.png.

The demo's photographs (scikit-image's brick, grass and gravel; CC0) with defects added, scored with one reference image
each: above the image, below the heat of the anomaly map and the outline of what was added.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from anomalydino_plugin import FewShotModel, calibrate, load_backbone, read_image
from jobs.demo_data import make_demo_images
from jobs.pictures import overlay

SHOWN = ("brick/scratch/001", "grass/hole/000", "gravel/dent/000", "brick/paint/000", "grass/good/004")
EDGE, GAP, LINE = 176, 8, 20  # pixels
HEAT = (0.25, 0.75)  # patch distances of no heat and of full heat
INK, PAPER = (36, 36, 36), (255, 255, 255)
COLOURS, HEAT_COLOURS = 96, 64  # of the file: below 200 kB
VIVID = 110  # saturation and brightness, of 255
TARGET = Path(__file__).parents[1] / "images" / "result.png"


def main() -> int:
    """Score the images shown and write the picture."""
    columns = []
    with tempfile.TemporaryDirectory() as folder:
        make_demo_images(Path(folder))
        backbone = load_backbone(weights=os.environ.get("ANOMALYDINO_WEIGHTS"))
        models: dict[str, FewShotModel] = {}
        for name in SHOWN:
            category, label, number = name.split("/")
            if category not in models:
                models[category] = FewShotModel(backbone).fit([Path(folder) / category / "train" / "good" / "000.png"])
            columns.append(column(models[category], Path(folder) / category, label, number))
    page = Image.new("RGB", (len(columns) * (EDGE + GAP) + GAP, 2 * (EDGE + GAP) + LINE + GAP), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for place, (image, heat, caption) in enumerate(columns):
        left = GAP + place * (EDGE + GAP)
        page.paste(Image.fromarray(image), (left, GAP))
        page.paste(Image.fromarray(heat), (left, EDGE + 2 * GAP))
        draw.text((left, 2 * (EDGE + GAP) + GAP), caption, fill=INK, font=font)
    with_palette(page).save(TARGET, optimize=True)
    sys.stdout.write(f"{TARGET.stat().st_size} bytes -> {TARGET}\n")
    return 0


def with_palette(page: Image.Image) -> Image.Image:
    """At most 256 colours, so that the file stays small: a third of them for heat, which covers little of the page."""
    heat = page.crop((0, EDGE + 2 * GAP, page.width, 2 * (EDGE + GAP)))
    vivid = np.asarray(heat.convert("HSV"))
    pixels = np.asarray(heat)[(vivid[..., 1] > VIVID) & (vivid[..., 2] > VIVID)]
    palettes = [page.quantize(COLOURS, kmeans=2), Image.fromarray(pixels[None]).quantize(HEAT_COLOURS, kmeans=2)]
    colours = [colour for part in palettes for colour in (part.getpalette() or [])]
    both = Image.new("P", (1, 1))
    both.putpalette(colours[: 3 * (COLOURS + HEAT_COLOURS)])
    return page.quantize(palette=both, dither=Image.Dither.NONE)


def column(model: FewShotModel, folder: Path, label: str, number: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Image, heat over it, and what was found."""
    path = folder / "test" / label / f"{number}.png"
    result, threshold = model.score(path), calibrate(model).image_threshold
    image = read_image(path)
    truth = None
    if label != "good":
        truth = read_image(folder / "ground_truth" / label / f"{number}_mask.png")[..., 0] > 0
        truth = cv2.resize(truth.astype(np.uint8), (EDGE, EDGE), interpolation=cv2.INTER_NEAREST) > 0
    size = (EDGE, EDGE)
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    heat = cv2.resize(model.anomaly_map(result), size, interpolation=cv2.INTER_AREA)
    drawn = overlay(small, heat, *HEAT, truth=truth)
    verdict = "anomalous" if result.score > threshold else "normal"
    return small, drawn, f"{label}: {result.score:.2f}, {verdict}"


if __name__ == "__main__":
    sys.exit(main())
