"""Settings that several jobs share; ``config`` puts them together."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from anomalydino_plugin import ConfigError
from jobs.filesystem import refuse_secrets

# The plugin's lists (`engines.choice`, `kernels.rows`), without loading torch to show a command's help; a test holds
# them equal.
Engine = Literal["auto", "torch", "torch_half", "openvino", "openvino_bf16"]
Kernel = Literal["auto", "torch", "tiles_f32", "tiles_bf16", "tiles_int8", "triton", "faiss_ivf"]

# Changing any of these cannot change a result (what stored embeddings and banks hold is compared instead of where they
# are); everything else is part of a run's identity.
_NOT_IDENTITY = frozenset(
    {"out", "num_workers", "gpus_per_worker", "ray_address", "max_failures", "index_source", "embeddings", "banks"}
    | {"report"}
)
_AT_LEAST = {
    "resolution": 1,
    "k": 1,
    "shard_size": 1,
    "batch_size": 1,
    "num_workers": 1,
    "threads": 1,
    "seed": 0,
    "max_references": 1,
    "max_pixels": 1,
}
_AT_MOST = {"threads": 1024}  # of one worker; torch starts as many as it is told to, and ends there
_MOST_GPUS = 64  # in one machine
_SHARES = ("max_failures", "false_alarm", "share", "reference_fraction")


def as_list(value: str | list[str] | None) -> list[str] | None:
    """One name or several -> a list."""
    return [value] if isinstance(value, str) else value


def _attributes(docstring: str | None) -> list[str]:
    """Lines of the last section of a class's docstring."""
    return [line for line in (docstring or "").partition("Attributes:\n")[2].splitlines() if line.strip()]


