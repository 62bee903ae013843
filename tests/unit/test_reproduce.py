"""Settings, protocol, paper figures and tables of ``anomalydino reproduce``: no Ray, no backbone."""

import json

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console

from anomalydino_plugin import ConfigError, MemoryBank
from jobs.cli import _build, _parser, _spelled_out
from jobs.metric_rows import CategoryMetrics
from jobs.reproduce.features import upright
from jobs.reproduce.paper import PaperFigure, figures_of
from jobs.reproduce.protocol import Setting, settings_of
from jobs.reproduce.results import ResultRow, Results
from jobs.reproduce.settings import ReproduceConfig
from jobs.reproduce.tables import beside_paper, notes, sheets_of

BASE = {"dataset": "mvtec", "root": "data", "out": "out"}


def parsed(*words: str) -> ReproduceConfig:
    options = _parser().parse_args(_spelled_out(["reproduce", *words])).reproduce
    return _build(ReproduceConfig, options)


def row(category: str, auroc: float | None, seed: int | None = 0, **setting) -> ResultRow:
    settings = Setting(**({"shots": 1, "seed": seed, "resolution": 448, "preprocess": "agnostic"} | setting))
    return ResultRow(
        "mvtec", settings, True, False, "a|b", "runs/x", True, CategoryMetrics(category, 4, 0, 4, 2, auroc)
    )


# Settings


def test_flags_take_several_words(tmp_path):
    words = ["--dataset", "mvtec", "--root", "data", "--out", "out", "--shots", "1", "2", "--resolution", "448"]
    words += ["--preprocess", "informed", "agnostic", "--masking", "off", "auto", "--batched", "--no-few-shot"]
    config = parsed(*words, "--category", "01", "--threads", "1")
    assert (config.shots, config.resolution, config.seeds) == ((1, 2), (448,), 3)
    assert (config.preprocess, config.masking) == (("informed", "agnostic"), ("off", "auto"))
    assert (config.batched, config.few_shot, config.category, config.threads) == (True, False, ("01",), 1)
    file = tmp_path / "reproduce.yaml"
    file.write_text(yaml.safe_dump({**BASE, "shots": [1, 2], "k": [3], "category": ["01"]}))
    assert parsed("--config", str(file)) == ReproduceConfig(**BASE, shots=(1, 2), k=(3,), category=("01",))


def test_a_value_that_stands_twice_is_measured_once_and_a_bare_one_is_taken():
    config = ReproduceConfig(**BASE, shots=(1, 1, 2), k=3, masking=False)
    assert (config.shots, config.k, config.masking) == ((1, 2), (3,), ("off",))
    assert json.loads(json.dumps(config.effective()))["shots"] == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shots": (0,)}, "--shots=0: expected at least 1"),
        ({"seeds": 0}, "--seeds=0: expected"),
        ({"resolution": ()}, "--resolution is empty: expected"),
        ({"out": " "}, "--out is empty: expected"),
        ({"backbone": ("a", "b"), "weights": "w.pth"}, "one file fits one backbone"),
        ({"few_shot": False}, "nothing to measure: expected"),
        ({"root": "s3://key:secret@bucket/x"}, "credentials"),
    ],
)
def test_settings_that_cannot_be_measured(change, message):
    with pytest.raises(ConfigError, match=message):
        ReproduceConfig(**{**BASE, **change})


# Protocol


def test_every_combination_is_one_setting_and_batched_has_no_seed():
    config = ReproduceConfig(**BASE, shots=(1, 4), k=(1, 3), preprocess=("agnostic", "informed"), batched=True)
    found = settings_of(config)
    assert len(found) == len(set(found)) == 2 * (2 * 3 * 2 * 2 + 1)
    assert [one.seed for one in found if one.shots is None] == [None, None]
    assert len({one.name for one in found}) == len(found)


def test_informed_rotates_what_the_official_code_rotates():
    informed = Setting(1, 0, 448, "informed")
    assert [informed.rotates("mvtec", name) for name in ("screw", "hazelnut", "bottle")] == [True, True, False]
    assert not informed.rotates("visa", "screw")
    assert informed._replace(rotations="on").rotates("mvtec", "bottle")
    assert not Setting(1, 0, 448, "agnostic", rotations="off").rotates("mvtec", "screw")


def test_masks_follow_the_setting_or_the_official_list():
    setting = Setting(1, 0, 448, "agnostic")
    assert setting.masks("mvtec", "screw") == "auto"
    official = setting._replace(masking="official")
    assert [official.masks(*names) for names in (("mvtec", "screw"), ("mvtec", "bottle"), ("visa", "candle"))] == [
        *("on", "off", "on")
    ]


def test_settings_that_mean_the_same_share_a_run():
    agnostic, informed = (Setting(1, 0, 448, preprocess) for preprocess in ("agnostic", "informed"))
    assert agnostic.run_name("mvtec", "screw") == informed.run_name("mvtec", "screw")
    assert agnostic.run_name("mvtec", "bottle") != informed.run_name("mvtec", "bottle")
    off = agnostic._replace(masking="off")
    assert off.run_name("mvtec", "bottle") == agnostic._replace(masking="official").run_name("mvtec", "bottle")


# The paper


