"""Memory banks of normal images: the body of work of ``anomalydino fit``, knowing no Ray."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

from anomalydino_plugin import (
    BankError,
    FewShotModel,
    Geometry,
    MemoryBank,
    ResourceError,
    calibrate,
    load_backbone,
    masking_decision_of,
)
from jobs import encoder, tables
from jobs.config import FitConfig
from jobs.decode import read
from jobs.filesystem import checksum
from jobs.inputs import ImageRecord
from jobs.resources import GO_ON
from jobs.settings import MaskSettings
from jobs.store import REFERENCE_SHARD, Store, folder_name

_CALIBRATION = "calibration"  # note of a bank


class BankOrder(NamedTuple):
    """A bank to build: category, normal images for the bank, and held-out ones for the threshold."""

    category: str
    references: tuple[ImageRecord, ...]
    held_out: tuple[str, ...]


class BankBuilder:
    """Builds, calibrates and stores banks.

    Args:
        config: the job.
        weights: resolved weights file, or ``"random"``.
        store: where banks go.
        device: ``"cpu"`` or ``"cuda"``.
    """

    work = "building a memory bank"

    def __init__(self, config: FitConfig, weights: str, store: Store, device: str) -> None:
        self.config, self.store = config, store
        self.model = few_shot_model(config, weights, device)

    def run(self, order: BankOrder) -> dict[str, Any]:
        """Build one bank.

        Returns:
            What ``job.json`` says about it.

        Raises:
            ImageError, BankError: a reference that cannot be used; nothing is written then.
        """
        started = time.perf_counter()
        self.model.clear()
        plans = [self._add(record) for record in order.references]
        self.model.freeze()
        calibration = self._calibrate(order.held_out)
        bank = self.model.bank
        sha256 = write_bank(
            self.store,
            order.category,
            dataclasses.replace(bank, notes={**bank.notes, _CALIBRATION: json.dumps(calibration)}),
        )
        summary = {
            "category": order.category,
            "references": [record.uri for record in order.references],
            "rows": len(bank),
            "sha256": sha256,
            "fingerprint": bank.fingerprint,
            **self._masking_summary(),
            **calibration,
            "seconds": round(time.perf_counter() - started, 3),
        }
        records = [dataclasses.replace(record, category=order.category, split="train") for record in order.references]
        rows = {"images": tables.reference_images(records, plans)}
        self.store.commit(order.category, REFERENCE_SHARD, rows, {"bank": summary})
        return summary

    def _add(self, record: ImageRecord) -> Geometry:
        image = read(record.uri, self.config.max_pixels)
        self.model.add_reference(image, record.image_id)
        return self.model.plan(image)

    def _masking_summary(self) -> dict[str, Any]:
        decision = self.model.masking_decision
        evidence = {} if decision is None else {"masking_test": decision._asdict()}
        return {"masked": self.model.use_mask, **evidence}

    def _calibrate(self, held_out: Sequence[str]) -> dict[str, Any]:
        try:
            normal = [read(uri, self.config.max_pixels) for uri in held_out] or None
            calibration = calibrate(self.model, normal, false_alarm=self.config.false_alarm)
        except BankError as error:  # one unrotated reference teaches nothing: scores without a threshold
            return {"threshold": None, "threshold_reason": str(error)}
        return {
            "threshold": calibration.image_threshold,
            "pixel_threshold": calibration.pixel_threshold,
            "threshold_source": calibration.source,
            "threshold_images": calibration.images,
        }


def few_shot_model(config: FitConfig, weights: str, device: str) -> FewShotModel:
    """The model that a job's settings describe, without a bank."""
    return FewShotModel(
        load_backbone(config.backbone, weights, device=device),
        resolution=config.resolution,
        rotations=config.rotations,
        masking=cast(Literal["auto", "on", "off"], config.masking),  # no boolean after __post_init__
        reference_masking=config.reference_masking,
        morphology=config.morphology,
        k=config.k,
        statistic=config.statistic,
        batch_size=encoder.batch_size(config, device),
        engine=config.engine,
        kernel=config.kernel,
    ).to(device)


def bank_name(category: str) -> str:
    """Name of a category's bank below OUT."""
    return f"banks/{folder_name(category)}.safetensors"


def write_bank(store: Store, category: str, bank: MemoryBank) -> str:
    """Write a category's bank, whole or not at all; returns its sha256.

    Raises:
        ResourceError: no room for it.
    """
    name = bank_name(category)
    with store.folder.writing(name) as path:
        try:
            bank.save(path)
        except ResourceError as error:  # names the temporary file, which nobody will find
            reason = f"cannot write to {store.location!r}: memory bank {name!r}: {error.__cause__}"
            raise ResourceError(f"{reason}. Free space there. {GO_ON}") from error
        return checksum(path).sha256


def read_bank(store: Store, category: str) -> MemoryBank:
    """Read a category's bank.

    Raises:
        BankError: there is none, or it is damaged.
    """
    try:
        with store.folder.fetched(bank_name(category)) as path:
            return MemoryBank.load(path)
    except FileNotFoundError as error:
        raise BankError(
            f"no bank of category {category!r} under {store.location!r}: expected the --out folder of `anomalydino "
            "fit` with that category."
        ) from error


def threshold_of(bank: MemoryBank) -> float | None:
    """The image threshold that a bank was calibrated to."""
    stored: float | None = json.loads(bank.notes.get(_CALIBRATION, "{}")).get("threshold")
    return stored


def masks_by(config: MaskSettings, bank: MemoryBank) -> bool:
    """Whether images are masked: as set, or what the masking test said when the bank was built."""
    if config.masking != "auto":
        return config.masking == "on"
    decision = masking_decision_of(bank)
    return decision is not None and decision.use_mask
