"""Python API, anomalib's Engine and `anomalydino score` on the same real images: golden scores, and each other."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.thorough

CHOSEN = {
    "bottle": ["good/000.png", "good/013.png", "broken_small/003.png"],
    "screw": ["good/007.png", "thread_top/011.png"],
}


@pytest.fixture(scope="module", params=["bottle", pytest.param("screw", marks=pytest.mark.slow)])
def three(request, assets, weights_file, dinov2, tmp_path_factory):
    """Scores by way: a small tree of real files, seed 1 (its reference is the second training image)."""
    category = request.param
    source = assets / "data" / "mvtec" / category
    root = tmp_path_factory.mktemp(category) / category
    for name in CHOSEN[category]:
        _copy(source / "test" / name, root / "test" / name)
    for name in ("000.png", "001.png", "002.png"):
        _copy(source / "train" / "good" / name, root / "train" / "good" / name)
    golden = json.loads((assets / "golden" / "fewshot_448_1shot.json").read_text())[category]["1"]["scores"]
    return {
        "golden": {name: golden[name] for name in CHOSEN[category]},
        "api": _api(root, dinov2),
        "engine": _engine(root, weights_file),
        "cli": _cli(root, weights_file),
    }


@pytest.mark.parametrize("way", ["api", "engine", "cli"])
def test_golden_scores(three, way):
    assert three[way].keys() == three["golden"].keys()
    for name, expected in three["golden"].items():
        assert three[way][name] == pytest.approx(expected, rel=0.01)


def test_three_ways_agree(three):
    for name, score in three["api"].items():
        assert three["engine"][name] == pytest.approx(score, abs=1e-5)
        assert three["cli"][name] == pytest.approx(score, abs=1e-5)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _key(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


def _api(root: Path, backbone) -> dict[str, float]:
    from anomalydino_plugin import FewShotModel

    model = FewShotModel(backbone).fit([root / "train" / "good" / "001.png"])
    return {_key(str(path)): model.score(path).score for path in sorted(root.glob("test/*/*"))}


def _engine(root: Path, weights: Path) -> dict[str, float]:
    from anomalib.data import Folder
    from anomalib.engine import Engine

    from anomalydino_plugin import AnomalyDINOFewShot

    defects = [path.name for path in (root / "test").iterdir() if path.name != "good"]
    datamodule = Folder(
        name=root.name,
        root=root,
        normal_dir="train/good",
        abnormal_dir=[f"test/{name}" for name in defects],
        normal_test_dir="test/good",
        num_workers=0,
        val_split_mode="none",
    )
    model = AnomalyDINOFewShot(weights=str(weights), seed=1, post_processor=False, evaluator=False, visualizer=False)
    engine = Engine(default_root_dir=root.parent / "results", logger=False, accelerator="cpu")
    engine.fit(model, datamodule=datamodule)
    batches = engine.predict(model, datamodule=datamodule)
    return {_key(p): float(s) for b in batches for p, s in zip(b.image_path, b.pred_score, strict=True)}


def _cli(root: Path, weights: Path) -> dict[str, float]:
    import pyarrow.parquet as pq

    out = root.parent / "out"
    command = [sys.executable, "-m", "jobs.cli", "score", "--images", str(root), "--out", str(out), "--seed", "1"]
    subprocess.run([*command, "--weights", str(weights)], check=True, timeout=240, env={**os.environ})
    rows = [row for path in (out / "scores").rglob("*.parquet") for row in pq.read_table(path).to_pylist()]
    return {_key(row["uri"]): row["score"] for row in rows}
