"""What is fuzzed: each target takes bytes and lets only errors pass that nobody raised on purpose.

It says whether the bytes were accepted; refused with an error that names the file is the other good end.
"""

import contextlib
import functools
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anomalydino_plugin import BankError, ConfigError, ImageError, InputError, MemoryBank, read_image
from anomalydino_plugin.memory_bank import BankBuilder
from jobs import cli
from jobs.config import ScoreConfig
from jobs.inputs import discover
from jobs.pipeline import load

_FOLDER = Path(tempfile.mkdtemp(prefix="anomalydino-fuzz-"))
_PIXELS = 1_000_000


def decoding(data: bytes) -> bool:
    try:
        image = read_image(data, name="fuzzed", max_pixels=_PIXELS)
    except ImageError as error:
        _check_message(error, "fuzzed")
        return False
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size > 3 * _PIXELS:
        raise AssertionError(f"{image.dtype} {image.shape}")
    return True


def manifest(data: bytes) -> bool:
    """The first byte decides between CSV and Parquet."""
    file = _written("list.parquet" if data[:1] == b"P" else "list.csv", data)
    try:
        inputs = discover(str(file), normal=False)
    except (InputError, ConfigError) as error:
        _check_message(error, file.name)
        return False
    if not inputs.images or len({record.image_id for record in inputs.images}) != len(inputs.images):
        raise AssertionError("no images, or an id twice")
    return True


def bank(data: bytes) -> bool:
    file = _written("bank.safetensors", data)
    try:
        loaded = MemoryBank.load(file)
    except BankError as error:
        _check_message(error, file.name)
        return False
    for row in range(len(loaded)):
        loaded.source(row)
    return True


def configuration(data: bytes) -> bool:
    file = _written("stages.yaml", data)
    try:
        load(str(file))
    except ConfigError as error:
        _check_message(error, file.name)
        return False
    return True


def settings_file(data: bytes) -> bool:
    """What ``anomalydino score --config FILE`` makes of it, up to where work would begin."""
    file, told = _written("settings.yaml", data), io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            cli._build(ScoreConfig, _parser().parse_args(["score", f"--config={file}"])["score"])
    except ConfigError as error:
        told.write(str(error))
    except SystemExit as end:
        if end.code != 2:
            raise
    else:
        return True
    if not told.getvalue().strip():
        raise AssertionError("refused without a word")
    return False


@functools.cache
def _parser() -> Any:
    return cli._parser()


def _written(name: str, data: bytes) -> Path:
    (_FOLDER / name).write_bytes(data)
    return _FOLDER / name


def _check_message(error: Exception, name: str) -> None:
    if name not in str(error):
        raise AssertionError(f"does not name {name}: {error}")


TARGETS: dict[str, Callable[[bytes], bool]] = {
    "decoding": decoding,
    "manifest": manifest,
    "bank": bank,
    "configuration": configuration,
    "settings_file": settings_file,
}


def seeds(target: str) -> list[bytes]:
    """Whole files, made by code, that a fuzzer starts from."""
    if target == "decoding":
        from corpus.kinds import encoded, sample

        return [encoded(sample(1, (24, 24)), kind) for kind in ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF")]
    if target == "manifest":
        return [
            b"uri,category,split\na.png,x,test\nb.png,y,train\n",
            b"uri,image_id,label,mask_uri\ns3://b/a.png,1,cut,m.png\n",
        ]
    if target == "bank":
        builder = BankBuilder()
        builder.add(torch.ones(2, 3), (1, 2), image_id="a", size=(2, 3))
        builder.freeze({"backbone": "x"}).save(_FOLDER / "seed.safetensors")
        return [(_FOLDER / "seed.safetensors").read_bytes()]
    if target == "settings_file":
        return [b"images: a\nout: run\n", b"images: a\nout: run\nresolution: 64\ncategory: [x, y]\nmasking: off\n"]
    return [b"defaults: {out: run}\nstages:\n  - extract: {images: a, resolution: 64}\n  - evaluate: {}\n"]
