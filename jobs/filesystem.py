"""One folder on any filesystem, and single files by URI.

Local paths and ``file://`` use the operating system; ``s3://`` and ``gs://`` pyarrow; other schemes fsspec, where it is
installed and knows them. Credentials come from the environment (``AWS_ACCESS_KEY_ID``, roles, ...), never from a URI: a
URI is printed, logged and stored. ``AWS_ENDPOINT_URL`` names an S3-compatible server.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import SplitResult, quote, unquote, unquote_to_bytes, urlsplit

from anomalydino_plugin import ConfigError, ImageError
from jobs.resources import cannot_write

TEMPORARY = ".tmp"  # ending of files that are not whole yet
_CHUNK = 8 << 20
_CONTAINER_SCHEMES = frozenset({"abfs", "abfss", "wasb", "wasbs"})
_SECRET_OPTION = re.compile(
    r"secret|token|password|passwd|signature|credential|(?:^|[_-])(?:key|sig)(?:$|[_-])", re.IGNORECASE
)


class WrittenFile(NamedTuple):
    """A file that was written whole.

    Attributes:
        size: bytes.
        sha256: of its content.
    """

    size: int
    sha256: str


class Folder:
    """A folder; files below it are named by relative paths with forward slashes. It need not exist yet.

    Args:
        location: path or URI.

    Raises:
        ConfigError: a URI that holds credentials, or of a filesystem that nothing here knows.
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        text = os.fspath(location)
        self.local = local_path(text)
        self.location = str(self.local) if self.local is not None else text.rstrip("/")

    @property
    def name(self) -> str:
        """Last part of the location."""
        return self.local.name if self.local is not None else PurePosixPath(split_uri(self.location).path).name

    def uri(self, relative: str) -> str:
        """Where a file below this folder is: a path, or a URI; a file URI where the path is no valid UTF-8."""
        if self.local is not None:
            path = str(self.local / relative)
            return path if _is_utf8(path) else "file://" + quote(os.fsencode(path))
        address, mark, options = self.location.partition("?")
        return f"{address.rstrip('/')}/{quote(relative)}{mark}{options}"

    def exists(self) -> bool:
        """Whether there is a folder with something in it, or an empty one."""
        if self.local is not None:
            return self.local.is_dir()
        return bool(self.files())

    def refuse_file_above(self) -> None:
        """Say before any work that the folder cannot be made.

        Raises:
            NotADirectoryError: a file lies where a folder above it would have to be.
        """
        above = [] if self.local is None else self.local.parents
        nearest = next((path for path in above if path.exists()), None)
        if nearest is not None and not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(nearest))

    def has(self, relative: str) -> bool:
        """Whether a file exists."""
        if self.local is not None:
            return (self.local / relative).is_file()
        filesystem, path = _remote(self.uri(relative))
        return bool(filesystem.get_file_info(path).is_file)

    def files(self, relative: str = "", *, folders: bool = False) -> list[str]:
        """Relative names of all files below a subfolder, sorted; none where it does not exist.

        Args:
            relative: subfolder.
            folders: name local folders, too.
        """
        if self.local is not None:
            return sorted(_walk(self.local, self.local / relative, folders))
        return sorted(_list_remote(self.location, relative))

    def read(self, relative: str) -> bytes:
        """Content of a file.

        Raises:
            OSError: it cannot be read.
        """
        return read_bytes(self.uri(relative))

    def open(self, relative: str) -> Any:
        """A pyarrow file for random access.

        Raises:
            OSError: it cannot be opened.
        """
        import pyarrow as pa

        if self.local is not None:
            return pa.OSFile(str(self.local / relative), "rb")
        filesystem, path = _remote(self.uri(relative))
        return filesystem.open_input_file(path)

    def write(self, relative: str, content: bytes) -> WrittenFile:
        """Write a file whole or not at all."""
        with self.writing(relative) as path:
            path.write_bytes(content)
        return WrittenFile(len(content), hashlib.sha256(content).hexdigest())

    @contextlib.contextmanager
    def writing(self, relative: str) -> Iterator[Path]:
        """A temporary local path whose content becomes the file when the block ends without an error.

        Raises:
            ResourceError: no room, or no right to write.
        """
        if self.local is None:
            with tempfile.TemporaryDirectory(prefix="anomalydino-") as folder:
                path = Path(folder) / "file"
                yield path
                self._upload(path, relative)
            return
        try:
            with _whole(self.local / relative) as temporary:
                yield temporary
        except OSError as error:
            known = cannot_write(error, self.location)
            if known is None:
                raise
            raise known from error

    @contextlib.contextmanager
    def fetched(self, relative: str) -> Iterator[Path]:
        """A local path of a file: itself, or a copy that goes when the block ends.

        Raises:
            OSError: it cannot be read.
        """
        if self.local is not None:
            yield self.local / relative
            return
        with tempfile.TemporaryDirectory(prefix="anomalydino-") as folder:
            path = Path(folder) / "file"
            with self.open(relative) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, _CHUNK)
            yield path

    def remove(self, relative: str) -> None:
        """Delete a file; nothing happens where there is none."""
        if self.local is not None:
            (self.local / relative).unlink(missing_ok=True)
            return
        filesystem, path = _remote(self.uri(relative))
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_file(path)

    def _upload(self, source: Path, relative: str) -> None:
        filesystem, path = _remote(self.uri(relative))
        if _needs_folders(filesystem):
            filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        # An object store shows the object when the stream is closed, not before.
        with source.open("rb") as file, filesystem.open_output_stream(path) as target:
            shutil.copyfileobj(file, target, _CHUNK)