def check_text(name: str, value: str) -> None:
    """Raise ``ConfigError`` where a setting is empty (a path would be the current folder), or holds credentials."""
    if "\0" in value:
        raise ConfigError(f"--{name}={value!r} holds a zero byte: expected text without.")
    if not value.strip():
        raise ConfigError(f"--{name} is empty: expected a value. Leave the flag out for its default.")
    try:
        refuse_secrets(value)
    except ConfigError as error:
        raise ConfigError(f"--{name}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """Every job.

    Attributes:
        out: output folder, a path or URI.
        category: only these categories; all of them if not given.
    """

    out: str
    category: str | list[str] | None = None

    def __init_subclass__(cls) -> None:
        """Gather what is said of each setting in one docstring: the command line's help reads no other."""
        lines = [line for kind in cls.__mro__ for line in _attributes(kind.__dict__.get("__doc__"))]
        cls.__doc__ = (cls.__doc__ or "").partition("Attributes:")[0] + "Attributes:\n" + "\n".join(lines) + "\n"

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, str):
                check_text(name, value)
        if isinstance(getattr(self, "masking", None), bool):  # YAML reads a bare on and off as booleans
            object.__setattr__(self, "masking", "on" if self.masking else "off")  # type: ignore[attr-defined]
        for name, low in _AT_LEAST.items():
            value = getattr(self, name, None)
            if value is not None and value < low:
                raise ConfigError(f"--{name}={value}: expected at least {low}.")
        for name, high in _AT_MOST.items():
            value = getattr(self, name, None)
            if value is not None and value > high:
                raise ConfigError(f"--{name}={value}: expected at most {high}.")
        for name in _SHARES:
            value = getattr(self, name, None)
            if value is not None and not 0.0 < value <= 1.0:
                raise ConfigError(f"--{name}={value}: expected a share above 0 and at most 1.")
        gpus = getattr(self, "gpus_per_worker", None)
        if gpus is not None and not 0.0 <= gpus <= _MOST_GPUS:
            raise ConfigError(f"--gpus_per_worker={gpus}: expected 0 to {_MOST_GPUS}, or a share of one GPU.")

    @property
    def categories(self) -> list[str] | None:
        """``category`` as a list."""
        return as_list(self.category)

    def effective(self) -> dict[str, Any]:
        """All settings as they are after defaults, for people to read."""
        return dataclasses.asdict(self)

    def identity(self, weights_sha256: str, files: Iterable[str] = ()) -> str:
        """Checksum of everything that decides the output; two runs with the same one may share an output folder.

        Args:
            weights_sha256: of the backbone.
            files: ids and places of all images, in order; added or removed files make another run.
        """
        settings = {key: value for key, value in self.effective().items() if key not in _NOT_IDENTITY}
        settings["weights"] = weights_sha256
        settings["files"] = list(files)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class RaySettings:
    """How a job is laid out on Ray.

    Attributes:
        num_workers: worker processes; as many as fit if not given.
        gpus_per_worker: 1 where there are GPUs, else 0, if not given; a fraction shares a GPU.
        threads: CPU threads of each worker; all of its node if not given.
        ray_address: an existing cluster (``auto`` or host:port); an embedded one, or inside a Ray job the job's own, if
            not given.
    """

    num_workers: int | None = None
    gpus_per_worker: float | None = None
    threads: int | None = None
    ray_address: str | None = None


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """Jobs that work through images in shards.

    Attributes:
        shard_size: images in one unit of work; sized for files of a sensible size if not given.
        max_failures: share of images that may fail before the run is stopped.
    """

    shard_size: int | None = None
    max_failures: float = 0.5


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Jobs that end in scores, which can be shown.

    Attributes:
        report: afterwards also write metrics, where images have labels, and ``OUT/report.html``.
    """

    report: bool = False


@dataclass(frozen=True, kw_only=True)
class EncodingSettings:
    """Jobs with a backbone.

    Attributes:
        resolution: smaller edge after resizing, pixels.
        backbone: ``dinov2_vits14`` and relatives, or the name of a timm vision transformer.
        weights: file of backbone weights; looked up if not given. ``random`` only tests the plumbing.
        batch_size: images encoded at a time; 4 on a CPU and 32 on a GPU if not given.
        index_source: whether the package index may serve as a source of weights.
        engine: runs the backbone: ``auto``, ``torch``, ``torch_half``, ``openvino`` or ``openvino_bf16``.
        max_pixels: of an image; larger ones (decompression bombs) become failures. 400 million if not given.
    """

    resolution: int = 448
    backbone: str = "dinov2_vits14"
    weights: str | None = None
    batch_size: int | None = None
    index_source: bool = True
    engine: Engine = "auto"
    max_pixels: int | None = None


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """Jobs that decide on foreground masks.

    Attributes:
        masking: ``auto`` (the masking test decides), ``on`` or ``off``.
        morphology: of the masks, ``official`` (1-D) or ``grid`` (2-D).
    """

    masking: Literal["auto", "on", "off"] | bool = "auto"
    morphology: Literal["official", "grid"] = "official"


@dataclass(frozen=True, kw_only=True)
class BankSettings:
    """Jobs that build memory banks.

    Attributes:
        references: folder of normal images to use instead of ``train/good``; all of them unless ``shots`` is given.
        shots: normal images for each category; 1 where they come from ``train/good``. -1 uses all.
        seed: takes the sorted normal images ``seed * shots`` to ``(seed + 1) * shots - 1`` (official rule).
        rotations: of the references, ``agnostic`` (8) or ``informed`` (none).
        reference_masking: keep only foreground patches of references, too.
        k: nearest neighbours averaged for a patch distance.
        statistic: image score, ``mean_top:F``, ``max`` or ``quantile:F``.
        calibration: folder of held-out normal images that set the threshold.
        false_alarm: share of normal images that may exceed the threshold.
        kernel: searches for the nearest patches: ``auto``, ``torch``, ``tiles_f32``, ``tiles_bf16``, ``tiles_int8``,
            ``triton`` or ``faiss_ivf`` (approximate).
    """

    references: str | None = None
    shots: int | None = None
    seed: int = 0
    rotations: Literal["agnostic", "informed"] = "agnostic"
    reference_masking: bool = False
    k: int = 1
    statistic: str = "mean_top:0.01"
    calibration: str | None = None
    false_alarm: float = 0.05
    kernel: Kernel = "auto"

    def check_shots(self) -> None:
        """Raise ``ConfigError`` unless ``shots`` is a number of images, or -1 for all."""
        if self.shots is not None and self.shots != -1 and self.shots < 1:
            raise ConfigError(f"--shots={self.shots}: expected at least 1, or -1 for all normal images.")


@dataclass(frozen=True, kw_only=True)
class MutualSettings:
    """Jobs that match images against each other.

    Attributes:
        mode: ``official`` (mean of a patch's lowest 0.1 % of distances) or ``musc`` (of the lowest 30 % of the images'
            minima).
        share: in place of 0.1 % or 30 %.
        statistic: image score, ``mean_top:F``, ``max`` or ``quantile:F``.
        reference_fraction: compare with this share of the images only, chosen by ``seed``.
        max_references: compare with at most so many images of each category, chosen by ``seed``.
        seed: of that choice.
        memory_per_worker: GB that a worker may hold while matching.
        kernel: compares patches: ``auto``, ``torch``, ``tiles_f32``, ``tiles_bf16``, ``tiles_int8`` or ``triton``.
    """

    mode: Literal["official", "musc"] = "official"
    share: float | None = None
    statistic: str = "mean_top:0.01"
    reference_fraction: float | None = None
    max_references: int | None = None
    seed: int = 0
    memory_per_worker: float = 2.0
    kernel: Kernel = "auto"

    def check_memory(self) -> None:
        """Raise ``ConfigError`` unless the budget holds the blocks that are compared."""
        if not 0.25 <= self.memory_per_worker < math.inf:
            raise ConfigError(f"--memory_per_worker={self.memory_per_worker}: expected at least 0.25 GB.")
