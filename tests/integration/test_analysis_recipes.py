"""The recipes of docs/analysis.md, run as they stand, with Ray and our packages blocked from import.

    python tests/integration/test_analysis_recipes.py FOLDER

runs them in a folder that holds ``run/`` and writes what they print into the page.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from generated import TINY

pytestmark = pytest.mark.thorough

PAGE = Path(__file__).resolve().parents[2] / "docs" / "analysis.md"
BLOCKED = ("ray", "jobs", "anomalydino_plugin")
END = "\x1e"  # printed after each block
SECTIONS = (
    "DuckDB",
    "Polars",
    "pandas and scikit-learn",
    "pyarrow.dataset",
    "Embeddings in torch",
    "An anomaly map",
    "Beside an anomalib datamodule",
    "FiftyOne",
)


def programs(page: str) -> dict[str, str]:
    """The program of each section, on the line numbers of the page, so that a traceback names them."""
    found: dict[str, list[str]] = {}
    lines = page.splitlines()
    section, inside = "", False
    for number, line in enumerate(lines):
        if line.startswith("## ") and not inside:
            section = line.removeprefix("## ")
        elif line == "```python":
            inside = True
        elif line == "```" and inside:
            found[section][number], inside = f"print({END!r}, flush=True)", False
        elif inside:
            found.setdefault(section, [""] * len(lines))[number] = line
    return {section: "\n".join(program) for section, program in found.items()}


def execute(program: str, folder: Path) -> list[str]:
    """Run a section in a folder that holds ``run/``; what each of its blocks printed."""
    blocks = "; ".join(f"sys.modules[{name!r}] = None" for name in BLOCKED)
    script = folder / "recipe.py"  # the page begins with a heading: its first line is free
    script.write_text(f"import sys; {blocks}{program}\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script.name],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "COLUMNS": "120", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [text.strip("\n") for text in done.stdout.split(END)[:-1]]


def filled(page: str, printed: dict[str, list[str]]) -> str:
    """The page with what its blocks printed below them, in place of what stood there."""
    waiting = [text for section in SECTIONS for text in printed[section]]

    def shown(match: re.Match[str]) -> str:
        text = "\n".join(line.rstrip() for line in waiting.pop(0).splitlines())
        return match[1] + (f"\n```text\n{text}\n```\n" if text else "")

    return re.sub(r"(^```python\n.*?^```\n)(?:\n```text\n.*?^```\n)?", shown, page, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def sample_tree(mvtec_tree, tmp_path_factory) -> Path:
    """The generated tree and an image that is cut short."""
    root = tmp_path_factory.mktemp("sample") / "tree"
    shutil.copytree(mvtec_tree, root)
    good = root / "01" / "test" / "good"
    (good / "cut.png").write_bytes((good / "000.png").read_bytes()[:2000])
    return root


@pytest.fixture(scope="module")
def folder(sample_tree, tmp_path_factory) -> Path:
    """A folder that holds ``run/``, made by the command itself."""
    from jobs.cli import main

    where = tmp_path_factory.mktemp("analyst")
    settings = {"images": sample_tree, "out": where / "run", "backbone": TINY, "weights": "random:0", "resolution": 64}
    settings |= {"masking": "off", "shots": 2, "write-embeddings": "true", "threads": 1, "num-workers": 1}
    assert main(["score", *(f"--{name}={value}" for name, value in settings.items())]) == 0
    return where


@pytest.fixture(scope="module")
def recipe(folder):
    """Run a section by its title, once."""
    texts: dict[str, list[str]] = {}

    def run(section: str) -> list[str]:
        if section not in texts:
            texts[section] = execute(programs(PAGE.read_text(encoding="utf-8"))[section], folder)
        return texts[section]

    return run


def rows(folder: Path, kind: str) -> list[dict]:
    return pa.concat_tables(
        [pq.read_table(path) for path in sorted((folder / "run" / kind).rglob("*.parquet"))]
    ).to_pylist()


def test_every_section_is_tested():
    assert tuple(programs(PAGE.read_text(encoding="utf-8"))) == SECTIONS


def test_ours_is_blocked(tmp_path):
    for name in BLOCKED:
        with pytest.raises(AssertionError, match=f"import of {name} halted"):
            execute(f"\nimport {name}", tmp_path)


def test_duckdb(recipe, folder):
    _, worst, sweep, best, near, lots, matched, failures = recipe("DuckDB")
    highest = {row["category"]: row for row in sorted(rows(folder, "scores"), key=lambda row: row["score"])}
    for category, row in highest.items():
        name = "/".join(Path(row["uri"]).parts[-2:])
        assert re.search(rf"{category} +│ {name} │ +{row['score']:.3f}", worst), worst
    assert len(re.findall(r"│ (?:good|spot)/", worst)) == 6
    assert sweep.count("plate top") == 6
    assert best.count("fewest errors") == 2
    assert best.count("no miss") >= 1
    assert len(re.findall(r"│ (?:good|spot)/00\d.png │", near)) == 6, near  # the patch itself, and five like it
    assert re.search(r"01 +│ 00\d +│", lots), lots
    assert (folder / "lots.csv").read_text().startswith("category,file,lot\n01,")
    assert len(re.findall(r"00[01].png +│ +\d │ +\d │ +\d+\.0 │", matched)) == 10, matched
    assert re.search(r"01 +│ decode +│ ImageError │ +1 │ cut.png", failures), failures
    assert re.search(r"01 +│ failed +│ +1 │", failures), failures


def test_sweep_counts_like_a_loop(recipe, folder):
    """The table of factors, counted again."""
    table = re.findall(r"│ (\S.*?) +│ +(\d\.\d) │ +[\d.]+ │ +(\d+) │ +(\d+) │", recipe("DuckDB")[2])
    assert len(table) == 12
    scores = rows(folder, "scores")
    for category, factor, false_alarms, misses in table:
        own = [
            (row["score"] > float(factor) * row["threshold"], "/spot/" in row["uri"])
            for row in scores
            if row["category"] == category
        ]
        assert int(false_alarms) == sum(alarm and not defect for alarm, defect in own)
        assert int(misses) == sum(defect and not alarm for alarm, defect in own)


def test_polars(recipe):
    (printed,) = recipe("Polars")
    assert re.search(r"01 +┆ spot +┆ 3 ", printed), printed
    assert "median share above" in printed


def test_pandas_agrees_with_evaluate(recipe, folder):
    from jobs.evaluate import evaluate

    (printed,) = recipe("pandas and scikit-learn")
    ours = {row.category: row for row in evaluate(str(folder / "run"))}
    found = re.findall(r"^(01|plate top) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
    assert len(found) == 2
    for category, images, auroc, precision, false_alarms, misses in found:
        row = ours[category]
        assert float(images) == row.labelled == 6
        assert float(auroc) == pytest.approx(100 * row.auroc, abs=0.01)
        assert float(precision) == pytest.approx(100 * row.average_precision, abs=0.01)
        assert (float(false_alarms), float(misses)) == (3 * row.false_alarms, 3 * row.misses)


def test_pyarrow_dataset(recipe):
    (printed,) = recipe("pyarrow.dataset")
    assert "16 patches of one image" in printed
    assert "row groups: 1 of the image, 1 of its category, 2 in all" in printed


def test_torch(recipe):
    (printed,) = recipe("Embeddings in torch")
    assert "01 (4, 4) (6, 16, 64) torch.float32" in printed
    assert "plate top (4, 4) (6, 16, 64) torch.float32" in printed


def test_maps_are_ours(recipe, folder):
    from anomalydino_plugin import FewShotModel, load_backbone

    (printed,) = recipe("An anomaly map")
    images = {row["image_id"]: row for row in rows(folder, "images")}
    maps = sorted((folder / "maps").iterdir())
    assert len(maps) == printed.count("the marked defect") == 2
    for path in maps:
        image = images[path.stem]
        assert image["label"] == "spot"
        others = (row for row in images.values() if row["category"] == image["category"])
        references = sorted(row["uri"] for row in others if row["status"] == "reference")
        model = FewShotModel(load_backbone(TINY, "random:0"), resolution=64, masking="off").fit(references)
        np.testing.assert_allclose(np.load(path), model.anomaly_map(model.score(image["uri"])), atol=1e-5)


def test_map_of_a_cropped_image_is_ours(recipe, folder, sample_tree, tmp_path, monkeypatch):
    """No image of the run is cropped, so the recipe's function gets one that is."""
    from generated import save, textured

    from anomalydino_plugin import FewShotModel, load_backbone

    recipe("An anomaly map")
    save(tmp_path / "wide.png", textured(7, (90, 131)))
    model = FewShotModel(load_backbone(TINY, "random:0"), resolution=64, masking="off")
    model.fit([sample_tree / "01" / "train" / "good" / "000.png"])
    result = model.score(tmp_path / "wide.png")
    (h, w), (height, width) = result.geometry.grid, result.geometry.image_size
    assert min(result.geometry.coverage) < 1
    r, c = (index.reshape(-1).astype(np.int16) for index in np.indices((h, w)))
    columns = {"image_id": ["wide"] * h * w, "category": ["01"] * h * w, "patch_row": r, "patch_col": c}
    (tmp_path / "run" / "patch_scores").mkdir(parents=True)
    table = pa.table({**columns, "distance": result.distances.reshape(-1)})
    pq.write_table(table, tmp_path / "run" / "patch_scores" / "wide.parquet")
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(programs(PAGE.read_text(encoding="utf-8"))["An anomaly map"], names)  # noqa: S102
    monkeypatch.chdir(tmp_path)
    image = {"image_id": "wide", "category": "01", "grid_rows": h, "grid_cols": w, "height": height, "width": width}
    np.testing.assert_allclose(names["anomaly_map"](image), model.anomaly_map(result), atol=1e-5)


