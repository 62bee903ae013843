"""Patch features that all settings share: each image is encoded once for a backbone, a resolution and its rotations.

    OUT/features/BACKBONE-RESOLUTION/C/                     test images: the output of ``anomalydino extract``
    OUT/references/BACKBONE-RESOLUTION/C/{rotated,upright}/ a memory bank for each reference image

Banks of several references are merged from these, and equal those that ``anomalydino fit`` builds. Where the rotated
views of a reference are there, its upright one is taken from them. A reference's file is named by the content of the
image, so that a changed image is encoded again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console

# Workers import this module for its names alone: what needs torch is imported where it is used.
from anomalydino_plugin import MemoryBank
from jobs import cluster, extract
from jobs.config import ExtractConfig, FitConfig
from jobs.filesystem import Folder, read_bytes
from jobs.inputs import ImageRecord
from jobs.progress import ImageProgress
from jobs.reproduce.settings import ReproduceConfig
from jobs.stage import RunSummary
from jobs.store import folder_name
from jobs.task_pool import run_tasks


class FeatureKind(NamedTuple):
    """What features depend on beside the image."""

    backbone: str
    resolution: int

    @property
    def name(self) -> str:
        """As one folder name."""
        return f"{folder_name(self.backbone)}-{self.resolution}"


def features_folder(config: ReproduceConfig, kind: FeatureKind, category: str) -> str:
    """Where the features of a category's test images are."""
    return Folder(config.out).uri(f"features/{kind.name}/{folder_name(category)}")


def extract_tests(config: ReproduceConfig, kind: FeatureKind, category: str, console: Console) -> RunSummary:
    """Encode a category's test images that are not encoded yet.

    Raises:
        AnomalyDINOError: as ``anomalydino extract``.
    """
    settings = ExtractConfig(
        images=config.root,
        out=features_folder(config, kind, category),
        category=category,
        resolution=kind.resolution,
        backbone=kind.backbone,
        weights=config.weights,
        batch_size=config.batch_size,
        index_source=config.index_source,
        engine=config.engine,
        num_workers=config.num_workers,
        gpus_per_worker=config.gpus_per_worker,
        threads=config.threads,
    )
    return extract.run(settings, console)


def _names(kind: FeatureKind, record: ImageRecord) -> dict[bool, str]:
    """Names below OUT of a reference's bank with rotations (``True``) and without; reads the image."""
    content = hashlib.sha256(f"{record.image_id}\n".encode() + read_bytes(record.uri)).hexdigest()[:32]
    folder = f"references/{kind.name}/{folder_name(record.category)}"
    return {True: f"{folder}/rotated/{content}.safetensors", False: f"{folder}/upright/{content}.safetensors"}


class ReferenceOrder(NamedTuple):
    """A reference image to encode, and the name of its bank."""

    record: ImageRecord
    name: str
    rotated: bool


class ReferenceEncoder:
    """Encodes reference images one by one; knows no Ray.

    Args:
        config: of the command.
        kind: of features.
        weights: resolved weights file, or ``"random"``.
        device: ``"cpu"`` or ``"cuda"``.
    """

    def __init__(self, config: ReproduceConfig, kind: FeatureKind, weights: str, device: str) -> None:
        from jobs.bank_builder import few_shot_model

        self.folder = Folder(config.out)
        self.models = {
            rotated: few_shot_model(
                FitConfig(
                    images=config.root,
                    out=config.out,
                    resolution=kind.resolution,
                    backbone=kind.backbone,
                    batch_size=config.batch_size,
                    engine=config.engine,
                    rotations="agnostic" if rotated else "informed",
                ),
                weights,
                device,
            )
            for rotated in (True, False)
        }

    def run(self, order: ReferenceOrder) -> None:
        """Encode one image and write its bank, whole or not at all."""
        from jobs.decode import read

        model = self.models[order.rotated]
        model.clear()
        model.add_reference(read(order.record.uri), order.record.image_id)
        bank = model.freeze()
        with self.folder.writing(order.name) as path:
            bank.save(path)


def encode_references(
    config: ReproduceConfig,
    kind: FeatureKind,
    wanted: Sequence[tuple[ImageRecord, bool]],
    weights: str,
    layout: cluster.Resources,
    console: Console,
) -> dict[tuple[str, bool], str]:
    """Encode the reference images that are not encoded yet.

    Args:
        config: of the command.
        kind: of features.
        wanted: reference images, and whether with rotations.
        weights: resolved weights file.
        layout: of the workers; Ray is connected.
        console: for progress.

    Returns:
        Names of their banks by image id and rotations; an upright view may be in the bank of all views.

    Raises:
        AnomalyDINOError: an image that cannot be used.
    """
    folder = Folder(config.out)
    present = set(folder.files(f"references/{kind.name}"))
    turned = {record.image_id for record, rotated in wanted if rotated}
    names: dict[tuple[str, bool], str] = {}
    orders: dict[str, ReferenceOrder] = {}
    known = {record: _names(kind, record) for record in dict.fromkeys(record for record, _ in wanted)}
    for record, rotated in dict.fromkeys(wanted):
        whole = rotated or record.image_id in turned or known[record][True] in present
        name = known[record][whole]
        names[record.image_id, rotated] = name
        if name not in present:
            orders[name] = ReferenceOrder(record, name, whole)
    console.print(
        f"references at {kind.resolution}, {kind.backbone}: {len(orders)} to encode, "
        f"{len(set(names.values())) - len(orders)} at hand",
        markup=False,
    )
    if orders:
        with ImageProgress(console, "reference images", len(orders)) as progress:
            for _ in run_tasks(ReferenceEncoder, (config, kind, weights), list(orders.values()), layout):
                progress.advance(1)
    return names


def read_references(config: ReproduceConfig, names: Sequence[str], rotated: bool) -> MemoryBank:
    """The bank of some references.

    Args:
        config: of the command.
        names: of their banks.
        rotated: whether with rotations.
    """
    from anomalydino_plugin import merge_banks

    folder = Folder(config.out)
    banks = []
    for name in names:
        with folder.fetched(name) as path:
            bank = MemoryBank.load(path)
        banks.append(bank if rotated else upright(bank))
    return merge_banks(banks)


def upright(bank: MemoryBank) -> MemoryBank:
    """The rows of a bank that come from unrotated views."""
    if bank.angles == (0.0,):
        return bank
    kept = bank.sources[:, 1] == bank.angles.index(0.0)
    sources = bank.sources[kept].clone()
    sources[:, 1] = 0
    return dataclasses.replace(
        bank,
        rows=bank.rows[kept],
        sources=sources,
        foreground=bank.foreground[kept],
        angles=(0.0,),
        fingerprint={**bank.fingerprint, "rotations": json.dumps([0.0])},
    )
