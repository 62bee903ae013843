"""`make bench`: every measurement, one after the other, and one table of all verdicts at the end.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/run_all.py [--official DIR] [--musc DIR] [--out DIR]
        [--only speed_matching scaling ...]

Each script's own output goes to OUT/SCRIPT.md, the table to OUT/verdicts.md and OUT/verdicts.json. What needs a checkout
of a peer, or a GPU, is listed as not measured where there is none. Takes about two hours on two cores.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from contest import circumstances
from verdicts import Row, read_back

HERE = Path(__file__).parent
SCRIPTS: dict[str, list[str]] = {
    "parity_fewshot": [],
    "parity_batched": [],
    "parity_batched_job": [],
    "engine_accuracy": [],
    "export_figures": [],
    "speed_few_shot": ["--official", "{official}"],
    "speed_matching": ["--official", "{official}", "--musc", "{musc}"],
    "stage_breakdown": [],
    "speed_extract": [],
    "scaling": [],
    "faiss_recall": [],
    "cost_estimate": [],
    "ray_overhead": [],
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
    found: dict[str, list[Row]] = {}
    for script in options.only:
        words = words_of(script, peers)
        if words is None:
            found[script] = [Row("everything", "-", "-", "not measured: needs --official DIR")]
        else:
            found[script] = run(script, words, options.out / f"{script}.md")
    lines = [circumstances(), "", "| script | figure | value | aim | verdict |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {script} | {' | '.join(row)} |" for script, rows in found.items() for row in rows]
    (options.out / "verdicts.md").write_text("\n".join(lines) + "\n")
    plain = {script: [row._asdict() for row in rows] for script, rows in found.items()}
    (options.out / "verdicts.json").write_text(json.dumps({"circumstances": lines[0], "verdicts": plain}, indent=1))
    print("\n".join(lines))
    return int(any(row.verdict == "MISSED" for rows in found.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