def test_anomalib(recipe):
    (printed,) = recipe("Beside an anomalib datamodule")
    assert "01: 7 samples, 6 with a score, AUROC" in printed
    assert "plate top: 6 samples, 6 with a score, AUROC" in printed


def test_fiftyone(recipe, folder):
    (printed,) = recipe("FiftyOne")
    assert printed.startswith("12 samples")
    samples = json.loads((folder / "fiftyone" / "samples.json").read_text())["samples"]
    scores = {row["image_id"]: row for row in rows(folder, "scores")}
    for sample in samples:
        score = scores.pop(sample["image_id"])
        assert Path(sample["filepath"]).is_file()
        assert sample["tags"] == ["test", score["category"]]
        assert sample["ground_truth"] == {"_cls": "Classification", "label": Path(score["uri"]).parent.name}
        assert sample["prediction"]["label"] == ("anomalous" if score["is_anomalous"] else "good")
        assert 0.5 <= sample["prediction"]["confidence"] < 1
        assert sample["anomaly_map"]["range"] == [0, 255]
        assert Path(sample["anomaly_map"]["map_path"]).is_file()
    assert not scores


def test_without_thresholds_in_float16_and_without_failures(folder, tmp_path):
    """What batched zero-shot leaves, and the narrow embeddings: the same recipes, in one process."""
    from jobs import schema
    from jobs.parquet import write_tables

    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "failures")
    for path in (tmp_path / "run" / "scores").rglob("*.parquet"):
        table = pq.read_table(path)
        for name in ("threshold", "is_anomalous", "normalised_score"):
            place = table.schema.get_field_index(name)
            table = table.set_column(
                place, table.schema.field(name), pa.nulls(len(table), table.schema.field(name).type)
            )
        write_tables(path, [table])
    for path in (tmp_path / "run" / "embeddings").rglob("*.parquet"):
        write_tables(path, [pq.read_table(path).cast(schema.embeddings(64, "float16"))])
    found = programs(PAGE.read_text(encoding="utf-8"))
    chosen = [found[section].split("\n") for section in SECTIONS if "anomalib" not in section]
    printed = execute("\n".join("".join(lines) for lines in zip(*chosen, strict=True)), tmp_path)
    assert "(6, 16, 64) torch.float32" in "\n".join(printed)
    assert printed[-1] == "12 samples; null"


