"""`anomalydino run` through a real local Ray, with a tiny untrained backbone."""

import io

import pytest
import ray
from generated import TINY
from rich.console import Console

from jobs import pipeline

pytestmark = pytest.mark.thorough

STAGES = f"""
defaults: {{out: run, backbone: {TINY}, weights: random:0, resolution: 64, masking: off, threads: 1}}
stages:
  - fit: {{images: images}}
  - score: {{images: images, banks: run, out: scores}}
  - verify: {{out: scores}}
"""


def test_stages_in_turn_on_one_ray_and_again(tmp_path, mvtec_tree, monkeypatch):
    (tmp_path / "images").symlink_to(mvtec_tree)
    file = tmp_path / "stages.yaml"
    file.write_text(STAGES)
    started, stopped, shown = [], [], io.StringIO()
    init, shutdown = ray.init, ray.shutdown
    monkeypatch.setattr(ray, "init", lambda *args, **more: (started.append(1), init(*args, **more))[1])
    monkeypatch.setattr(ray, "shutdown", lambda: stopped.append(1))  # the second run joins the first one's
    options = type("Options", (), {"file": str(file)})
    try:
        assert pipeline.main(options, Console(file=shown)) == 0
        assert (len(started), len(stopped)) == (1, 1)
        assert "stage 2 of 3: score" in shown.getvalue()
        assert "12 images done, 0 failed" in shown.getvalue()
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
        assert len(before) > 2
        assert pipeline.main(options, Console(file=shown)) == 0
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")} == before
    finally:
        shutdown()
