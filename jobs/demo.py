"""``anomalydino demo``: the whole path on sample images, or on MVTec images where ``ANOMALYDINO_ASSETS`` names them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rich.console import Console

from anomalydino_plugin import ConfigError
from jobs.config import DemoConfig, ScoreConfig
from jobs.demo_data import make_demo_images
from jobs.evaluate import evaluate, print_table
from jobs.gallery import write_gallery
from jobs.score import run as run_score

ASSETS = "ANOMALYDINO_ASSETS"
_MARKER = ".anomalydino-demo"
_PICTURES = 8


def run(config: DemoConfig, console: Console) -> None:
    """Make or find images, score them few-shot through Ray, print the table and say where the pictures are.

    Raises:
        AnomalyDINOError: no weights, or a folder that is not ours to replace.
    """
    out = Path(config.out).expanduser().resolve()
    _make_room(out)
    images, weights = _images(out, config, console)
    summary = run_score(
        ScoreConfig(
            images=str(images),
            out=str(out / "results"),
            weights=weights,
            resolution=config.resolution,
            index_source=config.index_source,
        ),
        console,
    )
    print_table(evaluate(str(out / "results")), console)
    pictures = write_gallery(str(out / "results"), per_category=_PICTURES)
    console.print(
        f"{summary.done} images scored, {summary.failed} failed, in {summary.job['seconds']['total']:.0f} s\n"
        f"Parquet:  {out / 'results'}\n"
        f"pictures: {out / 'results' / 'pictures'} ({len(pictures)} files)",
        markup=False,
        soft_wrap=True,
    )


def _make_room(out: Path) -> None:
    """An earlier demo is replaced; anything else is left alone."""
    if out.exists():
        if any(out.iterdir()) and not (out / _MARKER).is_file():
            raise ConfigError(f"--out {str(out)!r} is not empty and no earlier demo: expected a new folder.")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / _MARKER).touch()


def _images(out: Path, config: DemoConfig, console: Console) -> tuple[Path, str | None]:
    assets = os.environ.get(ASSETS)
    if assets:
        root = Path(assets).expanduser().resolve()
        console.print(f"using the MVTec images under {ASSETS}", markup=False)
        weights = root / "weights" / "dinov2_vits14.safetensors"
        return root / "data" / "mvtec", config.weights or (str(weights) if weights.is_file() else None)
    make_demo_images(out / "images")
    console.print(
        f"sample images: {out / 'images'} (public-domain photographs from scikit-image)", markup=False, soft_wrap=True
    )
    return out / "images", config.weights
