"""Settings of ``anomalydino reproduce``: what is measured; several values of one setting are measured each."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from anomalydino_plugin import ConfigError
from jobs.settings import Engine, Kernel, RaySettings, check_text

Dataset = Literal["mvtec", "visa", "folder"]
Preprocess = Literal["agnostic", "informed"]
Rotations = Literal["auto", "on", "off"]
Masking = Literal["auto", "on", "off", "official"]
Baseline = Literal["anomalydino_builtin", "padim", "patchcore", "winclip"]
_UNTRAINED = "random"


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig(RaySettings):
    """Settings of ``anomalydino reproduce``.

    Attributes:
        dataset: ``mvtec``, ``visa`` (either layout), or ``folder``, which the paper has no figures of.
        root: the dataset: MVTec-style tree, VisA as downloaded, one category folder, or a manifest.
        out: folder for features, runs and tables, a path or URI; several commands on one dataset may share it.
        category: only these categories; all of them if not given.
        few_shot: measure few-shot.
        batched: measure batched zero-shot, too.
        shots: numbers of reference images.
        seeds: how many; seed s takes the sorted training images s * shots to (s + 1) * shots - 1.
        resolution: smaller edge after resizing, pixels.
        preprocess: ``agnostic`` (references rotated) or ``informed`` (rotated where the official code rotates).
        rotations: of references: ``auto`` (as ``preprocess`` says), ``on`` or ``off``.
        masking: ``auto`` (the masking test decides), ``on``, ``off`` or ``official`` (the official code's list).
        statistic: image score, ``mean_top:F``, ``max`` or ``quantile:F``.
        k: nearest neighbours averaged for a patch distance.
        backbone: ``dinov2_vits14`` and relatives, or names of timm vision transformers.
        weights: file of backbone weights; looked up if not given. ``random`` only tests the plumbing.
        baselines: other models of anomalib under the same protocol.
        baseline_weights: folder with weights of baselines; the Hugging Face cache alone if not given.
        pixel: measure pixels where there are masks.
        batch_size: images encoded at a time; 4 on a CPU and 32 on a GPU if not given.
        index_source: whether the package index may serve as a source of weights.
        engine: runs the backbone: ``auto``, ``torch``, ``torch_half``, ``openvino`` or ``openvino_bf16``.
        kernel: searches for the nearest patches: ``auto``, ``torch``, ``tiles_f32``, ``tiles_bf16``, ``tiles_int8`` or
            ``triton``.
        num_workers: worker processes; as many as fit if not given.
        gpus_per_worker: 1 where there are GPUs, else 0, if not given; a fraction shares a GPU.
        threads: CPU threads of each worker; all of its node if not given.
        ray_address: an existing cluster (``auto`` or host:port); an embedded one if not given.
    """

    dataset: Dataset
    root: str
    out: str
    category: tuple[str, ...] = ()
    few_shot: bool = True
    batched: bool = False
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    seeds: int = 3
    resolution: tuple[int, ...] = (448, 672)
    preprocess: tuple[Preprocess, ...] = ("agnostic",)
    rotations: tuple[Rotations, ...] = ("auto",)
    masking: tuple[Masking, ...] = ("auto",)
    statistic: tuple[str, ...] = ("mean_top:0.01",)
    k: tuple[int, ...] = (1,)
    backbone: tuple[str, ...] = ("dinov2_vits14",)
    weights: str | None = None
    baselines: tuple[Baseline, ...] = ()
    baseline_weights: str | None = None
    pixel: bool = True
    batch_size: int | None = None
    index_source: bool = True
    engine: Engine = "auto"
    kernel: Kernel = "auto"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is tuple:
                self._set_several(name, getattr(self, name))
        for name, value in dataclasses.asdict(self).items():
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str):
                    check_text(name, text)
        self._check_numbers()
        if len(self.backbone) > 1 and self.weights is not None and self.weights.partition(":")[0] != _UNTRAINED:
            raise ConfigError(
                f"--weights={self.weights!r} for backbones {list(self.backbone)}: one file fits one backbone. Run them "
                "one by one into the same --out."
            )
        if not (self.few_shot or self.batched or self.baselines):
            raise ConfigError("nothing to measure: expected few-shot (the default), --batched or --baselines.")

    def _set_several(self, name: str, value: Any) -> None:
        """YAML may give one value bare; a value that stands twice is measured once."""
        several = (value,) if isinstance(value, (str, int)) else tuple(value or ())
        several = tuple(("on" if one else "off") if isinstance(one, bool) else one for one in several)  # bare in YAML
        if not several and name not in {"category", "baselines"}:
            raise ConfigError(f"--{name} is empty: expected at least one value.")
        object.__setattr__(self, name, tuple(dict.fromkeys(several)))

    def _check_numbers(self) -> None:
        for name in ("seeds", "shots", "resolution", "k", "batch_size", "num_workers", "threads"):
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and number < 1:
                    raise ConfigError(f"--{name}={number}: expected at least 1.")

    def effective(self) -> dict[str, Any]:
        """All settings as they are after defaults, for people to read."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]  # tuples become lists


def add_arguments(parser: Any) -> None:
    """A flag for each setting; those of several values take words until the next flag."""
    parser.add_argument("--config", action="config", help="YAML file with the same names as the flags")
    hints, described = get_type_hints(ReproduceConfig), _described()
    for field in dataclasses.fields(ReproduceConfig):
        hint = hints[field.name]
        options: dict[str, Any] = {"type": hint, "help": described[field.name]}
        if get_origin(hint) is tuple:
            options |= {"type": get_args(hint)[0], "nargs": "+"}
        if field.default is dataclasses.MISSING:
            options["required"] = True
        else:
            options["default"] = list(field.default) if isinstance(field.default, tuple) else field.default
        parser.add_argument(f"--{field.name}", **options)


def _described() -> dict[str, str]:
    """What the docstring says of each setting."""
    found: dict[str, str] = {}
    name = ""
    for line in (ReproduceConfig.__doc__ or "").partition("Attributes:\n")[2].splitlines():
        if line[8:9].strip():
            name, _, text = line.strip().partition(": ")
            found[name] = text
        elif line.strip():
            found[name] += f" {line.strip()}"
    return found