def test_forms_for_a_bucket(folder, monkeypatch):
    """What the page says of pyarrow and Polars, evaluated against an S3-compatible server."""
    import boto3
    import polars as pl
    import pyarrow.dataset as ds
    from moto.server import ThreadedMotoServer

    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_ALLOW_HTTP": "true"}
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {**keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_REGION": "eu-central-1"}.items():
            monkeypatch.setenv(name, value)
        client = boto3.client("s3", region_name="eu-central-1")
        client.create_bucket(Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
        for path in (folder / "run" / "scores").rglob("*.parquet"):
            client.upload_file(str(path), "bucket", path.relative_to(folder).as_posix())
        forms = re.findall(r"\| `((?:ds|pl)\..+?\))` \|", PAGE.read_text(encoding="utf-8"))
        assert len(forms) == 2
        read, scanned = (eval(form, {"ds": ds, "pl": pl}) for form in forms)  # noqa: S307
        assert read.count_rows() == len(scanned.collect()) == 12
    finally:
        server.stop()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_output_shown_is_that_of_the_real_run(assets, weights_file, tmp_path):
    """The command of the page, and the same numbers to a part in a thousand."""
    from jobs.cli import main

    shutil.copytree(assets / "data" / "mvtec", tmp_path / "mvtec")
    good = tmp_path / "mvtec" / "bottle" / "test" / "good"
    good.chmod(0o755)
    (good / "cut.png").write_bytes((good / "000.png").read_bytes()[:20_000])
    flags = [f"--images={tmp_path / 'mvtec'}", f"--out={tmp_path / 'run'}", f"--weights={weights_file}"]
    assert main(["score", *flags, "--write-embeddings"]) == 0
    page = PAGE.read_text(encoding="utf-8")
    again = filled(page, {section: execute(program, tmp_path) for section, program in programs(page).items()})
    words, numbers = zip(words_and_numbers(again), words_and_numbers(page), strict=True)
    assert words[0] == words[1]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3)


def words_and_numbers(page: str) -> tuple[list[str], list[float]]:
    """Frames of tables left out: their width follows the digits."""
    number = re.compile(r"\d+\.\d+(?:e-\d+)?")
    return re.sub("[─-╿]+", " ", number.sub("#", page)).split(), [float(text) for text in number.findall(page)]


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    printed = {section: execute(program, Path(sys.argv[1])) for section, program in programs(text).items()}
    PAGE.write_text(filled(text, printed), encoding="utf-8")
