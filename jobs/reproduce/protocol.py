"""The paper's protocol: which settings are measured, and what they mean for a category.

Source of the lists: the official code (commit b3435f0), ``src/utils.py``, ``get_dataset_info``; the seeds are its
``src/detection.py``, ``sorted(...)[seed * shots : (seed + 1) * shots]``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal, NamedTuple

from jobs.reproduce.settings import ReproduceConfig
from jobs.store import folder_name

PAPER_BACKBONE, PAPER_STATISTIC, PAPER_K = "dinov2_vits14", "mean_top:0.01", 1
INFORMED_ROTATIONS = {"mvtec": frozenset({"hazelnut", "screw"})}  # VisA: none
OFFICIAL_MASKS = {"mvtec": frozenset({"capsule", "hazelnut", "pill", "screw", "toothbrush"})}  # VisA: all


class Setting(NamedTuple):
    """One row of a table of the paper, for one seed.

    Attributes:
        shots: reference images; ``None`` for batched zero-shot.
        seed: which; ``None`` for batched zero-shot, and in tables, where it stands for all of them.
        resolution: pixels.
        preprocess: ``agnostic`` or ``informed``; ``none`` for batched zero-shot, which rotates nothing.
        rotations: ``auto``, ``on`` or ``off``.
        masking: ``auto``, ``on``, ``off`` or ``official``.
        statistic: image score.
        k: nearest neighbours.
        backbone: name.
        method: ours, or a baseline.
    """

    shots: int | None
    seed: int | None
    resolution: int
    preprocess: str
    rotations: str = "auto"
    masking: str = "auto"
    statistic: str = PAPER_STATISTIC
    k: int = PAPER_K
    backbone: str = PAPER_BACKBONE
    method: str = "anomalydino"

    @property
    def label(self) -> str:
        """For people: what differs from the defaults alone."""
        parts = [] if self.method == "anomalydino" else [self.method]
        parts += ["batched" if self.shots is None else f"{self.shots} shot", f"{self.resolution}"]
        parts += [] if self.preprocess in {"none", "own"} else [self.preprocess]
        parts += [] if self.rotations == "auto" else [f"rotations {self.rotations}"]
        parts += [] if self.masking in {"auto", "own"} else [f"masking {self.masking}"]
        parts += [] if self.statistic in {PAPER_STATISTIC, "own"} else [self.statistic]
        parts += [] if self.k == PAPER_K else [f"k {self.k}"]
        parts += [] if self.backbone in {PAPER_BACKBONE, "own"} else [self.backbone]
        return ", ".join(parts)

    @property
    def name(self) -> str:
        """As one folder name."""
        return folder_name("-".join(str(value) for value in self if value not in {None, ""}))

    @property
    def of_the_paper(self) -> bool:
        """Whether it is one that the paper has figures of, but for its number of shots."""
        same = (self.statistic, self.k, self.backbone) == (PAPER_STATISTIC, PAPER_K, PAPER_BACKBONE)
        default = self.rotations == "auto" and self.masking in {"auto", "official"}
        return same and default and self.preprocess in {"agnostic", "none"} and self.method == "anomalydino"

    def rotates(self, dataset: str, category: str) -> bool:
        """Whether reference images of a category are rotated."""
        if self.rotations != "auto":
            return self.rotations == "on"
        return self.preprocess == "agnostic" or category in INFORMED_ROTATIONS.get(dataset, frozenset())

    def masks(self, dataset: str, category: str) -> Literal["auto", "on", "off"]:
        """The setting ``masking`` of a run on a category."""
        if self.masking == "official":
            return "on" if officially_masked(dataset, category) else "off"
        return "on" if self.masking == "on" else "off" if self.masking == "off" else "auto"

    def run_name(self, dataset: str, category: str) -> str:
        """Folder of its run, shared with settings that mean the same for this category."""
        turned = "batched" if self.shots is None else "rotated" if self.rotates(dataset, category) else "upright"
        return self._replace(preprocess=turned, rotations="", masking=self.masks(dataset, category)).name


def officially_masked(dataset: str, category: str) -> bool:
    """Whether the official code masks a category's test images."""
    return dataset == "visa" or category in OFFICIAL_MASKS.get(dataset, frozenset())


def settings_of(config: ReproduceConfig) -> list[Setting]:
    """All settings of a command, those of one backbone and resolution together, few shots first."""
    found: list[Setting] = []
    for backbone, resolution in itertools.product(config.backbone, config.resolution):
        if config.few_shot:
            found += _few_shot(config, resolution, backbone)
        if config.batched:
            found += [
                Setting(None, None, resolution, "none", "auto", masking, statistic, PAPER_K, backbone)
                for masking, statistic in itertools.product(config.masking, config.statistic)
            ]
    return found


def _few_shot(config: ReproduceConfig, resolution: int, backbone: str) -> Iterator[Setting]:
    values = (config.shots, range(config.seeds), config.preprocess, config.rotations)
    more = (config.masking, config.statistic, config.k)
    for shots, seed, preprocess, rotations, masking, statistic, k in itertools.product(*values, *more):
        yield Setting(shots, seed, resolution, preprocess, rotations, masking, statistic, k, backbone)
