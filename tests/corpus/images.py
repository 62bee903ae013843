"""All kinds of bad images, and a folder that holds one of each."""

import os
from pathlib import Path

from corpus.damaged import DAMAGED
from corpus.entries import ENTRIES
from corpus.kinds import ImageKind
from corpus.modes import MODES
from corpus.overwritten import OVERWRITTEN

IMAGES: tuple[ImageKind, ...] = (*DAMAGED, *OVERWRITTEN, *MODES, *ENTRIES)


def path_of(folder: Path, kind: ImageKind) -> Path:
    """Where a kind lies in a folder."""
    return folder / os.fsdecode(kind.file_name)


def write_all(folder: Path) -> None:
    """Write one file of each kind."""
    folder.mkdir(parents=True)
    for kind in IMAGES:
        path = path_of(folder, kind)
        if os.path.lexists(path):
            raise FileExistsError(f"two kinds share the name {path.name!r}")
        kind.make(path)
