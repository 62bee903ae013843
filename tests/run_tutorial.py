"""Run the commands of a tutorial one after the other, as a reader would, and print what each printed.

    python tests/run_tutorial.py docs/anomalib.md

From the root of a fresh clone whose `.venv` is active. Blocks marked ``sh`` and ``python`` are run; blocks marked
``text`` are the output as pasted. Exits with 1 at the first command that fails.
"""

import re
import subprocess
import sys
from pathlib import Path

_BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMANDS = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-W", "ignore", "-c"]}


def main() -> int:
    for kind, code in _BLOCK.findall(Path(sys.argv[1]).read_text(encoding="utf-8")):
        print(f"```{kind}\n{code}```", flush=True)
        done = subprocess.run([*_COMMANDS[kind], code], check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        print(done.stdout.decode(errors="replace").replace("\r", "\n"), flush=True)
        if done.returncode:
            print(f"FAILED with {done.returncode}", flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
