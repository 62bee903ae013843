"""`make bench`: every measurement, one after the other, and one table of all verdicts at the end.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/run_all.py [--official DIR] [--musc DIR] [--out DIR]
        [--only speed_matching scaling ...]

Each script's own output goes to OUT/SCRIPT.md, the table to OUT/verdicts.md and OUT/verdicts.json. What needs a checkout
of a peer, or a GPU, is listed as not measured where there is none. Takes some two and a half hours on two cores, although
three scripts do less here than by themselves: one seed, one share of the references, one category. With `--only` some
scripts run and the other rows of an earlier table in OUT stay, each with the date and commit it was measured at.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from contest import circumstances
from verdicts import Row, read_back

HERE = Path(__file__).parent
SCRIPTS: dict[str, list[str]] = {
    "parity_fewshot": ["--seeds", "0"],
    "parity_batched": [],
    "parity_batched_job": ["--fractions", "0.25"],
    "engine_accuracy": [],
    "export_figures": [],
    "speed_few_shot": ["--official", "{official}"],
    "speed_matching": ["--official", "{official}", "--musc", "{musc}"],
    "stage_breakdown": [],
    "speed_extract": [],
    "scaling": [],
    "faiss_recall": [],
    "cost_estimate": [],
    "ray_overhead": ["--categories", "bottle"],
    "match_memory": [],
    "ten_thousand": [],
    "speed_gpu": [],
}


def words_of(script: str, peers: dict[str, str | None]) -> list[str] | None:
    """Its arguments; ``None`` where a peer that it cannot do without is missing."""
    words = SCRIPTS[script]
    if "{official}" in words and not peers["official"]:
        return None
    if "{musc}" in words and not peers["musc"]:
        words = words[: words.index("--musc")]
    return [word.format(**peers) if word.startswith("{") else word for word in words]


def run(script: str, words: list[str], log: Path) -> list[Row]:
    """Verdicts of one script; one more where it failed without any."""
    print(f"{script} ...", file=sys.stderr, flush=True)
    started = time.monotonic()
    with log.open("w") as file:
        done = subprocess.run([sys.executable, str(HERE / f"{script}.py"), *words], check=False, stdout=file)
    rows = read_back(log.read_text())
    if done.returncode and not any(row.verdict == "MISSED" for row in rows):
        rows.append(Row("ran to its end", str(done.returncode), "exit 0", "MISSED"))
    print(f"{script}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return rows


class Measured(NamedTuple):
    """What a script found, and where and when."""

    circumstances: str
    rows: list[Row]


def earlier(path: Path) -> dict[str, Measured]:
    """What OUT/verdicts.json holds; empty where there is none."""
    if not path.exists():
        return {}
    scripts = json.loads(path.read_text())
    return {
        name: Measured(found["circumstances"], [Row(**row) for row in found["verdicts"]])
        for name, found in scripts.items()
    }


def markdown(found: dict[str, Measured]) -> str:
    """One table; the scripts in the order of SCRIPTS, and below it what each was measured with."""
    settings = list(dict.fromkeys(one.circumstances for one in found.values()))
    lines = ["| script | figure | value | aim | verdict | measured |", "| --- " * 6 + "|"]
    lines += [
        f"| {script} | {' | '.join(row)} | {settings.index(found[script].circumstances) + 1} |"
        for script in SCRIPTS
        if script in found
        for row in found[script].rows
    ]
    return "\n".join([*lines, "", *(f"{number}. {one}" for number, one in enumerate(settings, 1))])


def write(found: dict[str, Measured], out: Path) -> None:
    """Both tables, after every script: what was measured stays when a later one is interrupted."""
    (out / "verdicts.md").write_text(markdown(found) + "\n")
    plain = {
        script: {"circumstances": one.circumstances, "verdicts": [row._asdict() for row in one.rows]}
        for script, one in found.items()
    }
    (out / "verdicts.json").write_text(json.dumps(plain, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", help="checkout of the official code, outside of here")
    parser.add_argument("--musc", help="checkout of MuSc, outside of here")
    parser.add_argument("--out", type=Path, default=Path("bench_output"))
    parser.add_argument("--only", nargs="+", choices=list(SCRIPTS), default=list(SCRIPTS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    peers = {
        name: str(Path(given).resolve()) if (given := getattr(options, name)) else None for name in ("official", "musc")
    }
    found, here = earlier(options.out / "verdicts.json"), circumstances()
    for script in options.only:
        words = words_of(script, peers)
        if words is None:
            rows = [Row("everything", "-", "-", "not measured: needs --official DIR")]
        else:
            rows = run(script, words, options.out / f"{script}.md")
        found[script] = Measured(here, rows)
        write(found, options.out)
    print(markdown(found))
    return int(any(row.verdict == "MISSED" for script in options.only for row in found[script].rows))


if __name__ == "__main__":
    sys.exit(main())
