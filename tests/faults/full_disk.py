"""Fill the disk of the output folder in the middle of a run; then give it room and go on.

    python tests/faults/full_disk.py [--stages extract score match batched fit evaluate report]

The stages run without Ray (`without_ray.py`), their work and files are the same. The output folder is a tmpfs of its own
(needs root) that holds a part of the results. Each run must end with one line that names folder and reason; what was
committed must be whole, and the same command must complete on the larger folder with the rows of an undisturbed run and a
clean `verify`. `evaluate` and `report` write into the folder of a finished run, which leaves no room. Rows are printed as
a Markdown table; exits with 1 if one fails.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from fault_matrix import rows
from memory_ceilings import READ_ONLY_STAGES, command, committed, prepare, run

PARTS = {"extract": 0.5, "fit": 0.5, "score": 0.6, "match": 0.6, "batched": 0.7}  # of the bytes of a whole run
STAGES = (*PARTS, *READ_ONLY_STAGES)
SMALLEST = 64 * 1024
FILLING = ".filling"


def mount(place: Path, size: int) -> None:
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def told(status: int, said: str, stage: str) -> tuple[str, bool]:
    ours = [line for line in said.splitlines() if line.startswith(f"anomalydino {stage}:")]
    if status != 1 or not ours:
        return f"status {status}: {said.strip().splitlines()[-1:]}"[:300], False
    return ours[-1].replace("|", "/")[:260], "Traceback" not in said and "cannot write to" in ours[-1]


def one(stage: str, root: Path, size: int, expected: dict) -> tuple[str, bool]:
    out = root / f"{stage}-full"
    mount(out, 10**8 if stage in READ_ONLY_STAGES else max(SMALLEST, int(PARTS[stage] * size)))
    try:
        if stage in READ_ONLY_STAGES:
            shutil.copytree(root / "finished", out, dirs_exist_ok=True)
            fill(out)
        line = command(stage, root, out, True)
        status, said = run(line)
        message, good = told(status, said, stage)
        kept = committed(out)
        whole = all(path.read_bytes()[-4:] == b"PAR1" for path in out.rglob("*.parquet"))
        (out / FILLING).unlink(missing_ok=True)
        remount(out, f"rw,size={4 * size + 10**8}")
        again, _ = run(line)
        clean = run([sys.executable, "-m", "jobs.cli", "verify", str(out)])[0] == 0
        equal = rows(out) == expected
        good &= not again and clean and equal and whole and kept <= committed(out)
        after = f"status {again}, {'equal' if equal else 'DIFFERENT'} rows, verify {'clean' if clean else 'NOT CLEAN'}"
        return f"| {stage} | full | {message} | {len(kept)} | {after} | {'pass' if good else 'FAIL'} |", good
    finally:
        subprocess.run(["umount", str(out)], check=False)


def fill(out: Path) -> None:
    """Take what room is left."""
    with suppress(OSError), (out / FILLING).open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    options = parser.parse_args()
    good = True
    print("| stage | output | what is told | shards kept | the same command again | verdict |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="disk-") as folder:
        root = Path(folder)
        prepare(root, options.stages)
        for stage in options.stages:
            out = root / f"undisturbed-{stage}"
            if stage in READ_ONLY_STAGES:
                shutil.copytree(root / "finished", out)
            status, said = run(command(stage, root, out, True))
            if status:
                raise SystemExit(f"{stage}: {status}\n{said}")
            size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
            expected = rows(out)
            line, passed = one(stage, root, size, expected)
            good &= passed
            print(line, flush=True)
    print(f"\n{'all pass' if good else 'FAIL'}")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
