"""What a process holds: memory, open files, threads, child processes, temporary files."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import psutil

_TCP_CLOSE = 7  # include/net/tcp_states.h
_GRPC_POOLS = frozenset({"event_engine", "default-executo"})  # 15 characters of a name are kept


class Held(NamedTuple):
    """What one process, or several together, hold.

    Attributes:
        memory: bytes, shared pages counted in parts (PSS), so that a sum over processes means something.
        files: open file descriptors.
        threads: of them.
        processes: how many.
    """

    memory: int
    files: int
    threads: int
    processes: int


def held_by(processes: Iterable[psutil.Process]) -> Held:
    """Sum over processes; those that ended meanwhile count nothing."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            found.append((process.memory_full_info().pss, process.num_fds(), process.num_threads(), 1))
    return Held(*map(sum, zip(*found, strict=True))) if found else Held(0, 0, 0, 0)


def own_files() -> list[str]:
    """What the file descriptors of this process lead to, sorted."""
    targets = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own descriptor is closed by now
            targets.append(str(entry.readlink()))
    return sorted(targets)


def closed_connections() -> int:
    """Descriptors of this process that are TCP sockets without a connection, which nobody listens on either."""
    found = 0
    for entry in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError):
            if str(entry.readlink()).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(entry.name))) as own:
                    found += own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE
    return found


def own_threads() -> int:
    """Threads of this process, gRPC's two pools left out: they grow and shrink with what goes on at once."""
    found = 0
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found += (task / "comm").read_text().strip() not in _GRPC_POOLS
    return found


def own_children() -> list[str]:
    """Command lines of all processes below this one."""
    lines = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            lines.append(" ".join(child.cmdline())[:80] or child.name())
    return sorted(lines)
