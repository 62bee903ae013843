"""Products stay in float32 whatever the host framework allows; its settings are as they were afterwards."""

import subprocess
import sys

import pytest
import torch

from anomalydino_plugin import RunningLowest, nearest
from anomalydino_plugin.full_precision import full_precision

ROWS = torch.nn.functional.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), dim=1)


@pytest.fixture
def medium():
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def test_the_setting_is_full_inside_and_as_before_outside(medium):
    def failing():
        with full_precision("cpu"):
            assert torch.get_float32_matmul_precision() == "highest"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert torch.get_float32_matmul_precision() == "medium"


def test_searches_run_in_it(medium, monkeypatch):
    seen = []
    for module in ("matching", "mutual"):
        monkeypatch.setattr(
            f"anomalydino_plugin.{module}.full_precision",
            lambda device: seen.append(device) or full_precision(device),
        )
    nearest(ROWS[:3], ROWS)
    RunningLowest(ROWS[:3], 2).update(ROWS, [len(ROWS)], 0)
    assert seen == ["cpu", "cpu"]


def test_settings_by_backend_are_as_before_outside():
    program = """
import torch
from anomalydino_plugin.full_precision import full_precision
matmul = getattr(torch.backends.mkldnn, "matmul", None)
if hasattr(matmul, "fp32_precision"):
    matmul.fp32_precision = "bf16"
    with full_precision("cpu"):
        assert matmul.fp32_precision == "ieee"
    assert matmul.fp32_precision == "bf16"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
