"""What was read and drawn -> one HTML file: autoescaped, with a policy under which only our own script runs.

The file is written piece by piece; pictures of one image at a time are in memory.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from jobs.evaluate import image_metrics
from jobs.gallery import heat_scale
from jobs.metric_rows import mean_over_categories
from jobs.report import charts
from jobs.report.curves import curves, histogram
from jobs.run_records import FALSE_ALARM, MISSED, Row, Run, judgement, short_name

_SCRIPTS = ("state.js", "cards.js", "page.js")
_STYLES = ("page.css", "cards.css")
_HEAT_STOPS = 12
_MOST_FAILURES = 1000  # rows of the table; the number of all of them stands above it
_SUBTITLE = ("backbone", "resolution")
_HIDDEN_SETTINGS = frozenset({"out", "ray_address"})


def render(run: Run, title: str, rows: Sequence[Row], pictures: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[str]:
    """Pieces of the page.

    Args:
        run: what it is about.
        title: of the run.
        rows: images that have a card, in the order of their numbers.
        pictures: number and pictures of each, in any order.
    """
    script, style = _source(_SCRIPTS), _source(_STYLES)
    environment = Environment(
        loader=PackageLoader("jobs.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, short=lambda value: "-" if value is None else f"{value:.4g}")
    categories = [_category(name, own) for name, own in run.scores.items()]
    metrics = [category["metrics"] for category in categories]
    return environment.get_template(
        "page.html.j2"
    ).generate(
        title=title,
        subtitle=_subtitle(run),
        policy=_policy(script, style),
        script=Markup(script),  # noqa: S704 - our own file
        style=Markup(style),  # noqa: S704 - our own file
        totals=_totals(run),
        categories=categories,
        means=mean_over_categories(metrics) if len(metrics) > 1 else None,
        chart=charts,
        heat=_heat_stops(),
        cards=_cards(rows, run.failures),
        scales={category: heat_scale(own) for category, own in run.scores.items()},
        shown=len(rows),
        failures=[{**row, "name": short_name(row["uri"])} for row in run.failures[:_MOST_FAILURES]],
        failed=len(run.failures),
        stages=[_stage(name, job) for name, job in run.stages.items()],
        pictures=pictures,
    )


def _source(names: Sequence[str]) -> str:
    folder = files("jobs.report") / "templates"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def _policy(script: str, style: str) -> str:
    """Nothing is loaded, and no script or style but ours has any effect, should a name ever slip through."""
    ours = [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in (script, style)]
    return f"default-src 'none'; img-src data:; script-src {ours[0]}; style-src {ours[1]}; base-uri 'none'"


def _subtitle(run: Run) -> list[str]:
    """What matters most of how it was made."""
    settings = [job.get("config", {}) for job in run.stages.values()]
    given = {name: next((found[name] for found in settings if found.get(name)), None) for name in _SUBTITLE}
    modes = sorted({row["mode"] for rows in run.scores.values() for row in rows[:1]})
    parts = [mode if mode == "few-shot" else f"batched zero-shot ({mode})" for mode in modes]
    parts += [str(given["backbone"])] if given["backbone"] else []
    parts += [f"{given['resolution']} pixels"] if given["resolution"] else []
    banks = {bank["category"]: bank for job in run.stages.values() for bank in job.get("banks", [])}
    shots = sorted({len(bank["references"]) for bank in banks.values()})
    counts = [str(shots[0])] if len(shots) == 1 else [f"{shots[0]} to {shots[-1]}"] if shots else []
    return parts + [f"{count} reference image{'' if count == '1' else 's'} a category" for count in counts]


def _totals(run: Run) -> dict[str, int]:
    rows = [row for own in run.scores.values() for row in own]
    judged = [judgement(row) for row in rows]
    return {
        "images": len(rows),
        "judged": sum(row["is_anomalous"] is not None for row in rows),
        "anomalous": sum(bool(row["is_anomalous"]) for row in rows),
        "compared": sum(found is not None for found in judged),
        MISSED: judged.count(MISSED),
        FALSE_ALARM: judged.count(FALSE_ALARM),
    }


def _category(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    scores = np.array([row["score"] for row in rows], dtype=np.float64)
    labels, threshold = [row["label"] for row in rows], rows[0]["threshold"]
    found = curves(scores, labels, threshold)
    roc, precision = (None, None) if found is None else map(charts.curve_chart, found)
    return {
        "name": name,
        "metrics": image_metrics(name, scores, labels, threshold),
        "threshold": threshold,
        "masked": any(row["masked"] for row in rows),
        "mode": rows[0]["mode"],
        "histogram": charts.histogram_chart(histogram(scores, labels, threshold), threshold),
        "roc": roc,
        "precision": precision,
    }


def _heat_stops() -> list[str]:
    levels = np.linspace(0, 255, _HEAT_STOPS).round().astype(np.uint8)[None]
    colours = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)[0]
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in colours.tolist()]


def _cards(rows: Sequence[Row], failures: Sequence[Row]) -> list[dict[str, Any]]:
    scored = [
        {
            "id": row["image_id"],
            "category": row["category"],
            "label": row["label"],
            "name": short_name(row["uri"]),
            "uri": row["uri"],
            "score": _finite(row["score"]),
            "threshold": _finite(row["threshold"]),
            "anomalous": row["is_anomalous"],
            "judgement": judgement(row),
            "foreground": _finite(row["foreground_share"]) if row["masked"] else None,
        }
        for row in rows
    ]
    failed = [
        {
            "id": row["image_id"],
            "category": row["category"],
            "label": row["label"],
            "name": short_name(row["uri"]),
            "uri": row["uri"],
            "score": None,
            "failure": {"stage": row["stage"], "type": row["error_type"], "message": row["message"]},
        }
        for row in failures[:_MOST_FAILURES]
    ]
    return scored + failed


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _stage(name: str, job: Mapping[str, Any]) -> dict[str, Any]:
    settings = {
        key: value for key, value in job.get("config", {}).items() if value is not None and key not in _HIDDEN_SETTINGS
    }
    return {
        "name": name,
        "settings": settings,
        "versions": {key: value for key, value in job.get("versions", {}).items() if value},
        "weights": job.get("weights_sha256"),
        "seconds": job.get("seconds", {}).get("total"),
    }
