"""Imports point down only (DESIGN: layout and layers)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PURE = {"decoding", "preprocessing", "masking", "matching", "mutual", "scoring", "calibration"}
# module of the plugin -> modules of the plugin it may import
ALLOWED = {
    "errors": set(),
    "full_precision": set(),
    "triton_launch": set(),
    **{name: {"errors"} for name in PURE},
    "image_tensors": {"errors", "preprocessing"},
    "kernels": {"errors", "triton_launch", "kernels"},
    "matching": {"errors", "full_precision", "kernels"},
    "mutual": {"errors", "full_precision", "kernels"},
    "weights": {"errors", "weights"},
    "backbone": {"errors", "weights"},
    "engines": {"errors", "triton_launch", "weights", "backbone", "engines"},
    "detection": {"preprocessing", "scoring"},
    "graph": {"errors", "backbone", "mutual", "graph"},
    "memory_bank": {"errors", "matching"},
    "bank_editing": {"errors", "memory_bank"},
    "coreset": {"bank_editing", "memory_bank"},
    "patch_model": {"errors", "backbone", "detection", "engines", "graph", "image_tensors", *PURE},
    "exact_buffers": set(),
    "post_processor": {"errors", "calibration", "exact_buffers"},
    "host_images": {"errors"},
    "host": {"errors", "backbone", "post_processor", "host_images"},
    "pixel_metrics": {"errors"},
    "metrics": {"errors", "metrics"},
    "registration": {"few_shot", "batched"},
    "__main__": {"registration"},
    "few_shot": {
        *{"errors", "backbone", "memory_bank", "bank_editing", "patch_model", "detection", "graph", "few_shot"},
        *{"post_processor", "pixel_metrics", "host", "host_images", "exact_buffers", "engines", "kernels"},
        "image_tensors",
        *PURE,
    },
    "batched": {
        *{"errors", "backbone", "patch_model", "detection", "graph", "batched"},
        *{"post_processor", "pixel_metrics", "host", "engines", "kernels", "image_tensors"},
        *PURE,
    },
}
HOST = {"anomalib", "lightning"}
HOST_FILES = {
    "lightning_model.py",
    "post_processor.py",
    "pixel_metrics.py",
    "registration.py",
    "coreset.py",
    "host.py",
    "__main__.py",
    "baseline_models.py",
}
JOBS_ONLY = {"ray", "pyarrow"}
# stage layers of jobs, low to high; a file imports from its own or a lower layer
JOBS = [
    {
        *{"settings", "schema", "progress", "pictures", "demo_defects", "filesystem", "parquet", "cluster"},
        *{"records", "messages", "resources"},
    },
    {"config", "inputs", "manifest", "visa", "usage", "worker", "demo_data", "weights_command"},
    {"store", "decode", "shards", "encoder", "locations", "truth", "metric_rows"},
    {"tables", "task_pool", "dataflow", "embeddings", "bank_builder", "scored_run", "metrics_table", "metrics_files"},
    {"patch_reader", "run_geometry"},
    {"run_records"},
    {"stage", "scorer", "embedding_scorer", "matcher", "match_cost", "pixel_evaluation", "gallery", "masking_sheet"},
    {"match_rates"},
    {"evaluate"},
    {"verify", "verify_banks", "verify_files", "verify_findings", "verify_records", "verify_rows"},
    {"report", "maps"},
    {"extract", "fit", "match", "doctor"},
    {"score", "batched"},
    {"demo", "pipeline", "reproduce"},
    {"submit"},
    {"cli"},
]


def imports(source: str) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module in {"anomalydino_plugin", "jobs"}
                else [node.module]
            )
    return names


def violations(path: Path, source: str) -> list[str]:
    package, found = path.parts[0], []
    for name in imports(source):
        top, second = (*name.split("."), "")[:2]
        if top in HOST and path.name not in HOST_FILES:
            found.append(f"{path}: only {sorted(HOST_FILES)} may import {top}")
        if top in JOBS_ONLY and package != "jobs":
            found.append(f"{path}: only jobs may import {top}")
        if package == "jobs" and top == "anomalydino_plugin" and second in set(ALLOWED) - {"weights"}:
            found.append(f"{path}: jobs may import only public names of the plugin, imports {name}")
        if package == "anomalydino_plugin":
            found += _plugin(path, top, second)
        elif top == "jobs" and second and _layer(second) > _layer(_own(path)):
            found.append(f"{path}: imports {name}, which is above it")
    return found


def _plugin(path: Path, top: str, second: str) -> list[str]:
    own = _own(path)
    if top == "jobs":
        return [f"{path}: the plugin knows nothing of jobs"]
    if top != "anomalydino_plugin" or own == "__init__" or second in ALLOWED[own]:
        return []
    return [f"{path}: may import {sorted(ALLOWED[own])}, imports {second}"]


def _own(path: Path) -> str:
    """Module or subpackage that a file belongs to."""
    return path.parts[1].removesuffix(".py")


def _layer(name: str) -> int:
    return next((level for level, names in enumerate(JOBS) if name in names), -1)


FILES = sorted(
    path.relative_to(ROOT) for package in ("anomalydino_plugin", "jobs") for path in (ROOT / package).rglob("*.py")
)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_layers(path):
    assert violations(path, (ROOT / path).read_text()) == []


def test_every_module_has_a_place_in_the_table():
    plugin = {_own(path) for path in FILES if path.parts[0] == "anomalydino_plugin"} - {"__init__"}
    assert plugin == set(ALLOWED)
    assert {_own(path) for path in FILES if path.parts[0] == "jobs"} - {"__init__"} == set().union(*JOBS)
    assert not {path.stem for path in FILES} & {"utils", "helpers", "common"}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("anomalydino_plugin/matching.py", "from anomalydino_plugin.scoring import image_score"),
        ("anomalydino_plugin/backbone.py", "import ray"),
        ("anomalydino_plugin/few_shot/torch_model.py", "from anomalib.data import Batch"),
        ("anomalydino_plugin/masking.py", "from jobs.store import Store"),
        ("jobs/store.py", "from jobs.score import run"),
        ("jobs/report/page.py", "from jobs.score import run"),
        ("jobs/scorer.py", "from anomalydino_plugin.few_shot.torch_model import FewShotModel"),
    ],
)
def test_the_check_finds_violations(path, source):
    assert violations(Path(path), source)
