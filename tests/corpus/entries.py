"""Folder entries that are no plain file, names that are hard to write, and files that are there twice."""

import os
import shutil
from pathlib import Path

from corpus.kinds import FAILED, SCORED, ImageKind, content, encoded, sample

_PICTURE = content(lambda: encoded(sample(4)))
_CHECK = r"cannot read image .*Check path and permissions"
_REGULAR = r"cannot read image .*expected a regular file"


def _sparse(path: Path) -> None:
    """100 GB that take no room."""
    with Path(path).open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.truncate(100_000_000_000)


def _link(target: str):
    return lambda path: Path(path).symlink_to(target)


def _link_to_a_picture(path: Path) -> None:
    target = Path(path).parent / "target of a link.bin"
    _PICTURE(target)
    Path(path).symlink_to(target)


def _folder_with_a_picture(path: Path) -> None:
    Path(path).mkdir()
    _PICTURE(Path(path) / "inside.png")


def _twice(path: Path) -> None:
    _PICTURE(path)
    shutil.copy(path, Path(path).with_name("copy of it.png"))


_NAMES = {
    "name with a line feed": "two\nlines.png",
    "name with a terminal escape": "\x1b[31mred\x1b[0m.png",
    "name with rich markup": "[link=x]loud[bold].png",
    "name with a leading dash": "--out=elsewhere.png",
    "name with quotes": 'it\'s "quoted".png',
    "name with percent and question mark": "50%?#a=b.png",
    "name with a backslash": "back\\slash.png",
    "name of spaces": "   .png",
    "name like a formula": "=HYPERLINK(1).png",
    "name like a template": "${HOME} {0} %s.png",
    "name of 255 bytes": "n" * 251 + ".png",
    "name outside of ASCII": "Prüfung 日本 \U0001f50d.png",
    "name with a combining accent": "e\u0301.png",
    "name with text from right to left": "\u202egnp.png",
    "upper-case ending": "PICTURE.PNG",
}

ENTRIES = (
    *(ImageKind(name, _PICTURE, file=file) for name, file in _NAMES.items()),
    ImageKind("name that is no UTF-8", _PICTURE, file=b"caf\xe9 \xff.png"),
    ImageKind("broken file whose name is no UTF-8", content(b"no image"), FAILED, "cannot decode", b"broken \xff.png"),
    ImageKind("folder", lambda path: Path(path).mkdir(), FAILED, _REGULAR),
    ImageKind("folder with a picture", _folder_with_a_picture, FAILED, _REGULAR),
    ImageKind("named pipe", os.mkfifo, FAILED, _REGULAR),
    ImageKind("device", _link("/dev/zero"), FAILED, _REGULAR),
    ImageKind("dangling link", _link("nowhere.png"), FAILED, _CHECK),
    ImageKind("link to itself", _link("link to itself.png"), FAILED, _CHECK),
    ImageKind("link to its folder", _link("."), FAILED, _REGULAR),
    ImageKind("link to a picture", _link_to_a_picture, SCORED),
    ImageKind("sparse file of 100 GB", _sparse, FAILED, "100000000000 bytes, more than .*max_pixels"),
    ImageKind("same content twice", _twice, SCORED),
)
BESIDE = {"inside.png", "copy of it.png"}  # further images that the kinds above bring along
