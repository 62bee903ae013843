"""`anomalydino verify` on what real runs leave: nothing wrong, until something is."""

import shutil

import numpy as np
import pytest
from generated import TINY, save, textured
from rich.console import Console

from jobs.cli import main
from jobs.config import BatchedConfig, ExtractConfig, FitConfig, MatchConfig, ScoreConfig
from jobs.verify import verify

pytestmark = pytest.mark.thorough

SETTINGS = {"backbone": TINY, "weights": "random:0", "resolution": 64, "threads": 1, "max_failures": 0.6}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Two categories of images of two shapes, one of them poisoned."""
    root = tmp_path_factory.mktemp("tree")
    for number, category in enumerate(["01", "plate top"]):
        for index in range(2):
            save(root / category / "train" / "good" / f"{index}.png", textured(100 * number + index))
            save(root / category / "test" / "good" / f"{index}.png", textured(100 * number + 10 + index))
        save(root / category / "test" / "spot" / "wide.png", textured(100 * number + 20, (96, 140), spot=True))
    save(root / "01" / "test" / "spot" / "small.png", np.zeros((1, 3, 3), np.uint8))
    return root


@pytest.fixture(scope="module")
def runs(ray_session, tree, tmp_path_factory):
    """Every way to fill an output folder."""
    from jobs import batched, extract, fit, match, score

    base, quiet = tmp_path_factory.mktemp("runs"), Console(quiet=True)
    place = {name: str(base / name) for name in ("score", "batched", "extract", "match", "fit", "stored")}
    images = {"images": str(tree), **SETTINGS}
    without_failures = {name: value for name, value in images.items() if name != "max_failures"}
    score.run(ScoreConfig(out=place["score"], masking="on", shard_size=2, write_embeddings=True, **images), quiet)
    batched.run(BatchedConfig(out=place["batched"], masking="on", embedding_dtype="float16", **images), quiet)
    extract.run(ExtractConfig(out=place["extract"], masking="off", shard_size=2, **images), quiet)
    matching = {"embeddings": place["extract"], "out": place["match"], "threads": 1, "masking": "off"}
    match.run(MatchConfig(category="plate top", mode="musc", **matching), quiet)
    fit.run(FitConfig(out=place["fit"], masking="off", **without_failures), quiet)
    score.run(ScoreConfig(out=place["stored"], embeddings=place["extract"], banks=place["fit"], **SETTINGS), quiet)
    return base


@pytest.mark.parametrize(
    ("name", "images"),
    [("score", 7), ("batched", 7), ("extract", 7), ("match", 3), ("fit", 2), ("stored", 6)],
)
def test_nothing_wrong(runs, name, images):
    report = verify(str(runs / name))
    assert report.problems == report.notes == []
    assert report.images == images


def test_the_command(runs, tmp_path, capsys):
    out = shutil.copytree(runs / "batched", tmp_path / "out")
    assert main(["verify", f"file://{out}"]) == 0
    assert "7 images: nothing wrong" in capsys.readouterr().out
    path = next(out.glob("embeddings/01/*.parquet"))
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["verify", str(out)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:-1] if line.startswith("embeddings")] == [
        path.relative_to(out).as_posix()
    ]


def test_an_interrupted_run_is_unfinished_until_it_is_repeated(runs, tree, ray_session, tmp_path, monkeypatch):
    from jobs import score
    from jobs.stage import StageRun

    config = ScoreConfig(images=str(tree), out=str(tmp_path / "out"), masking="off", **SETTINGS)

    def killed(run, *args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StageRun, "follow", killed)  # after the banks
        with pytest.raises(KeyboardInterrupt):
            score.run(config, Console(quiet=True))
    (problem,) = verify(config.out).problems
    assert "stage 'score' is not finished (0 shards are)" in str(problem)
    score.run(config, Console(quiet=True))
    assert verify(config.out).problems == []