def test_paper_figures_are_found_for_the_papers_settings_alone():
    setting = Setting(1, None, 448, "agnostic")
    assert figures_of("mvtec", setting)["auroc"] == PaperFigure(96.5, 0.4)
    assert figures_of("visa", setting._replace(shots=4))["pro_30"].value == 92.5
    assert figures_of("mvtec", Setting(None, None, 672, "none"))["auroc"] == PaperFigure(94.2, None)
    for other in (
        {"shots": 3},
        {"preprocess": "informed"},
        {"k": 3},
        {"rotations": "off"},
        {"statistic": "max"},
        {"backbone": "dinov2_vitb14"},
        {"method": "padim"},
        {"resolution": 300},
    ):
        assert figures_of("mvtec", setting._replace(**other)) == {}
    assert figures_of("folder", setting) == {}


# Tables


def test_ours_beside_the_paper_is_the_mean_over_categories_and_the_deviation_over_seeds():
    rows = [row("a", 0.9), row("b", 1.0), row("a", 0.8, seed=1), row("b", 0.9, seed=1)]
    sheet = beside_paper(rows, ("auroc", "f1_max"), "t")
    assert sheet.rows == (
        ("1 shot, 448, agnostic", "2", "2", "90.00 ±7.07", "96.5 ±0.4", "-6.50", "-", "96.0 ±0.2", "-"),
    )
    assert "| 1 shot, 448, agnostic | 2 | 2 | 90.00 ±7.07 | 96.5 ±0.4 | -6.50 |" in sheet.markdown()


def test_a_metric_that_some_seeds_lack_says_so():
    rows = [row("a", 0.9), row("a", None, seed=1)]
    assert beside_paper(rows, ("auroc",), "t").rows[0][3] == "90.00 (1 of 2)"
    assert sheets_of(rows)[-1].rows[0][4] == "90.00 (1 of 2)"


def test_a_category_without_labels_has_no_figure_and_names_stay_text():
    sheets = sheets_of([row("[red]x|y", None)])
    assert [sheet.title for sheet in sheets] == ["by category, per cent"]
    assert sheets[0].rows[0][:5] == ("[red]x|y", "1 shot, 448, agnostic", "1", "no", "-")
    assert "| [red]x/y |" in sheets[0].markdown()
    console = Console(record=True, width=150)
    console.print(sheets[0].rich())
    assert "[red]x|y" in console.export_text()
    assert sheets_of([]) == [sheets[0]._replace(rows=())]


def test_the_reader_is_told_what_the_means_are_over():
    lines = " ".join(notes([row("bottle", 0.9), row("screw", 0.9)]))
    assert "2 categories present (bottle, screw)" in lines
    assert "all 15 categories" in lines
    assert len(notes([row("x", 0.9)._replace(dataset="folder")])) == 1
    assert notes([]) == []


def test_labels_name_what_differs_from_the_defaults():
    assert Setting(None, None, 448, "none").label == "batched, 448"
    changed = Setting(1, 0, 448, "agnostic", "off", "on", "max", 3, "dinov2_vitb14", "padim")
    assert changed.label == "padim, 1 shot, 448, agnostic, rotations off, masking on, max, k 3, dinov2_vitb14"


# Rows


def test_rows_come_back_as_they_were_and_join_into_parquet_and_json(tmp_path):
    results, written = Results(str(tmp_path)), [row("01", 0.5), row("a b", None, shots=None, seed=None)]
    for one in written:
        results.put(one)
    assert sorted(map(repr, results.join())) == sorted(map(repr, written))
    assert results.has(written[0].setting, "01", pixel=True)
    assert not results.has(written[0].setting, "a b", pixel=True)
    table = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert [(one["category"], one["shots"], one["auroc"]) for one in table] == [("01", 1, 0.5), ("a b", None, None)]
    assert json.loads((tmp_path / "results.json").read_text())["rows"][0]["references"] == "a|b"


def test_a_row_without_pixels_is_measured_again_where_they_are_wanted(tmp_path):
    results, one = Results(str(tmp_path)), row("01", 0.5)._replace(pixel=False)
    results.put(one)
    assert results.has(one.setting, "01", pixel=False)
    assert not results.has(one.setting, "01", pixel=True)


# Features


def test_the_upright_rows_of_a_bank_are_those_of_angle_zero():
    sources = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 1], [1, 1, 0, 1]], dtype=torch.int32)
    rows = torch.nn.functional.normalize(torch.rand(4, 3), dim=1)
    bank = MemoryBank(
        rows,
        sources,
        torch.ones(4, dtype=torch.bool),
        ("a", "b"),
        (90.0, 0.0),
        ((9, 9),) * 2,
        {"rotations": "[90.0, 0.0]"},
    )
    found = upright(bank)
    assert torch.equal(found.rows, rows[[1, 3]])
    assert found.sources.tolist() == [[0, 0, 0, 0], [1, 0, 0, 1]]
    assert (found.angles, found.fingerprint) == ((0.0,), {"rotations": "[0.0]"})
    assert upright(found) is found


# Baselines


def test_a_baseline_that_is_not_at_hand_says_what_is_missing(monkeypatch, tmp_path):
    from jobs.reproduce import baselines

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    config = ReproduceConfig(**BASE, baselines=("padim",), baseline_weights=str(tmp_path))
    with pytest.raises(ConfigError, match=r"resnet18.safetensors .* --baseline_weights, .*timm/resnet18"):
        baselines.find_weights("padim", config)
    (tmp_path / "resnet18.pth").touch()
    assert baselines.find_weights("padim", config) == str(tmp_path / "resnet18.pth")
    monkeypatch.setitem(baselines.KNOWN, "winclip", baselines.KNOWN["winclip"]._replace(module="no_such_module"))
    with pytest.raises(ConfigError, match="module 'no_such_module' is not installed"):
        baselines.find_weights("winclip", config)
