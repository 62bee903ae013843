"""What the machine ran out of: errors from the depths -> one line with what there was and what to do.

A stage that runs out of memory, disk space or open files ends with ``ResourceError``: no image is at fault, and the
same command completes once there is room. So no such error may become a row of ``failures``.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import resource
from collections.abc import Iterator
from pathlib import Path

from anomalydino_plugin import AnomalyDINOError, ResourceError

GO_ON = "What is committed stays. Repeat the command to go on."
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_RIGHT = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_IN_THE_WAY = frozenset({errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY})
_NO_FILES = frozenset({errno.EMFILE, errno.ENFILE})
_MEMORY_TEXTS = (  # RuntimeErrors of torch, OpenVINO, OpenCV, threading and CUDA
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "insufficient memory",
    "out of memory",
    "bad_alloc",
    "bad allocation",
    "failed to allocate",
    "can't start new thread",
    "failed to map segment from shared object",  # a library that is loaded when it is first used
)
_NOT_ALLOWED = "operation not permitted"  # said after the last of them where a library lies in a folder mounted noexec
_ARROW_BYTES = 64 * 1024**2  # a thread of its own and its heap, to read or write Parquet
_UNLIMITED = 1 << 60  # cgroup v1 writes a huge number where there is no limit
_CGROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@contextlib.contextmanager
def stated(work: str, remedy: str = "") -> Iterator[None]:
    """Turn what runs out inside the block into ``ResourceError``; every other error goes on as it is.

    Args:
        work: what is done, for the message.
        remedy: sentence about settings that need less.

    Raises:
        ResourceError: memory, disk space or open files ran out.
    """
    try:
        yield
    except AnomalyDINOError:
        raise
    except Exception as error:
        known = as_resource_error(error, work, remedy)
        if known is None:
            raise
        raise known from error


def as_resource_error(error: BaseException, work: str, remedy: str = "") -> ResourceError | None:
    """What ran out, as an error for people; ``None`` where the error means something else."""
    if is_memory(error):
        first = str(error).strip().splitlines()[:1]
        return ResourceError(
            f"{work}: memory ran out ({type(error).__name__}{': ' if first else ''}{' '.join(first)[:160]}). "
            f"{memory_state()} {_sentence(remedy)}{GO_ON}"
        )
    number = getattr(error, "errno", None)
    if isinstance(error, OSError) and number in _NO_FILES:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return ResourceError(f"{work}: {error.strerror}, the limit is {most}. Raise it (`ulimit -n`). {GO_ON}")
    if isinstance(error, OSError) and number in _NO_ROOM:
        return ResourceError(f"{work}: {_reason(error)}. Free space there. {GO_ON}")
    return None


def cannot_write(error: OSError, location: str) -> ResourceError | None:
    """Why a folder could not be written to; ``None`` where the error means something else."""
    if error.errno in _NO_ROOM:
        return ResourceError(f"cannot write to {location!r}: {_reason(error)}. Free space there. {GO_ON}")
    if error.errno in _NO_RIGHT:
        return ResourceError(f"cannot write to {location!r}: {_reason(error)}. Make it writable. {GO_ON}")
    if error.errno in _IN_THE_WAY:
        name = Path(str(error.filename2 or error.filename or "a file")).name
        return ResourceError(
            f"cannot write {name!r} to {location!r}: {_reason(error)}. Remove or rename what lies there. {GO_ON}"
        )
    return None


def lost_workers(error: BaseException, work: str, remedy: str = "") -> ResourceError | None:
    """What is told where Ray gave up on worker processes; ``None`` where the error means something else."""
    from ray import exceptions

    inner = getattr(error, "cause", None)
    if isinstance(inner, Exception):
        return as_resource_error(inner, work, remedy)
    if isinstance(error, exceptions.RayTaskError) or not isinstance(error, exceptions.RayError):
        return None
    return ResourceError(
        f"{work}: worker processes ended before their work was done, again and again ({type(error).__name__}). Mostly "
        f"the system ends them for want of memory. {memory_state()} {_sentence(remedy)}{GO_ON}"
    )


def is_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return _NOT_ALLOWED not in text and any(part in text for part in _MEMORY_TEXTS)


def expect_memory(size: int = _ARROW_BYTES) -> None:
    """Ask for memory before native code does that ends the process where it is refused.

    Args:
        size: bytes of address space; no page of it is touched.

    Raises:
        MemoryError: the system refuses it.
    """
    try:
        mmap.mmap(-1, size).close()
    except OSError as error:
        raise MemoryError(f"{size / 1e6:.0f} MB of working memory are refused") from error


def memory_state() -> str:
    """What this process holds and may hold, one sentence."""
    try:
        return _memory_state()
    except (MemoryError, OSError):  # nothing is left to look it up with
        return "Too little is left to tell how much there was."


def _memory_state() -> str:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    limits = []
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if space != resource.RLIM_INFINITY:
        limits.append(f"{_gigabytes(space)} of address space (`ulimit -v`)")
    group = group_limit()
    if group is not None:
        limits.append(f"{_gigabytes(group)} of its control group")
    allowed = " and ".join(limits) or "none but the machine's"
    return f"This process has held up to {_gigabytes(peak)}; limits: {allowed}."


def group_limit() -> int | None:
    """Bytes that the control group of this process may use, its parents' limits included; ``None`` for no limit."""
    try:
        lines = [line.split(":", 2) for line in _OWN_GROUPS.read_text().splitlines()]
    except OSError:
        return None
    found: list[int | None] = []
    for number, controllers, own in lines:
        if number == "0":
            found += [_read_limit(folder / "memory.max") for folder in _upwards(_CGROUPS, own)]
        elif "memory" in controllers.split(","):
            base = _CGROUPS / "memory"
            found += [_read_limit(folder / "memory.limit_in_bytes") for folder in _upwards(base, own)]
    return min((limit for limit in found if limit is not None), default=None)


def _upwards(base: Path, own: str) -> list[Path]:
    place = base / own.lstrip("/")
    return [folder for folder in (place, *place.parents) if folder == base or base in folder.parents]


def _read_limit(path: Path) -> int | None:
    try:
        value = int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None
    return value if value < _UNLIMITED else None


def _reason(error: OSError) -> str:
    return str(error.strerror or error).strip().rstrip(".").splitlines()[0][:200]


def _sentence(text: str) -> str:
    return f"{text} " if text else ""


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
