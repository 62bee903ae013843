"""Every kind of bad image through anomalib's Engine, whose reader is not ours: what comes of each.

    python tests/faults/engine_inputs.py

`Engine.predict` of a fitted `AnomalyDINOFewShot` on one file at a time; the score is compared with that of the pixels
that our decoder gives. Rows are printed as a Markdown table, kinds of one outcome together.
"""

import contextlib
import io
import logging
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from corpus.images import IMAGES, path_of, write_all
from generated import TINY, save, textured

LIMIT = 20  # seconds for one file
SAME = 1e-4  # scores, relative: 8-bit pixels that went through float32 come back exactly
EQUAL, OTHER, NAMED, LOGGED, UNNAMED, HANGS = (
    "same score as ours",
    "another score than ours, with a warning that names the file",
    "error that names the file",
    "error, and a log line that names the file",
    "ERROR THAT DOES NOT NAME THE FILE",
    "waits for ever",
)
SILENT = "ANOTHER SCORE THAN OURS, IN SILENCE"
SKIPPED = "not listed by anomalib's dataset"


class Outcome(NamedTuple):
    """What came of one kind."""

    kind: str
    outcome: str
    detail: str = ""


class Listening(logging.Handler):
    """Keeps what our loggers say."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Tried:
    """A fitted model and what it says of files.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path) -> None:
        from anomalib.data import Folder
        from anomalib.engine import Engine

        from anomalydino_plugin import AnomalyDINOFewShot

        save(root / "part" / "good" / "0.png", textured(1))
        self.root = root
        self.model = AnomalyDINOFewShot(
            backbone=TINY, weights="random:0", resolution=64, masking="off", visualizer=False
        )
        data = Folder(
            name="part",
            root=root / "part",
            normal_dir="good",
            num_workers=0,
            test_split_mode="none",
            val_split_mode="none",
            train_batch_size=1,
        )
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        self.engine = Engine(default_root_dir=root, accelerator="cpu", **quiet)
        self.engine.fit(self.model, datamodule=data)
        self.model.post_processor = None  # raw scores; the first trainer keeps it among its callbacks
        self.engine = Engine(default_root_dir=root, accelerator="cpu", **quiet)
        self.listening = Listening()
        logging.getLogger("anomalydino_plugin").addHandler(self.listening)

    def predict(self, path: Path) -> float | None:
        """The score that Engine.predict gives one file; ``None`` where anomalib's dataset does not list it."""
        from anomalib.data import PredictDataset

        dataset = PredictDataset(path=self.root / "part" / "good")
        dataset.image_filenames = [path]
        batches = self.engine.predict(self.model, dataset=dataset)
        return float(batches[0].pred_score[0]) if batches else None

    def outcome(self, name: str, path: Path) -> Outcome:
        self.listening.said = []
        shown = os.fspath(path)
        try:
            with limited(LIMIT), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                found = self.predict(path)
        except TimeoutError:
            return Outcome(name, HANGS)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".replace(shown, path.name).splitlines()[0][:110]
            if shown in str(error) or repr(shown)[1:-1] in str(error):
                return Outcome(name, NAMED, text)
            logged = any(repr(shown)[1:-1] in line or shown in line for line in self.listening.said)
            return Outcome(name, LOGGED if logged else UNNAMED, text)
        if found is None:
            return Outcome(name, SKIPPED)
        return self._compared(name, path, found)

    def _compared(self, name: str, path: Path, found: float) -> Outcome:
        from anomalydino_plugin import ImageError

        warned = any(repr(os.fspath(path))[1:-1] in line for line in self.listening.said)
        try:
            ours = self.model.model.score(path).score
        except ImageError as error:
            text = f"{found:.4f}; ours refuses it: {str(error).partition(': ')[2][:80]}"
            return Outcome(name, OTHER if warned else SILENT, text)
        if abs(found - ours) <= SAME * max(ours, 1e-6):
            return Outcome(name, EQUAL)
        return Outcome(name, OTHER if warned else SILENT, f"{found:.4f}, ours {ours:.4f}")


def outcomes(root: Path) -> list[Outcome]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    write_all(root / "images")
    tried = Tried(root)
    found = []
    for kind in IMAGES:
        found.append(tried.outcome(kind.name, path_of(root / "images", kind)))
        print(found[-1], file=sys.stderr, flush=True)
    return found


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        found = outcomes(Path(folder))
    print("| outcome | kinds | which |\n| --- | --- | --- |")
    for outcome in (EQUAL, OTHER, NAMED, LOGGED, HANGS, SKIPPED, SILENT, UNNAMED):
        own = [item for item in found if item.outcome == outcome]
        if own:
            which = ", ".join(item.kind for item in own)
            print(f"| {outcome} | {len(own)} | {which} |")
    print("\n| kind with another score, or an error | detail |\n| --- | --- |")
    for item in found:
        if item.detail and item.outcome != NAMED:
            print(f"| {item.kind} | {item.detail.replace('|', '/')} |")
    return int(any(item.outcome in {SILENT, UNNAMED} for item in found))


if __name__ == "__main__":
    sys.exit(main())
