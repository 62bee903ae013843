"""One frozen, validated dataclass for each job; flags and YAML keys are its field names."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from anomalydino_plugin import ConfigError

# Changing any of these cannot change a score; everything else is part of a run's identity.
_NOT_IDENTITY = frozenset({"out", "num_workers", "gpus_per_worker", "ray_address", "max_failures", "index_source"})


def as_list(value: str | list[str] | None) -> list[str] | None:
    """One name or several -> a list."""
    return [value] if isinstance(value, str) else value


@dataclass(frozen=True)
class ScoreConfig:
    """Settings of ``anomalydino score``: few-shot scoring of a folder, tree or manifest of images.

    Attributes:
        images: MVTec-style tree, one category folder, flat folder (with ``references``), or CSV/Parquet manifest.
        out: output folder.
        category: only these categories; all of them if not given.
        references: folder of normal images to use instead of ``train/good``; all of them unless ``shots`` is given.
        shots: normal images for each category; 1 where they come from ``train/good``. -1 uses all.
        seed: takes the sorted normal images ``seed * shots`` to ``(seed + 1) * shots - 1`` (official rule).
        resolution: smaller edge after resizing, pixels.
        backbone: ``dinov2_vits14`` and relatives, or the name of a timm vision transformer.
        weights: file of backbone weights; looked up if not given. ``random`` only tests the plumbing.
        masking: ``auto`` (masking test on the first reference), ``on`` or ``off``.
        reference_masking: keep only foreground patches of references, too.
        morphology: of the masks, ``official`` (1-D) or ``grid`` (2-D).
        rotations: of the references, ``agnostic`` (8) or ``informed`` (none).
        k: nearest neighbours averaged for a patch distance.
        statistic: image score, ``mean_top:F``, ``max`` or ``quantile:F``.
        calibration: folder of held-out normal images that set the threshold.
        false_alarm: share of normal images that may exceed the threshold.
        write_embeddings: also write patch embeddings.
        embedding_dtype: ``float32`` or ``float16``.
        batch_size: images encoded at a time; 4 on a CPU and 32 on a GPU if not given.
        shard_size: images in one unit of work and one set of files.
        num_workers: encoder processes; as many as fit if not given.
        gpus_per_worker: 1 where there are GPUs, else 0, if not given.
        threads: CPU threads of each encoder; all of its node if not given.
        ray_address: an existing cluster (``auto`` or host:port); an embedded one if not given.
        max_failures: share of images that may fail before the run is stopped.
        index_source: whether the package index may serve as a source of weights.
    """

    images: str
    out: str
    category: str | list[str] | None = None
    references: str | None = None
    shots: int | None = None
    seed: int = 0
    resolution: int = 448
    backbone: str = "dinov2_vits14"
    weights: str | None = None
    masking: Literal["auto", "on", "off"] | bool = "auto"
    reference_masking: bool = False
    morphology: Literal["official", "grid"] = "official"
    rotations: Literal["agnostic", "informed"] = "agnostic"
    k: int = 1
    statistic: str = "mean_top:0.01"
    calibration: str | None = None
    false_alarm: float = 0.05
    write_embeddings: bool = False
    embedding_dtype: Literal["float32", "float16"] = "float32"
    batch_size: int | None = None
    shard_size: int = 32
    num_workers: int | None = None
    gpus_per_worker: float | None = None
    threads: int | None = None
    ray_address: str | None = None
    max_failures: float = 0.5
    index_source: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.masking, bool):  # YAML reads a bare on and off as booleans
            object.__setattr__(self, "masking", "on" if self.masking else "off")
        at_least = {
            "resolution": 1,
            "k": 1,
            "shard_size": 1,
            "batch_size": 1,
            "num_workers": 1,
            "threads": 1,
            "seed": 0,
        }
        for name, low in at_least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"--{name}={value}: expected at least {low}.")
        if self.shots is not None and self.shots != -1 and self.shots < 1:
            raise ConfigError(f"--shots={self.shots}: expected at least 1, or -1 for all normal images.")
        for name in ("max_failures", "false_alarm"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ConfigError(f"--{name}={getattr(self, name)}: expected a share above 0 and at most 1.")

    @property
    def categories(self) -> list[str] | None:
        """``category`` as a list."""
        return as_list(self.category)

    def identity(self, weights_sha256: str, files: Iterable[str] = ()) -> str:
        """Checksum of everything that decides the output; two runs with the same one may share an output folder.

        Args:
            weights_sha256: of the backbone.
            files: ids and places of all images, in order; added or removed files make another run.
        """
        settings = {key: value for key, value in dataclasses.asdict(self).items() if key not in _NOT_IDENTITY}
        settings["weights"] = weights_sha256
        settings["files"] = list(files)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class MaskingTestConfig:
    """Settings of ``anomalydino masking-test``.

    Attributes:
        images: as for ``score``, or a single image file.
        out: folder for the pictures, one PNG for each category.
        category: only these categories.
        references: folder of normal images to use instead of ``train/good``.
        resolution: smaller edge after resizing, pixels.
        backbone: see ``score``.
        weights: see ``score``.
        morphology: see ``score``.
        index_source: see ``score``.
    """

    images: str
    out: str
    category: str | list[str] | None = None
    references: str | None = None
    resolution: int = 448
    backbone: str = "dinov2_vits14"
    weights: str | None = None
    morphology: Literal["official", "grid"] = "official"
    index_source: bool = True

    @property
    def categories(self) -> list[str] | None:
        """``category`` as a list."""
        return as_list(self.category)


@dataclass(frozen=True)
class DemoConfig:
    """Settings of ``anomalydino demo``.

    Attributes:
        out: folder for sample images, results and pictures; it is made anew if it holds an earlier demo.
        resolution: smaller edge after resizing, pixels.
        weights: see ``score``.
        index_source: see ``score``.
    """

    out: str = "demo_output"
    resolution: int = 448
    weights: str | None = None
    index_source: bool = True
