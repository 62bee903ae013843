"""Fuzz one target for a bounded time: ``python tests/fuzz/run.py decoding --seconds 60``. Needs the extra ``fuzz``.

Ends with 0 and a line of figures, or with libFuzzer's status and a file that makes the target fail.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
with atheris.instrument_imports(include=["anomalydino_plugin", "jobs", "PIL", "yaml"]):
    from fuzz.targets import TARGETS, seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=int, default=60)
    options = parser.parse_args()
    count, started = 0, time.monotonic()

    def once(data: bytes) -> None:
        nonlocal count
        count += 1
        if time.monotonic() - started > options.seconds:
            # libFuzzer ends the process itself and says nothing of ours: say it before.
            print(f"{options.target}: {count} inputs in {time.monotonic() - started:.0f} s, nothing found", flush=True)
            import os

            os._exit(0)
        TARGETS[options.target](data)

    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds(options.target)):
            (Path(corpus) / str(number)).write_bytes(seed)
        atheris.Setup(
            [sys.argv[0], corpus, "-rss_limit_mb=4096", "-timeout=20", "-max_len=8192", "-print_final_stats=1"], once
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
