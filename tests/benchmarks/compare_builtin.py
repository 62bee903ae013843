"""Ours beside anomalib's built-in AnomalyDINO: same images, same weights, 1 shot, `Engine.fit` and `Engine.test`.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/compare_builtin.py [--categories bottle screw] [--limit N]
        [--no-export]

Prints a Markdown table. Every row runs in its own process, so that its peak memory is its own; the peak is read after
`Engine.test` and before the exports. Seconds are the wall time of `Engine.test` (reading, model, metrics) over the
number of images. The pixel AUROC is each model's own metric: the built-in model's compares at the size of its input,
ours at the size of the image. Exports are asked for with `input_size=(resolution, resolution)`; "yes" says that a file
was written, not that it computes the same. Where `golden/anomalib_builtin.json` says another image AUROC of the built-in
model, a line says so (docs/compare_builtin.md says what was tried). Exits with 1 if a row fails.
"""

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

# The main process imports nothing heavy: on Linux a child's ru_maxrss starts at its parent's.
if TYPE_CHECKING:
    from anomalib.data import Folder
    from anomalib.engine import Engine
    from anomalib.models.components import AnomalibModule
    from torch import nn

ASSETS = Path(os.environ.get("ANOMALYDINO_ASSETS", "../shared")).resolve()
WEIGHTS = str(ASSETS / "weights" / "dinov2_vits14.safetensors")
CATEGORIES = ("bottle", "screw")
MASKED_BY_BUILTIN = ("screw",)  # MASKED_CATEGORIES in the docstring of the built-in model
BUILTIN, OURS = "built-in", "ours"
DEFAULT_RESOLUTION = {BUILTIN: 252, OURS: 448}
ROWS = ((BUILTIN, 252), (OURS, 448), (BUILTIN, 448), (OURS, 252))
EXPORTS = ("torch", "onnx", "openvino")
ERROR_LENGTH = 60
MAX_POINTS = 0.1  # of image AUROC, from the figure measured earlier
SEED = 0  # the built-in model's randomized PCA draws from numpy's global generator


# One row, in its own process


def build_datamodule(category: str, limit: int | None, model_name: str) -> "Folder":
    """Images of a category; for the built-in model only the first training image."""
    from anomalib.data import Folder

    class FirstImages(Folder):
        def _setup(self, _stage: str | None = None) -> None:
            super()._setup(_stage)
            if model_name == BUILTIN:
                self.train_data.subsample([0], inplace=True)  # samples are sorted by path
            if limit is not None:
                labels = self.test_data.samples.image_path.map(lambda path: Path(path).parent)
                position = self.test_data.samples.groupby(labels).cumcount()
                self.test_data.subsample(list(position.index[position < limit]), inplace=True)

    root = ASSETS / "data" / "mvtec" / category
    defects = sorted(path.name for path in (root / "test").iterdir() if path.name != "good")
    return FirstImages(
        name=category,
        root=root,
        normal_dir="train/good",
        abnormal_dir=[f"test/{name}" for name in defects],
        normal_test_dir="test/good",
        mask_dir=[f"ground_truth/{name}" for name in defects],
        num_workers=0,
        eval_batch_size=1,
        val_split_mode="same_as_test" if model_name == BUILTIN else "none",
    )


def build_builtin(category: str, resolution: int) -> "AnomalibModule":
    """The built-in model on local weights: timm would ask a hub for them."""
    import timm
    from anomalib.models import AnomalyDINO
    from safetensors.torch import load_file

    create_model = timm.create_model

    def create_with_local_weights(name: str, pretrained: bool = False, **options: Any) -> "nn.Module":
        backbone = create_model(name, pretrained=False, **options)
        backbone.load_state_dict(load_file(WEIGHTS), strict=True)  # pos_embed is timm's own, 518 x 518
        return backbone

    with patch("timm.create_model", create_with_local_weights):
        return AnomalyDINO(
            masking=category in MASKED_BY_BUILTIN,
            pre_processor=AnomalyDINO.configure_pre_processor((resolution, resolution)),
            visualizer=False,
        )


def build_ours(resolution: int) -> "AnomalibModule":
    from anomalydino_plugin import AnomalyDINOFewShot

    return AnomalyDINOFewShot(weights=WEIGHTS, resolution=resolution, visualizer=False)


def root_cause(error: BaseException) -> str:
    """The error that started a chain, in one short line that a Markdown table can hold."""
    while error.__cause__ is not None:
        error = error.__cause__
    plain = re.sub(r"\x1b\[[0-9;]*m", "", f"{type(error).__name__}: {error}")
    return " ".join(plain.split())[:ERROR_LENGTH].replace("|", "/")


def try_export(engine: "Engine", model: "AnomalibModule", export_type: str, resolution: int, folder: str) -> str:
    try:
        path = engine.export(model, export_type, export_root=folder, input_size=(resolution, resolution))
    except Exception as error:  # exporters raise their own kinds
        return f"no ({root_cause(error)})"
    return "yes" if path is not None and Path(path).is_file() else "no (no file was written)"


