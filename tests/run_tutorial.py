"""Run the commands of a tutorial one after the other, as a reader would, and print what each printed.

    python3 tests/run_tutorial.py docs/anomalib.md [--check]

Works in the root of the clone that holds this file. Blocks marked ``sh`` and ``python`` are run, the latter by
`.venv/bin/python` once it is there; blocks marked ``text`` are output as pasted. ``--check`` compares: the lines of a
``text`` block must be those printed by the command above it, ``[...]`` standing for any number of lines. Exits with 1
if a command or a comparison failed. Needs nothing but Python's own library: the
first block makes the virtual environment.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"^```(sh|python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_ANY = "[...]"


def command_of(kind: str, code: str) -> list[str]:
    if kind == "sh":
        return ["bash", "-euo", "pipefail", "-c", code]
    own = ROOT / ".venv" / "bin" / "python"
    return [str(own) if own.exists() else sys.executable, "-W", "ignore", "-c", code]


def run(kind: str, code: str) -> tuple[int, str]:
    """Exit status and what a terminal of 100 columns would show in the end."""
    done = subprocess.run(
        command_of(kind, code),
        check=False,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100", "PYTHONWARNINGS": "ignore"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    text = _ESCAPE.sub("", done.stdout.decode(errors="replace"))
    lines = (line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in text.split("\n"))  # progress bars rewrite
    return done.returncode, "\n".join(lines).strip("\n")


def agrees(pasted: str, printed: str) -> bool:
    """Whether the pasted lines are the printed ones, with gaps where they say so."""
    parts = [line.rstrip() for line in pasted.strip("\n").split("\n")]
    pattern = "".join(r"(?:.*\n)*?" if part.strip() == _ANY else re.escape(part) + r"\n" for part in parts)
    return re.fullmatch(pattern, printed + "\n") is not None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--check", action="store_true", help="compare with the output that the page shows")
    options = parser.parse_args()
    printed, failed, differ = "", 0, 0
    for kind, content in _BLOCK.findall(options.page.read_text(encoding="utf-8")):
        if kind == "text":
            if options.check and not agrees(content, printed):
                print(f"DIFFERS from what the page shows:\n{content}", flush=True)
                differ += 1
            continue
        print(f"```{kind}\n{content}```\n", flush=True)
        status, printed = run(kind, content)
        print(f"```text\n{printed}\n```\n", flush=True)
        if status:
            print(f"FAILED with {status}", flush=True)
            failed += 1
    print(f"{failed} commands failed" + (f", {differ} outputs differ" if options.check else ""), flush=True)
    return int(failed + differ > 0)


if __name__ == "__main__":
    sys.exit(main())