@contextlib.contextmanager
def _whole(target: Path) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not the target's name as it is: that may be as long as a name can be.
    temporary = target.with_name(f".{target.name[-100:]}.{os.getpid()}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        with contextlib.suppress(OSError):  # where nothing can be written, nothing can be removed
            temporary.unlink(missing_ok=True)


def checksum(path: Path) -> WrittenFile:
    """Size and sha256 of a local file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
    return WrittenFile(path.stat().st_size, digest.hexdigest())


def _digest(file: Any) -> Any:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(_CHUNK):
        digest.update(block)
    return digest


def read_bytes(uri: str) -> bytes:
    """Content of one file by path or URI.

    Raises:
        OSError: it cannot be read.
        ConfigError: as ``Folder``.
    """
    local = local_path(uri)
    if local is not None:
        return local.read_bytes()
    filesystem, path = _remote(uri)
    with filesystem.open_input_stream(path) as file:
        content: bytes = file.read()
    return content


def image_source(uri: str, what: str = "image") -> Path | bytes:
    """What an image file is decoded from: its path, or the content of a remote one.

    Args:
        uri: path or URI.
        what: noun for the message.

    Raises:
        ImageError: a remote file cannot be read.
    """
    local = local_path(uri)
    if local is not None:
        return local
    try:
        return read_bytes(uri)
    except OSError as error:
        raise ImageError(f"cannot read {what} {uri!r}: {error}. Check address and credentials.") from error


def is_remote(location: str) -> bool:
    """Whether a location is a URI of another filesystem than the machine's own."""
    return "://" in location and not location.startswith("file://")


def local_path(location: str) -> Path | None:
    """The absolute path of a local location, links followed as far as they lead; ``None`` for a remote one."""
    if is_remote(location):
        return None
    if location.startswith("file://"):
        place = Path(os.fsdecode(unquote_to_bytes(location.removeprefix("file://"))))
    else:
        place = Path(os.path.expanduser(location))  # noqa: PTH111  # Path's raises RuntimeError for an unknown ~user
    return Path(os.path.realpath(place))  # Path.resolve raises an error of its own for links that lead in circles


def split_uri(uri: str) -> SplitResult:
    """The parts of a URI.

    Raises:
        ConfigError: its host cannot be read; does not repeat it, as it may hold credentials.
    """
    try:
        return urlsplit(uri)
    except ValueError:
        scheme = uri.partition("://")[0]
        raise ConfigError(
            f"a {scheme}:// location is no URI: its host cannot be read. Expected {scheme}://HOST/PATH, other "
            "characters written as %XX."
        ) from None


def refuse_secrets(location: str) -> None:
    """Raise ``ConfigError`` where a URI holds credentials, without repeating it: URIs are printed and stored."""
    if not is_remote(location):
        return
    parts = split_uri(location)
    user, at, _ = parts.netloc.rpartition("@")
    container = parts.scheme in _CONTAINER_SCHEMES and ":" not in user  # abfs://CONTAINER@ACCOUNT is no secret
    options = [name.partition("=")[0] for name in parts.query.split("&")]
    if (at and not container) or any(_SECRET_OPTION.search(name) for name in options):
        raise ConfigError(
            f"a {parts.scheme}:// URI holds credentials: they would be printed and stored. Give them in the "
            "environment (for S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role)."
        )


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_unreadable(error: OSError) -> None:
    """A folder that may not be listed would silently be left out; one that is gone meanwhile may be."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _walk(root: Path, folder: Path, folders: bool) -> Iterator[str]:
    for place, below, names in os.walk(folder, onerror=_refuse_unreadable):
        base = Path(place).relative_to(root).as_posix()
        for name in [*names, *(below if folders else [])]:
            yield name if base == "." else f"{base}/{name}"


def _list_remote(location: str, relative: str) -> Iterator[str]:
    from pyarrow.fs import FileSelector

    filesystem, base = _remote(location)
    start = f"{base}/{relative}".rstrip("/")
    for entry in filesystem.get_file_info(FileSelector(start, allow_not_found=True, recursive=True)):
        if entry.is_file:
            yield entry.path[len(base) :].lstrip("/")


def _remote(uri: str) -> tuple[Any, str]:
    """Filesystem of a URI, and the path on it."""
    refuse_secrets(uri)
    parts = split_uri(uri)
    path = f"{parts.netloc}{unquote(parts.path)}".rstrip("/")
    return _filesystem(parts.scheme, parts.netloc, parts.query, os.getpid()), path


@functools.lru_cache(maxsize=16)
def _filesystem(scheme: str, host: str, query: str, process: int) -> Any:
    del process  # connections do not survive a fork
    import pyarrow as pa
    from pyarrow import fs

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if scheme == "s3" and endpoint and "endpoint_override" not in query:
        server = split_uri(endpoint)
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        return fs.S3FileSystem(endpoint_override=server.netloc, scheme=server.scheme, region=region)
    try:
        return fs.FileSystem.from_uri(f"{scheme}://{host}/" + (f"?{query}" if query else ""))[0]
    except pa.ArrowInvalid:
        pass  # a scheme that pyarrow does not know, or options that are none
    except OSError as error:
        raise ConfigError(f"cannot reach {scheme}://{host}: {error}. Check name, region and credentials.") from error
    try:
        import fsspec

        return fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem(scheme)))
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"no filesystem for {scheme}://: {error}. Expected a local path, s3://, gs://, or a scheme of an installed "
            "fsspec package."
        ) from error


def _needs_folders(filesystem: Any) -> bool:
    return filesystem.type_name not in {"s3", "gcs", "abfs"}
