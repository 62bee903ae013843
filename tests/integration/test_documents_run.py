"""Every block of README.md and docs/*.md, run as it stands, in order, in a folder as the pages describe it. Python that follows
on Python goes on in the same session, as a reader's does.

Each page has a folder of its own that holds photographs (the demo's, CC0): ``photos`` with names as cameras and people
give them, ``good`` and ``more_good`` beside it, ``parts`` in MVTec's layout, ``good.png`` and ``part.png``. The backbone
is DINOv2 S/14, with the real weights where ANOMALYDINO_ASSETS has them, else untrained.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import documents
import pytest
from documents import ELSEWHERE, LANGUAGES, PAGES, Block, name_of

ODD_NAMES = ("IMG_0001.JPG.png", "größe 3 #2.png", "shift 2/it's 50%.png", "shift 2/[draft] (copy).png", "-x=1&y.png")
SCRIPTS = Path(sys.executable).parent
RUN = [page for page in PAGES if name_of(page) not in ELSEWHERE and "benchmarks" not in page.parts]
TIMED_OUT = 900  # seconds, of one block
ATTEMPTS = 8  # to start Ray, which gives up after 30 seconds on a busy machine


def to_run(page: Path) -> list[Block]:
    """Blocks of a page that a test can run."""
    return [block for block in documents.blocks(page) if block.language in LANGUAGES and block.reason is None]


def test_what_is_not_run_is_listed():
    """The list of a run shows what is left out, and why."""
    for page in PAGES:
        for block in documents.blocks(page):
            if block.reason is not None:
                print(f"{block.where}: not run: {block.reason}")
    transcripts = [block.where for page in RUN for block in to_run(page) if block.language == "console"]
    assert transcripts == [], "a transcript cannot be run: say why, or make it a block of sh"


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """The folder that each page gets a copy of."""
    from jobs.demo_data import make_demo_images

    root = tmp_path_factory.mktemp("documents")
    make_demo_images(root / "demo")
    for category, kinds in (("brick", ("good", "hole", "scratch")), ("grass", ("good", "stain"))):
        source, target = root / "demo" / category, root / "reader" / "parts" / category
        shutil.copytree(source / "train", target / "train")
        for kind in kinds:
            for path in sorted((source / "test" / kind).iterdir())[:2]:
                (target / "test" / kind).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / "test" / kind)
                mask = source / "ground_truth" / kind / f"{path.stem}_mask.png"
                if mask.is_file():
                    (target / "ground_truth" / kind).mkdir(parents=True, exist_ok=True)
                    shutil.copy(mask, target / "ground_truth" / kind)
    brick = root / "demo" / "brick"
    for name, path in zip(ODD_NAMES, sorted((brick / "test").glob("*/000.png")), strict=False):
        (root / "reader" / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / "reader" / "photos" / name)
    shutil.copytree(brick / "train" / "good", root / "reader" / "good")
    shutil.copytree(brick / "test" / "good", root / "reader" / "more_good")
    shutil.copy(brick / "train" / "good" / "000.png", root / "reader" / "good.png")
    shutil.copy(brick / "test" / "hole" / "000.png", root / "reader" / "part.png")
    return root / "reader"


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Real ones, or untrained ones of the same shape."""
    folder = os.environ.get("ANOMALYDINO_ASSETS")
    real = Path(folder or "", "weights", "dinov2_vits14.safetensors")
    if folder and real.is_file():
        return real.resolve()
    from safetensors.torch import save_file

    from anomalydino_plugin import load_backbone

    backbone = load_backbone("dinov2_vits14", "random:0")
    target = tmp_path_factory.mktemp("weights") / "dinov2_vits14.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in backbone.vit.state_dict().items()}, target)
    return target


def in_sessions(blocks: list[Block]) -> list[Block]:
    """Neighbouring blocks of Python joined; the others as they are."""
    found: list[Block] = []
    for block in blocks:
        if found and found[-1].language == block.language == "python":
            found[-1] = dataclasses.replace(found[-1], code=f"{found[-1].code}\n{block.code}")
        else:
            found.append(block)
    return found


def command_of(block: Block) -> list[str]:
    """As a reader would run it."""
    if block.language == "sh":
        return ["bash", "-euo", "pipefail", "-c", block.code]
    if block.language == "sql":
        return [sys.executable, "-c", f"import duckdb\nduckdb.sql({block.code!r}).show()"]
    return [sys.executable, "-W", "ignore", "-c", block.code]


@pytest.fixture(scope="module")
def one_ray():
    """Lets commands join the test's Ray, as they join that of a Ray job around them: starting one for each takes longer
    than their work."""
    import ray

    for attempt in range(ATTEMPTS):
        try:
            ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
            break
        except Exception as error:
            ray.shutdown()
            if "timed out during startup" not in str(error) or attempt == ATTEMPTS - 1:
                raise
    address = ray.get_runtime_context().gcs_address
    yield {"RAY_ADDRESS": address, "RAY_JOB_CONFIG_JSON_ENV_VAR": '{"runtime_env": {}}'}
    ray.shutdown()


def run(command: list[str], where: str, folder: Path, weights: Path, more: dict[str, str]) -> None:
    environment = {
        **os.environ,
        **more,
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        "ANOMALYDINO_WEIGHTS": str(weights),
        "COLUMNS": "120",
    }
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        timeout=TIMED_OUT,
    )
    print(f"--- {where}\n{done.stdout}")
    assert done.returncode == 0, f"{where} ended with {done.returncode}:\n{done.stdout[-3000:]}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", [page for page in RUN if to_run(page)], ids=name_of)
def test_blocks_run_in_order(page, photographs, weights, one_ray, tmp_path):
    folder = tmp_path / "reader"
    shutil.copytree(photographs, folder)
    for number, command in enumerate(documents.run_first(page), 1):
        run(
            ["bash", "-euo", "pipefail", "-c", command],
            f"{name_of(page)}, run first {number}",
            folder,
            weights,
            one_ray,
        )
    for block in in_sessions(to_run(page)):
        run(command_of(block), block.where, folder, weights, one_ray)
