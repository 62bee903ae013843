"""A finished few-shot run without Ray or a backbone: generated images, and distances by a rule."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from generated import save, textured

from anomalydino_plugin import Detection, MemoryBank, plan_geometry
from jobs import tables
from jobs.decode import Failure
from jobs.inputs import ImageRecord, image_id
from jobs.stage import write_job
from jobs.store import Store

RESOLUTION, PATCH = 64, 16
HOT = (1, 2)  # row and column of the most anomalous patch
MATCHED, ANGLE = (2, 1), 90.0  # the reference patch that every patch matched
SIZE = (96, 150)  # pixels: not square, so the grid does not cover all of it
THRESHOLD = 0.3


@dataclass(frozen=True)
class Made:
    """One image of a run; ``score`` is the distance of its hottest patch, the others have half of it."""

    category: str
    name: str
    score: float
    label: str | None = "good"


def make_run(
    folder: Path,
    images: list[Made],
    *,
    failed: tuple[tuple[str, str], ...] = (),
    threshold: float | None = THRESHOLD,
    masked: bool = True,
    size: tuple[int, int] = SIZE,
) -> Path:
    """Write images under ``folder/images`` and a run under ``folder/out``.

    Args:
        folder: an empty one.
        images: scored ones; those of another label than good get a ground truth, the outline of the hot patch.
        failed: category and name of others.
        threshold: of every category.
        masked: whether the first row of patches is background.
        size: (H, W) of the images.
    """
    out, plan = folder / "out", plan_geometry(*size, RESOLUTION, PATCH)
    categories = sorted({made.category for made in images} | {category for category, _ in failed})
    store, fit = Store(out, "score"), Store(out, "fit")
    fit.claim("f", ["banks"], {})
    store.claim("s", ["images", "scores", "patch_scores"], {})
    for category in categories:
        reference = _record(folder, Made(category, "ref.png", 0.0), "train")
        save(Path(reference.uri), textured(1, size))
        rows = {"images": tables.reference_images([reference], [plan])}
        fit.commit(category, "references", rows, {"bank": {"category": category, "references": [reference.uri]}})
        scored = [_scored(folder, made, plan, masked) for made in images if made.category == category]
        scored.sort(key=lambda item: item.record.image_id)
        failures = [
            Failure(_record(folder, Made(category, name, 0.0)), "decode", "ImageError", f"cannot decode {name!r}")
            for own, name in failed
            if own == category
        ]
        content = {
            "images": tables.scored_images(scored, failures),
            "scores": tables.scores_table(scored, threshold, "max", masked),
            "patch_scores": tables.patch_scores_table(scored, tables.bank_source(_bank(reference))),
            "failures": tables.failures_table(failures),
        }
        store.commit(category, "000000", content, {"done": len(scored), "failed": len(failures), "seconds": 0.1})
    config = {"resolution": RESOLUTION, "backbone": "test_vit.r160_in1k", "banks": None}
    for stage, more in ((fit, {}), (store, {"patch_size": PATCH, "config": config})):
        write_job(stage, {"counts": {}, "weights_sha256": "random:0", **more})
    return out


def _record(folder: Path, made: Made, split: str = "test") -> ImageRecord:
    inside = f"{split}/{made.label or 'unknown'}/{made.name}"
    path = folder / "images" / made.category.replace("/", "_") / inside
    mask = path.with_name(path.name + ".mask.png") if made.label not in {None, "good"} else None
    name = image_id(made.category, inside)
    return ImageRecord(name, str(path), made.category, split, made.label, None if mask is None else str(mask))


def _scored(folder: Path, made: Made, plan, masked: bool) -> tables.Scored:
    record = _record(folder, made)
    height, width = plan.image_size
    save(Path(record.uri), textured(2, (height, width), spot=made.label not in {None, "good"}))
    if record.mask_uri:
        truth = np.zeros((height, width), np.uint8)
        truth[24:48, 48:72] = 255
        save(Path(record.mask_uri), truth)
    distances = np.full(plan.grid, made.score / 2, np.float32)
    distances[HOT] = made.score
    foreground, matched = np.ones(plan.grid, bool), np.full(plan.grid, 7, np.int64)
    if masked:
        distances[0], foreground[0], matched[0] = 0, False, -1
    return tables.Scored(record, Detection(made.score, distances, foreground, matched, plan))


def _bank(reference: ImageRecord) -> MemoryBank:
    sources = torch.zeros(8, 4, dtype=torch.int32)
    sources[7] = torch.tensor([0, 1, *MATCHED])
    return MemoryBank(
        torch.nn.functional.normalize(torch.ones(8, 4), dim=1),
        sources,
        torch.ones(8, dtype=torch.bool),
        (reference.image_id,),
        (0.0, ANGLE),
        (SIZE,),
        {},
    )
