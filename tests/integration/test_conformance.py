"""Both models through what anomalib's own integration suite asks of every model, on generated MVTec-style data."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from anomalib.cli import AnomalibCLI
from anomalib.data import MVTecAD
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from anomalib.models import get_model
from generated import TINY

import anomalydino_plugin

DOCS = Path(__file__).parents[2] / "docs" / "anomalib"
MODELS = ["AnomalyDINOFewShot", "AnomalyDINOBatched"]
SETTINGS = {"backbone": TINY, "weights": "random:0", "resolution": 64, "masking": "off"}
SLOW = pytest.mark.slow
pytestmark = [pytest.mark.parametrize("name", MODELS), pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("project")


def objects(name: str, tree: Path, project: Path):
    model = getattr(anomalydino_plugin, name)(**SETTINGS)
    engine = Engine(logger=False, default_root_dir=project, max_epochs=1, devices=1, accelerator="cpu")
    return model, MVTecAD(root=tree, category="01", train_batch_size=2, num_workers=0), engine


@pytest.fixture(scope="module")
def checkpoints(mvtec_tree, project) -> dict[str, str]:
    """A fitted checkpoint of each model, as anomalib's test_fit leaves it."""
    made = {}
    for name in MODELS:
        model, datamodule, engine = objects(name, mvtec_tree, project)
        engine.fit(model=model, datamodule=datamodule)
        made[name] = str(project / name / "MVTecAD" / "01" / "v0" / "weights" / "lightning" / "model.ckpt")
    return made


class TestAPI:
    def test_fit(self, name, checkpoints):
        assert Path(checkpoints[name]).is_file()

    @pytest.mark.parametrize("command", ["test", "train", "validate", "predict"])
    def test_from_checkpoint(self, name, checkpoints, mvtec_tree, project, command):
        model, datamodule, engine = objects(name, mvtec_tree, project)
        result = getattr(engine, command)(model=model, datamodule=datamodule, ckpt_path=checkpoints[name])
        if command == "predict":
            assert sum(len(batch.pred_score) for batch in result) == 6
        elif command != "validate":
            assert 0.0 <= result[0]["image_AUROC"] <= 1.0

    @pytest.mark.parametrize(
        "export_type",
        [ExportType.TORCH, *(pytest.param(kind, marks=SLOW) for kind in ExportType if kind != ExportType.TORCH)],
    )
    def test_export(self, name, checkpoints, mvtec_tree, project, tmp_path, export_type):
        model, _, engine = objects(name, mvtec_tree, project)
        path = engine.export(model, export_type, export_root=tmp_path, ckpt_path=checkpoints[name])
        assert path.stat().st_size > 10_000

    def test_get_model(self, name, mvtec_tree, project):
        anomalydino_plugin.register()
        model = get_model({"class_path": f"anomalydino_plugin.{name}", "init_args": SETTINGS})
        assert type(model).__name__ == name

    def test_tiled_inputs_are_refused(self, name, mvtec_tree, project):
        from anomalib.callbacks import TilerConfigurationCallback

        model, datamodule, _ = objects(name, mvtec_tree, project)
        tiler = TilerConfigurationCallback(enable=True, tile_size=32, stride=32)
        engine = Engine(callbacks=[tiler], logger=False, default_root_dir=project, devices=1, accelerator="cpu")
        with pytest.raises(ValueError, match="does not support tiling"):
            engine.fit(model, datamodule=datamodule)


class TestCLI:
    @staticmethod
    def arguments(name: str, project: Path, tree: Path | None = None) -> list[str]:
        settings = [f"--model.{key}={value}" for key, value in SETTINGS.items()]
        data = ["--data=MVTecAD", f"--data.root={tree}", "--data.category=01", "--data.num_workers=0"] if tree else []
        common = [f"--default_root_dir={project}", "--trainer.accelerator=cpu", "--trainer.devices=1"]
        return [f"--model=anomalydino_plugin.{name}", *settings, *data, *common]

    @pytest.mark.parametrize(
        "command", ["train", *(pytest.param(name, marks=SLOW) for name in ("fit", "test", "validate", "predict"))]
    )
    def test_commands(self, name, checkpoints, mvtec_tree, tmp_path, command):
        load = [] if command == "fit" else [f"--ckpt_path={checkpoints[name]}"]
        cli = AnomalibCLI(args=[command, *self.arguments(name, tmp_path, mvtec_tree), *load])
        assert cli.engine.trainer.state.finished
        if command in {"test", "train"}:
            assert 0.0 <= cli.engine.trainer.callback_metrics["image_AUROC"] <= 1.0

    @pytest.mark.parametrize("data", ["test/spot", "test/spot/000.png"])
    def test_predict_by_path(self, name, checkpoints, mvtec_tree, tmp_path, data):
        arguments = ["predict", f"--data={mvtec_tree / '01' / data}", *self.arguments(name, tmp_path)]
        if name == "AnomalyDINOBatched" and data.endswith("png"):
            with pytest.raises(anomalydino_plugin.InputError, match="at least two"):
                AnomalibCLI(args=[*arguments, f"--ckpt_path={checkpoints[name]}"])
        else:
            cli = AnomalibCLI(args=[*arguments, f"--ckpt_path={checkpoints[name]}"])
            assert cli.engine.trainer.state.finished

    @SLOW
    def test_export(self, name, checkpoints, tmp_path):
        export_type = {"AnomalyDINOFewShot": ExportType.OPENVINO, "AnomalyDINOBatched": ExportType.TORCH}[name]
        arguments = [*self.arguments(name, tmp_path), f"--ckpt_path={checkpoints[name]}", f"--export_root={tmp_path}"]
        AnomalibCLI(args=["export", f"--export_type={export_type.value}", *arguments])
        assert list(tmp_path.rglob("model.*"))

    @SLOW
    def test_config_file_of_the_docs(self, name, mvtec_tree, tmp_path):
        file = {"AnomalyDINOFewShot": "few_shot.yaml", "AnomalyDINOBatched": "batched.yaml"}[name]
        settings = [f"--model.init_args.{key}={value}" for key, value in SETTINGS.items() if key != "masking"]
        data = [f"--data.init_args.root={mvtec_tree}", "--data.init_args.category=01", "--data.init_args.num_workers=0"]
        command = [Path(sys.executable).with_name("anomalib"), "train", f"--config={DOCS / file}", *settings, *data]
        done = subprocess.run(
            [*map(str, command), f"--default_root_dir={tmp_path}", "--trainer.accelerator=cpu"],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "image_AUROC" in done.stdout


@SLOW
def test_benchmark_pipeline(name, mvtec_tree, tmp_path):
    config = yaml.safe_load((DOCS / "benchmark.yaml").read_text())
    benchmark = config["benchmark"]
    benchmark["model"] = {"class_path": f"anomalydino_plugin.{name}", "init_args": SETTINGS}
    benchmark["data"]["init_args"] = {"root": str(mvtec_tree), "category": {"grid": ["01"]}, "num_workers": 0}
    (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "anomalydino_plugin", "benchmark", "--config", "benchmark.yaml"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = tmp_path.rglob("*.csv")
    header, row = results.read_text().splitlines()
    assert "image_AUROC" in header
    assert f"anomalydino_plugin.{name}" in row
