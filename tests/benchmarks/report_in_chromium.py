"""A report of 1,000 images: size, time to write it, and in Chromium time to load, to filter and to turn a page.

    python tests/benchmarks/report_in_chromium.py [FOLDER]

The images are 512 x 512 crops of scikit-image's CC0 photographs, scored by an untrained tiny backbone.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from skimage import data

sys.path.insert(0, str(Path(__file__).parents[1]))
import chromium

from jobs.config import ReportConfig, ScoreConfig
from jobs.report import command
from jobs.score import run as score
from jobs.store import Store

IMAGES, EDGE = 1000, 512
_TIMED = "(() => {{ const start = performance.now(); {0}; document.body.offsetHeight; return performance.now() - start; }})()"


def make_images(folder: Path) -> None:
    """One normal image, and 1,000 to score, a fifth of them with a bright line."""
    photographs = [data.astronaut(), data.coffee(), data.rocket()]
    rng = np.random.default_rng(0)
    for number in range(IMAGES + 1):
        label = "train/good" if number == IMAGES else "test/line" if number % 5 == 0 else "test/good"
        photograph = photographs[number % 3]
        top, left = (rng.integers(0, edge - 255) for edge in photograph.shape[:2])
        crop = Image.fromarray(photograph[top : top + 256, left : left + 256]).resize((EDGE, EDGE))
        picture = np.array(crop)
        if label == "test/line":
            picture[250:256, 100:400] = 255
        path = folder / "photographs" / label / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path, quality=92)


def times(browser: chromium.Chromium, action: str, count: int = 15) -> str:
    """Median and largest of a few runs, the layout of the page included."""
    found = [browser.run(_TIMED.format(action)) for _ in range(count)]
    return f"median {statistics.median(found):.0f} ms, largest {max(found):.0f} ms"


def main() -> None:
    """Make, score, report, measure."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="report-"))
    out = folder / "out"
    if not (folder / "images").exists():
        make_images(folder / "images")
    if not (out / "job.json").exists() or not Store(out, "score").is_finished():
        settings = {"backbone": "test_vit.r160_in1k", "weights": "random:0", "resolution": 448}
        score(ScoreConfig(images=str(folder / "images"), out=str(out), **settings), Console())
    started = time.perf_counter()
    page = Path(command.run(ReportConfig(str(out)), Console()))
    print(f"written in {time.perf_counter() - started:.0f} s; {page.stat().st_size / 1e6:.1f} MB")
    browser = chromium.Chromium(chromium.find())
    browser.size(1400, 900)
    loads = []
    for _ in range(5):
        browser.open(page)
        loads.append(browser.run("performance.now()"))
    print(f"loaded and shown: median {statistics.median(loads):.0f} ms")
    print("filter:", times(browser, "change({ label: state.label ? '' : 'line', page: '1' })"))
    print("sort:", times(browser, "change({ sort: state.sort === 'name' ? 'highest' : 'name' })"))
    print("page:", times(browser, "change({ page: String(1 + Number(state.page) % 40) })"))
    print("open an image:", times(browser, "change({ image: cards[Math.floor(Math.random() * 999)].id })"))
    print("problems:", browser.problems)
    browser.close()


if __name__ == "__main__":
    main()
