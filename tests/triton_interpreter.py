"""Triton's interpreter, for kernels without a GPU; in a process of its own, as it is chosen when Triton loads."""

import os
import subprocess
import sys


def printed_by(program: str, *words: str) -> str:
    """What a program prints, or the end of what went wrong with it."""
    command = [sys.executable, "-c", program, *words]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return done.stdout.strip() or done.stderr[-2000:]
