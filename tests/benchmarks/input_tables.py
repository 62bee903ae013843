"""The tables of inputs in docs/reliability.md: ``python tests/benchmarks/input_tables.py``; what is told of each."""

import os
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from corpus.configurations import CONFIGURATIONS
from corpus.images import IMAGES, path_of, write_all
from corpus.manifests import MANIFESTS, write

from anomalydino_plugin import AnomalyDINOError
from jobs.decode import decode
from jobs.inputs import discover
from jobs.messages import clean
from jobs.records import ImageRecord


def told(message: str) -> str:
    """A message without what differs between machines, fit for a table."""
    return re.sub(r"'[^']*/", "'", clean(message)).replace("|", "\\|").replace("\n", " ")[:170]


def images(folder: Path) -> None:
    write_all(folder)
    print("| kind of image | outcome | what is told |\n| --- | --- | --- |")
    for kind in IMAGES:
        record = ImageRecord("id", os.fspath(path_of(folder, kind)), "c")
        decoded, failures = decode([record], 64, 16)
        says = (
            f"{decoded[0].plan.image_size[1]} x {decoded[0].plan.image_size[0]} pixels"
            if decoded
            else failures[0].message
        )
        print(f"| {kind.name} | {'decoded' if decoded else 'failure'} | {told(says)} |")


def manifests(folder: Path) -> None:
    print("\n| kind of manifest | outcome | what is told |\n| --- | --- | --- |")
    for number, kind in enumerate(MANIFESTS):
        try:
            found = discover(str(write(folder / str(number), kind)), normal=False)
            print(f"| {kind.name} | read | {len(found.images)} images, categories {list(found.categories)} |")
        except AnomalyDINOError as error:
            print(f"| {kind.name} | refused | {told(str(error))} |")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        images(Path(place) / "images")
        manifests(Path(place) / "manifests")
    print(f"\nConfigurations: {', '.join(f'`{kind.name}`' for kind in CONFIGURATIONS)}.")
    print(f"\n{len(IMAGES)} kinds of images, {len(MANIFESTS)} of manifests, {len(CONFIGURATIONS)} of configurations.")
