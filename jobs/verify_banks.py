"""Memory banks read back: do they load, and are they what their records say?

A bank is read whole, as every worker that scores with it does.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from anomalydino_plugin import BankError, MemoryBank
from jobs.bank_builder import bank_name, read_bank
from jobs.filesystem import checksum
from jobs.store import Store
from jobs.verify_findings import Findings
from jobs.verify_records import Done, StageRecords

_UNIT_WITHIN = 1e-4  # length of a normalised row, in float32


def check_bank(
    store: Store, stage: StageRecords, record: Done, references: Collection[str] | None, findings: Findings
) -> None:
    """Check one bank.

    Args:
        store: where it is.
        stage: ``fit``.
        record: its completion record.
        references: ids of the category's reference images; ``None`` where they cannot be read.
        findings: where problems go.
    """
    name, said = bank_name(record.category), record.bank or {}
    if not store.folder.has(name):
        findings.add(name, "not there", f"the bank of category {record.category!r}, {said.get('rows')} rows")
        return
    if "sha256" in said and _differs(store, name, said, findings):
        return
    try:
        bank = read_bank(store, record.category)
    except (BankError, KeyError, ValueError, TypeError) as error:
        findings.add(name, f"cannot be read ({error})", f"a bank of {said.get('rows')} rows")
        return
    _check_content(name, bank, said, findings)
    weights = (stage.job or {}).get("weights_sha256", bank.fingerprint.get("weights"))
    if bank.fingerprint.get("weights") != weights:
        findings.add(name, f"made with weights {bank.fingerprint.get('weights')}", f"{weights}, as job.json says")
    if references is not None and (odd := sorted(set(bank.image_ids) ^ set(references))):
        what = "reference images that only the bank or only images/ has"
        findings.count(name, what, "the same in both", len(odd), odd[0])


def _differs(store: Store, name: str, said: dict[str, Any], findings: Findings) -> bool:
    with store.folder.fetched(name) as path:
        found = checksum(path).sha256
    differs = found != str(said["sha256"])
    if differs:
        findings.add(name, f"sha256 {found}", f"{said['sha256']}: its content was changed")
    return differs


def _check_content(name: str, bank: MemoryBank, said: dict[str, Any], findings: Findings) -> None:
    if len(bank) != said.get("rows"):
        findings.add(name, f"{len(bank)} rows", f"{said.get('rows')}, as its record says")
    fingerprint = said.get("fingerprint", bank.fingerprint)
    if bank.fingerprint != fingerprint:
        findings.add(name, f"fingerprint {bank.fingerprint}", f"{fingerprint}, as its record says")
    if not bool(((bank.rows.norm(dim=1) - 1).abs() <= _UNIT_WITHIN).all()):  # NaN is not within, either
        findings.add(name, "rows that are not of length 1", "L2-normalised rows")
    sources = bank.sources
    if sources.shape != (len(bank), 4) or bank.foreground.shape != (len(bank),):
        findings.add(
            name, f"provenance {tuple(sources.shape)}, foreground {tuple(bank.foreground.shape)}", "a row each"
        )
    elif len(bank) and (
        int(sources.min()) < 0
        or int(sources[:, 0].max()) >= len(bank.image_ids)
        or int(sources[:, 1].max()) >= len(bank.angles)
    ):
        findings.add(name, "provenance that names no image or angle", "indices of its reference images and angles")
