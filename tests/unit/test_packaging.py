import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_top_level_names_are_exactly_two(wheel):
    names = {name.split("/", 1)[0] for name in wheel.namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"anomalydino_plugin", "jobs"}


def test_every_module_is_in_the_wheel(wheel):
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in ("anomalydino_plugin", "jobs")
        for path in (ROOT / package).rglob("*.py")
    }
    assert sources <= set(wheel.namelist())
    assert {"anomalydino_plugin/py.typed", "jobs/py.typed"} <= set(wheel.namelist())


def test_templates_are_in_the_wheel(wheel):
    folder = ROOT / "jobs" / "report" / "templates"
    templates = {path.relative_to(ROOT).as_posix() for path in folder.iterdir()}
    assert len(templates) == 7
    assert templates <= set(wheel.namelist())


def test_console_script(wheel):
    entry = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "anomalydino = jobs.cli:main" in wheel.read(entry).decode()
