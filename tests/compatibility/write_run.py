"""Write the run of this schema version that later versions must still read: ``python tests/compatibility/write_run.py``.

Run once for each schema version, by the code of that version; the folder is committed and never written again. Images
are generated and weights untrained. Before version 1 is released it may be written anew.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[0]))


def main() -> None:
    from generated import TINY, save, textured

    from jobs.cli import main as command
    from jobs.schema import SCHEMA_VERSION

    target = HERE / f"schema_{SCHEMA_VERSION}"
    if target.exists():
        sys.exit(f"{target} is there: a written version never changes.")
    folder = Path(tempfile.gettempdir()) / "example"  # stands in the rows: no name of a person or a machine
    folder.mkdir()
    try:
        os.chdir(folder)
        for category in ("01", "plate top"):
            save(Path("parts", category, "train", "good", "0.png"), textured(1, (32, 32)))
            save(Path("parts", category, "test", "good", "0.png"), textured(2, (32, 32)))
            save(Path("parts", category, "test", "spot", "0.png"), textured(3, (32, 48), spot=True))
        Path("parts", "01", "test", "spot", "broken.png").write_text("no image")
        words = ["--images", "parts", "--out", "run", "--backbone", TINY, "--weights", "random:0", "--resolution", "32"]
        if command(["score", *words, "--write-embeddings", "--masking", "off", "--threads", "1"]):
            sys.exit("the run failed")
        for file in [*Path("run").rglob("lock")]:
            file.unlink()
        shutil.copytree("run", target)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