def run_one(category: str, model_name: str, resolution: int, limit: int | None, export: bool) -> dict[str, Any]:
    """Fit, test and export one model; the figures of one row."""
    from anomalib.engine import Engine
    from lightning.pytorch import seed_everything

    seed_everything(SEED)
    datamodule = build_datamodule(category, limit, model_name)
    model = build_builtin(category, resolution) if model_name == BUILTIN else build_ours(resolution)
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(default_root_dir=folder, logger=False, accelerator="cpu", enable_progress_bar=False)
        engine.fit(model, datamodule=datamodule)
        started = time.perf_counter()
        (metrics,) = engine.test(model, datamodule=datamodule)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
        exported = {kind: try_export(engine, model, kind, resolution, folder) for kind in EXPORTS if export}
    return {
        "image_auroc": 100 * metrics["image_AUROC"],
        "pixel_auroc": 100 * metrics["pixel_AUROC"],
        "images": len(datamodule.test_data),
        "seconds_per_image": seconds / len(datamodule.test_data),
        "peak_gb": peak,
        "exports": exported,
    }


# The table


def run_in_process(row: dict[str, Any]) -> dict[str, Any] | None:
    """Figures of a row from a process of its own; `None` after a failure, whose end goes to stderr."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", json.dumps(row)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    if done.returncode:
        print(f"{row} failed with {done.returncode}:\n{done.stderr[-2000:]}", file=sys.stderr, flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def describe_setting(category: str, model_name: str, resolution: int) -> str:
    if model_name == BUILTIN:
        masking = "on" if category in MASKED_BY_BUILTIN else "off"
        setting = f"{resolution}x{resolution}, masking {masking}"
    else:
        setting = f"{resolution}, masking auto"
    return f"{setting} (defaults)" if resolution == DEFAULT_RESOLUTION[model_name] else setting


def format_row(category: str, model_name: str, resolution: int, figures: dict[str, Any] | None) -> str:
    cells = [category, model_name, describe_setting(category, model_name, resolution)]
    if figures is None:
        cells += ["failed", *["-"] * (3 + len(EXPORTS))]
    else:
        cells += [f"{figures[name]:.2f}" for name in ("image_auroc", "pixel_auroc", "seconds_per_image", "peak_gb")]
        cells += [figures["exports"].get(kind, "-") for kind in EXPORTS]
    return f"| {' | '.join(cells)} |"


def report_other_figure(category: str, model_name: str, resolution: int, figures: dict[str, Any]) -> None:
    """Say on stderr where the reference file has another image AUROC for the built-in model."""
    masking = "mask" if category in MASKED_BY_BUILTIN else "no mask"
    golden = json.loads((ASSETS / "golden" / "anomalib_builtin.json").read_text())
    expected = golden[category].get(f"{resolution}x{resolution}, {masking}")
    if model_name != BUILTIN or expected is None:
        return
    earlier, found = 100 * expected["image_auroc"], figures["image_auroc"]
    if abs(found - earlier) > MAX_POINTS:
        where = f"{category}, built-in, {resolution}x{resolution}"
        print(f"{where}: image AUROC {found:.2f}, the reference file says {earlier:.2f}", file=sys.stderr, flush=True)


def all_rows(categories: list[str]) -> Iterator[tuple[str, str, int]]:
    for category in categories:
        for model_name, resolution in ROWS:
            yield category, model_name, resolution


def print_table(categories: list[str], limit: int | None, export: bool) -> bool:
    """Print the rows as they come; whether all ran."""
    columns = ["category", "model", "setting", "image AUROC", "pixel AUROC", "seconds per image", "peak GB"]
    columns += [f"{kind} export" for kind in EXPORTS]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
    good = True
    for category, model_name, resolution in all_rows(categories):
        row = {"category": category, "model_name": model_name, "resolution": resolution}
        figures = run_in_process({**row, "limit": limit, "export": export})
        print(format_row(**row, figures=figures), flush=True)
        if figures is None:
            good = False
        elif limit is None:
            report_other_figure(**row, figures=figures)
    return good


def print_machine() -> None:
    packages = ", ".join(f"{name} {version(name)}" for name in ("anomalib", "torch", "openvino"))
    machine = f"{os.cpu_count()} CPUs, {platform.platform()}, Python {platform.python_version()}"
    print(f"\n{machine}; {packages}; {date.today()}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--categories", nargs="+", choices=CATEGORIES, default=list(CATEGORIES))
    parser.add_argument("--limit", type=int, help="at most so many images of each test label; default all")
    parser.add_argument("--no-export", dest="export", action="store_false", help="leave the exports out")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    if options.one is not None:
        print(json.dumps(run_one(**options.one)))
        return 0
    good = print_table(options.categories, options.limit, options.export)
    print_machine()
    if not good:
        print("FAILED: see above", file=sys.stderr)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
