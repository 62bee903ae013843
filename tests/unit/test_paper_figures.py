import json
from pathlib import Path

import jobs
from jobs.metric_rows import METRICS

CONTENT = json.loads((Path(jobs.__file__).parent / "data" / "paper_figures.json").read_text())


def test_every_figure_is_a_metric_of_ours_in_per_cent_and_stands_once():
    seen = set()
    for row in CONTENT["figures"]:
        key = row["table"], row["dataset"], row["shots"], row["resolution"]
        assert key not in seen
        seen.add(key)
        assert (row["table"], row["dataset"]) in {(2, "mvtec"), (3, "visa"), (4, "mvtec"), (4, "visa")}
        assert row["resolution"] in {448, 672}
        assert (row["shots"] is None) == (row["table"] == 4)
        assert set(row["metrics"]) <= set(METRICS)
        assert all(50 < cell["value"] < 100 for cell in row["metrics"].values())


def test_they_agree_with_the_abstract_and_say_where_they_come_from():
    one_shot = next(r for r in CONTENT["figures"] if (r["dataset"], r["shots"], r["resolution"]) == ("mvtec", 1, 672))
    assert one_shot["metrics"]["auroc"]["value"] == 96.6
    assert "second-hand" in " ".join(CONTENT["provenance"])
    assert CONTENT["missing"]


def test_more_shots_and_more_pixels_do_not_lose():
    """A slip of a column or row in a transcription would show."""
    table = {(r["dataset"], r["shots"], r["resolution"]): r["metrics"] for r in CONTENT["figures"] if r["shots"]}
    for (dataset, shots, resolution), metrics in table.items():
        for name in ("auroc", "pixel_auroc", "pro_30"):
            if (fewer := table.get((dataset, shots // 2, resolution))) is not None:
                assert fewer[name]["value"] <= metrics[name]["value"]
            assert table[dataset, shots, 448][name]["value"] <= table[dataset, shots, 672][name]["value"]
