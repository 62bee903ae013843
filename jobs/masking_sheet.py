"""``anomalydino masking-test``: one picture and one line for each category, for a person to confirm."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from anomalydino_plugin import (
    FewShotModel,
    InputError,
    MaskingDecision,
    first_principal_component,
    load_backbone,
    masking_test,
    patch_foreground,
)
from jobs.config import MaskingTestConfig
from jobs.decode import read
from jobs.inputs import ImageRecord, discover
from jobs.pictures import Rgb, masking_test_sheet, write_png
from jobs.store import folder_name


def run(config: MaskingTestConfig, console: Console) -> dict[str, MaskingDecision]:
    """Run the test on the first reference image of every category.

    Returns:
        Decisions by category.

    Raises:
        AnomalyDINOError: no images, or a reference that cannot be read.
    """
    references = _first_references(config)
    model = FewShotModel(
        load_backbone(config.backbone, config.weights, index_source=config.index_source), resolution=config.resolution
    )
    decisions = {}
    for category, record in references.items():
        decision, picture = _examine(model, record, category, config)
        path = Path(config.out) / f"{folder_name(category)}.png"
        write_png(path, picture)
        decisions[category] = decision
        confirm = "; confirm by eye" if decision.confirm_by_eye else ""
        console.print(
            f"{category}: {decision.reason}, confidence {decision.confidence:.2f}{confirm} -> {path}",
            markup=False,
            soft_wrap=True,
        )
    return decisions


def _first_references(config: MaskingTestConfig) -> dict[str, ImageRecord]:
    path = Path(config.images).expanduser()
    if path.is_file() and path.suffix.lower() not in {".csv", ".parquet"}:
        return {path.stem: ImageRecord(path.stem, str(path), path.stem)}
    inputs = discover(config.images, categories=config.categories, references=config.references)
    first = {category: records[0] for category, records in inputs.references.items() if records}
    if not first:
        raise InputError(f"no reference images under {config.images!r}: expected CATEGORY/train/good or --references.")
    return first


def _examine(
    model: FewShotModel, record: ImageRecord, category: str, config: MaskingTestConfig
) -> tuple[MaskingDecision, Rgb]:
    image = read(record.uri)
    grid = model.plan(image).grid
    features = model.encode([model.prepare(image)])[0].numpy()
    decision = masking_test(features, grid, config.morphology)
    component = first_principal_component(features).reshape(grid).astype("float32")
    mask = patch_foreground(features, grid, config.morphology).reshape(grid)
    evidence = [
        f"{decision.reason}; confidence {decision.confidence:.2f}"
        + (": look at the picture before you rely on it" if decision.confirm_by_eye else ""),
        f"foreground {decision.foreground_share:.0%} of the patches, {decision.border_share:.0%} of the border, "
        f"outline {decision.outline:.1f}",
        "Use masks only if the right picture keeps the whole object and drops the background. Override with --masking.",
    ]
    return decision, masking_test_sheet(image, component, mask, evidence, f"masking test: {category}")
