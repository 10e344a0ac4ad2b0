"""Memory that the processes of a run hold together, read from outside the sandbox through /proc (Linux).

Nothing inside can hold memory that is not seen here: seccomp refuses memory that outlives its mapping (System V, memfd,
shared anonymous mappings, pages given to pipes), and the size of a run's folder is bounded by itself.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["descendants", "innermost", "kill_all", "memory_exceeds", "warn_if_unseen"]

logger = logging.getLogger(__name__)


@functools.cache
def _lists_children() -> bool:
    return Path("/proc/thread-self/children").exists()


def _children(pid: int) -> list[int]:
    """List the processes that the threads of one have started, and those that it inherited."""
    found: list[int] = []
    if _lists_children():
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(OSError):  # a thread that has ended
                    found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
        return found
    for file in Path("/proc").glob("[0-9]*/stat"):  # slow where there are many processes
        with contextlib.suppress(OSError):
            if int(file.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(file.parent.name))
    return found


def descendants(pid: int) -> list[int]:
    """List the processes below one, parents first."""
    found = _children(pid)
    for child in found:  # grows meanwhile
        found += _children(child)
    return found


def innermost(pid: int) -> int:
    """Follow the first children of a process to the one that has none."""
    while below := _children(pid):
        pid = below[0]
    return pid


def warn_if_unseen(pid: int) -> None:
    """Say once that the memory of runs is bounded by process only, where /proc does not show this one."""
    if sys.platform == "linux" and not _address_space(pid):
        _warn_unseen()


@functools.cache
def _warn_unseen() -> None:
    logger.warning(
        "/proc does not show the sandbox's processes: memory_mib bounds each process of a run, and not all together. "
        "Mount /proc, without hidepid, to bound them."
    )


def memory_exceeds(pids: Sequence[int], limit_bytes: int) -> bool:
    """Return whether processes hold more than a limit together; pages that they share since a fork count once."""
    # Address space takes no walk over pages, and almost every run has less of it than the limit.
    return sum(map(_address_space, pids)) > limit_bytes and sum(map(_anonymous, pids)) > limit_bytes


def _address_space(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # it has ended
        return 0


def _anonymous(pid: int) -> int:
    """Return the bytes of a process that no file backs, in memory or swapped out, shared ones in proportion."""
    sources = (("smaps_rollup", ("Pss_Anon:", "SwapPss:")), ("status", ("RssAnon:", "VmSwap:")))
    for name, counted in sources:
        # The first is closed to a superuser without CAP_SYS_PTRACE; the second counts shared pages for each process.
        with contextlib.suppress(OSError):
            lines = [line.split() for line in Path(f"/proc/{pid}/{name}").read_text().splitlines()]
            sizes = [int(line[1]) << 10 for line in lines if line[0] in counted]
            if len(sizes) == len(counted):
                return sum(sizes)
    return 0


def kill_all(pids: Sequence[int], ancestor: int) -> None:
    """Kill processes as far as they are still below an ancestor: a number may meanwhile be that of another process."""
    if sys.platform != "linux":
        return
    for pid in pids:
        with contextlib.suppress(OSError):
            handle = os.pidfd_open(pid)
            try:
                if pid in descendants(ancestor):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            finally:
                os.close(handle)
