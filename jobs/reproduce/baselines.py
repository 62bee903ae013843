"""Baselines that anomalib carries, under the same references, test images and metrics as ours.

Each runs with its own defaults, at its own input size, in a process of its own (anomalib changes timm for the whole
process). One whose weights or packages are not at hand is left out, with a line that names what is missing.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from anomalydino_plugin import AnomalyDINOError, ConfigError
from jobs import encoder
from jobs.config import ExtractConfig
from jobs.filesystem import Folder, local_path
from jobs.inputs import ImageRecord, Inputs
from jobs.metric_rows import CategoryMetrics
from jobs.reproduce.protocol import PAPER_BACKBONE, Setting, officially_masked
from jobs.reproduce.results import ResultRow, Results
from jobs.reproduce.runs import chosen_references
from jobs.reproduce.settings import Baseline, ReproduceConfig
from jobs.store import folder_name

BUILTIN = "anomalydino_builtin"
_ENDINGS = (".safetensors", ".pth", ".pt", ".bin")


class BaselineModel(NamedTuple):
    """What a baseline needs.

    Attributes:
        resolution: its default input, squashed to a square, pixels.
        file: name of its weights below ``--baseline_weights``, without ending.
        repository: of the hub, whose cache is looked into; nothing is downloaded.
        hub_file: name of the weights there.
        module: that must be installed beside anomalib.
    """

    resolution: int
    file: str = ""
    repository: str = ""
    hub_file: str = "model.safetensors"
    module: str = "anomalib"


KNOWN: dict[Baseline, BaselineModel] = {
    "anomalydino_builtin": BaselineModel(252),
    "padim": BaselineModel(256, "resnet18", "timm/resnet18.a1_in1k"),
    "patchcore": BaselineModel(256, "wide_resnet50_2", "timm/wide_resnet50_2.racm_in1k"),
    "winclip": BaselineModel(
        240,
        "ViT-B-16-plus-240",
        "timm/vit_base_patch16_plus_clip_240.laion400m_e31",
        "open_clip_model.safetensors",
        "open_clip",
    ),
}


class BaselineOrder(NamedTuple):
    """One baseline to fit and measure.

    Attributes:
        baseline: which.
        category: which.
        references: local paths.
        tests: test images.
        resolution: of its input.
        weights: file, or ``random``.
        masked: for the built-in AnomalyDINO, which leaves masking to its user.
        out: folder for metrics.
        pixel: whether to measure pixels, where there are masks.
    """

    baseline: Baseline
    category: str
    references: tuple[str, ...]
    tests: tuple[ImageRecord, ...]
    resolution: int
    weights: str
    masked: bool
    out: str
    pixel: bool


def measure_baselines(config: ReproduceConfig, inputs: Inputs, results: Results, console: Console) -> list[str]:
    """Measure the baselines of a configuration that have no row yet.

    Returns:
        A line for each that could not be measured.
    """
    skipped = []
    spawn = multiprocessing.get_context("spawn")
    for baseline in config.baselines:
        try:
            weights = find_weights(baseline, config)
        except AnomalyDINOError as error:
            skipped.append(f"skipped: {baseline}: {error}")
            console.print(skipped[-1], markup=False, soft_wrap=True)
            continue
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            for setting, category, chosen in _todo(config, baseline, inputs, results):
                line = _measure(config, inputs, results, setting, category, chosen, weights, process)
                console.print(line, markup=False, soft_wrap=True)
                skipped += [line] if line.startswith("skipped") else []
    return skipped


def find_weights(baseline: Baseline, config: ReproduceConfig) -> str:
    """Where a baseline's weights are.

    Raises:
        ConfigError: they, or a package, are not at hand; says what is missing.
        WeightsError: no weights of DINOv2 for the built-in AnomalyDINO.
    """
    model = KNOWN[baseline]
    if importlib.util.find_spec(model.module) is None:
        raise ConfigError(f"the Python module {model.module!r} is not installed.")
    if config.weights is not None and config.weights.partition(":")[0] == "random":
        return config.weights
    if baseline == BUILTIN:
        own = config.weights if config.backbone == (PAPER_BACKBONE,) else None
        settings = ExtractConfig(images=config.root, out=config.out, weights=own, index_source=config.index_source)
        return encoder.find_weights(settings, Console(quiet=True))[0]
    if config.baseline_weights is not None:
        folder = Path(local_path(config.baseline_weights) or config.baseline_weights)
        for ending in _ENDINGS:
            if (folder / f"{model.file}{ending}").is_file():
                return str(folder / f"{model.file}{ending}")
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model.repository, model.hub_file)
    if isinstance(cached, str):
        return cached
    raise ConfigError(
        f"its weights are not at hand: expected {model.file}.safetensors (or .pth) in the folder of "
        f"--baseline_weights, or {model.hub_file} of {model.repository} in the Hugging Face cache."
    )


def _todo(
    config: ReproduceConfig, baseline: Baseline, inputs: Inputs, results: Results
) -> Iterator[tuple[Setting, str, tuple[ImageRecord, ...]]]:
    for shots in config.shots:
        for seed in range(config.seeds):
            own = ("own", "auto", "own", "own", 1, "own")
            setting = Setting(shots, seed, KNOWN[baseline].resolution, *own, method=baseline)
            for category in inputs.categories:
                chosen = chosen_references(inputs.references[category], setting)
                if chosen is not None and not results.has(setting, category, config.pixel):
                    yield setting, category, chosen


def _measure(
    config: ReproduceConfig,
    inputs: Inputs,
    results: Results,
    setting: Setting,
    category: str,
    chosen: tuple[ImageRecord, ...],
    weights: str,
    process: Executor,
) -> str:
    """Measure one and keep its row; returns a line about it."""
    from jobs.reproduce.baseline_models import run_baseline

    baseline: Baseline = setting.method  # type: ignore[assignment]  # one of them
    run = f"baselines/{setting.name}/{folder_name(category)}"
    what = f"{category}, {setting.label}, seed {setting.seed}"
    masked = baseline == BUILTIN and officially_masked(config.dataset, category)
    tests = tuple(record for record in inputs.images if record.category == category)
    paths = [local_path(record.uri) for record in (*chosen, *tests)]
    if None in paths:
        return f"skipped: {what}: anomalib reads local files alone"
    order = BaselineOrder(
        baseline=baseline,
        category=category,
        references=tuple(map(str, paths[: len(chosen)])),
        tests=tests,
        resolution=setting.resolution,
        weights=weights,
        masked=masked,
        out=Folder(config.out).uri(run),
        pixel=config.pixel,
    )
    try:
        metrics: CategoryMetrics = process.submit(run_baseline, order).result()
    except Exception as error:  # models of others raise what they like; ours are measured all the same
        return f"skipped: {what}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    names = "|".join(record.image_id for record in chosen)
    results.put(ResultRow(config.dataset, setting, False, masked, names, run, config.pixel, metrics))
    return f"{what}: image AUROC {'-' if metrics.auroc is None else f'{100 * metrics.auroc:.2f}'}"
