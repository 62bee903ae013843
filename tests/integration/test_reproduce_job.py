"""``anomalydino reproduce`` through a real local Ray, with a tiny untrained backbone."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.dataset as ds
import pytest
from generated import TINY, save, textured
from generated_visa import make_visa
from rich.console import Console
from safetensors.torch import save_file

from anomalydino_plugin import AnomalyDINOError, ConfigError, InputError, load_backbone
from jobs.config import BatchedConfig, ScoreConfig
from jobs.evaluate import evaluate
from jobs.inputs import image_id
from jobs.reproduce import command
from jobs.reproduce.results import Results
from jobs.reproduce.settings import ReproduceConfig

ENCODING = {"backbone": (TINY,), "weights": "random:0", "resolution": (64,), "threads": 1}
pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.thorough]


def call(root: Path, out: Path, shown: io.StringIO | None = None, **settings) -> str:
    shown = shown or io.StringIO()
    config = ReproduceConfig(**{"dataset": "mvtec", "root": str(root), "out": str(out), **ENCODING, **settings})
    command.run(config, Console(file=shown, width=200))
    return shown.getvalue()


def metrics(out: Path) -> dict[tuple, tuple]:
    return {(one.setting, one.metrics.category): one.metrics for one in Results(str(out)).rows()}


def written(out: Path, *folders: str) -> dict[str, int]:
    """When each file was written."""
    files = (path for folder in folders for path in (out / folder).rglob("*") if path.is_file())
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in files if path.name != "lock"}


def scores(out: Path) -> dict[str, float]:
    return {row["image_id"]: row["score"] for row in ds.dataset(out / "scores").to_table().to_pylist()}


@pytest.fixture(scope="module")
def reproduced(mvtec_tree, tmp_path_factory) -> tuple[Path, str]:
    """Output folder and what was printed: 1 and 2 shots of 4 training images, agnostic and informed, batched."""
    out = tmp_path_factory.mktemp("reproduced") / "out"
    return out, call(mvtec_tree, out, shots=(1, 2), seeds=3, preprocess=("agnostic", "informed"), batched=True)


def test_every_setting_has_a_row_with_image_and_pixel_metrics(reproduced):
    rows = metrics(reproduced[0])
    assert len(rows) == 2 * (2 * (3 + 2) + 1)
    assert all(one.auroc is not None and one.pro_30 is not None and one.images == 6 for one in rows.values())
    text = (reproduced[0] / "tables.md").read_text()
    assert "| 1 shot, 64, informed, test_vit.r160_in1k | 2 | 3 |" in text
    assert "means over all 15 categories" in text


def test_settings_with_too_few_training_images_are_left_out_with_a_line(reproduced):
    assert (
        "skipped: 01, 2 shot, 64, agnostic, test_vit.r160_in1k, seed 2 takes training images 4 to 5, and there"
        in (reproduced[1])
    )
    assert "seed 2 takes training images 4 to 5" in (reproduced[0] / "tables.md").read_text()


@pytest.mark.parametrize("preprocess", ["agnostic", pytest.param("informed", marks=pytest.mark.slow)])
def test_scores_and_metrics_equal_those_of_score(reproduced, mvtec_tree, tmp_path, preprocess):
    from jobs import score

    settings = {**ENCODING, "backbone": TINY, "resolution": 64, "rotations": preprocess, "shots": 2, "seed": 1}
    score.run(ScoreConfig(images=str(mvtec_tree), out=str(tmp_path / "out"), **settings), Console(quiet=True))
    expected, direct = scores(tmp_path / "out"), {row.category: row for row in evaluate(str(tmp_path / "out"))}
    own = [
        row
        for row in Results(str(reproduced[0])).rows()
        if (row.setting.shots, row.setting.seed, row.setting.preprocess) == (2, 1, preprocess)
    ]
    found = {name: value for row in own for name, value in scores(reproduced[0] / row.run).items()}
    assert found.keys() == expected.keys()
    assert max(abs(found[name] - expected[name]) for name in expected) < 1e-6
    for row in own:
        other = direct[row.metrics.category]
        for name in ("auroc", "f1_max", "average_precision", "pixel_auroc", "pixel_f1_max", "pro_30"):
            assert getattr(row.metrics, name) == pytest.approx(getattr(other, name), abs=1e-6)


@pytest.mark.slow
def test_batched_scores_equal_those_of_batched(reproduced, mvtec_tree, tmp_path):
    from jobs import batched

    settings = {**ENCODING, "backbone": TINY, "resolution": 64}
    batched.run(BatchedConfig(images=str(mvtec_tree), out=str(tmp_path / "out"), **settings), Console(quiet=True))
    expected = scores(tmp_path / "out")
    runs = [reproduced[0] / row.run for row in Results(str(reproduced[0])).rows() if row.setting.shots is None]
    found = {name: value for run in runs for name, value in scores(run).items()}
    assert found == pytest.approx(expected, abs=1e-6)


def test_more_settings_on_the_same_folder_encode_nothing_again(reproduced, mvtec_tree, tmp_path):
    out = shutil.copytree(reproduced[0], tmp_path / "out")
    before = written(out, "features", "references", "runs", "rows")
    shown = call(
        mvtec_tree, out, shots=(1,), seeds=1, masking=("auto", "off"), k=(1, 3), statistic=("max",), rotations=("off",)
    )
    after = written(out, "features", "references", "runs", "rows")
    assert "0 to encode, 2 at hand" in shown
    rewritten = {name for name in before if after[name] != before[name]}
    assert {Path(name).name for name in rewritten} <= {"job.json"}  # extract says again that it is finished
    assert not any(name.startswith("references") for name in after.keys() - before.keys())
    again = call(mvtec_tree, out, shots=(1,), seeds=1)
    assert "to encode" not in again
    assert "extracting" not in again


class _Interrupting(io.StringIO):
    """Ctrl-C when the first row is reported."""

    def write(self, text: str) -> int:
        if "image AUROC" in text:
            raise KeyboardInterrupt
        return super().write(text)


@pytest.mark.slow
def test_a_command_that_was_interrupted_goes_on_where_it_was(reproduced, mvtec_tree, tmp_path):
    out = tmp_path / "out"
    settings = {"shots": (1, 2), "seeds": 1}
    with pytest.raises(KeyboardInterrupt):
        call(mvtec_tree, out, _Interrupting(), **settings)
    before = written(out, "features", "references", "rows")
    assert len([name for name in before if name.startswith("rows")]) == 1
    shown = call(mvtec_tree, out, **settings)
    after = written(out, "features", "references", "rows")
    assert "0 to encode" in shown
    assert {name for name in before if before[name] != after[name]} <= {
        name for name in before if name.endswith("job.json")
    }
    undisturbed = metrics(reproduced[0])
    assert {key: undisturbed[key] for key in metrics(out)} == metrics(out)
    assert len(metrics(out)) == 4


@pytest.mark.slow
def test_both_layouts_of_visa_give_the_same_rows(tmp_path):
    original, one_class = tmp_path / "VisA", tmp_path / "1cls"
    make_visa(original, one_class)
    found = []
    for root in (original, one_class):
        out = tmp_path / f"out-{root.name}"
        call(root, out, dataset="visa", shots=(1,), seeds=2)
        found.append([(row.setting, row.metrics) for row in Results(str(out)).rows()])
    assert len(found[0]) == 2
    assert found[0] == found[1]


def test_what_cannot_be_reproduced_says_why(reproduced, mvtec_tree, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        call(tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AnomalyDINOError, match="empty"):
        call(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ConfigError, match="holds a run with other settings or images"):
        call(mvtec_tree, reproduced[0], dataset="visa")
    save(tmp_path / "tree" / "a" / "train" / "good" / "0.png", textured(1))
    save(tmp_path / "tree" / "a" / "test" / "good" / "0.png", textured(2))
    (tmp_path / "tree" / "a" / "train" / "good" / "0.png").write_bytes(b"no image")
    with pytest.raises(AnomalyDINOError, match=r"0\.png"):
        call(tmp_path / "tree", tmp_path / "broken", shots=(1,), seeds=1)


def test_no_setting_that_can_be_measured_leaves_empty_tables(mvtec_tree, tmp_path):
    shown = call(mvtec_tree, tmp_path / "out", shots=(8,), seeds=1)
    assert "takes training images 0 to 7, and there are 4" in shown
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == []


@pytest.mark.slow
def test_a_baseline_runs_under_the_same_protocol(mvtec_tree, tmp_path):
    """Untrained: the plumbing alone."""
    settings = {"shots": (2,), "seeds": 1, "few_shot": False, "category": ("01",)}
    shown = call(mvtec_tree, tmp_path / "out", baselines=("anomalydino_builtin", "padim", "patchcore"), **settings)
    rows = Results(str(tmp_path / "out")).rows()
    assert [row.setting.method for row in rows] == ["anomalydino_builtin", "padim", "patchcore"], shown
    assert all(row.metrics.images == 6 and row.metrics.pro_30 is not None for row in rows)
    references = "|".join(image_id("01", f"train/good/{name}.png") for name in ("000", "001"))
    assert [row.references for row in rows] == [references] * 3


def test_the_built_in_model_gets_the_weights_of_a_file(tmp_path):
    """Once it loaded them in a call that it had made load them. In a process of its own: anomalib changes timm."""
    file = tmp_path / "dinov2.safetensors"
    vit = load_backbone("dinov2_vits14", "random:0").vit
    save_file({name: tensor.contiguous() for name, tensor in vit.state_dict().items()}, file)
    code = f"""
import torch
from anomalydino_plugin import load_weights
from jobs.reproduce.baseline_models import build
from jobs.reproduce.baselines import BaselineOrder
order = BaselineOrder("anomalydino_builtin", "c", ("a.png",), (), 252, {str(file)!r}, False, "out", False)
found, given = build(order).model.feature_encoder.feature_extractor.state_dict(), load_weights({str(file)!r}, "dinov2_vits14")
print("equal", len(given), all(torch.equal(found[name], tensor) for name, tensor in given.items()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert "equal 174 True" in done.stdout, done.stderr[-2000:]
