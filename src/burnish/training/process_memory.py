"""Memory that this process holds: now and at most so far, and the release of what earlier runs have left in it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["HeldMemory", "held_memory", "release_memory", "return_freed_blocks"]

_STATUS = Path("/proc/self/status")
_M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h."""


class HeldMemory(NamedTuple):
    """Bytes of a GPU's allocator in this process, or of the process for a CPU.

    Attributes:
        now: bytes held; None where the system does not say.
        peak: most bytes held since the process began.
    """

    now: int | None
    peak: int


def held_memory(device: torch.device) -> HeldMemory | None:
    """Measure what this process holds for a device; None where the system does not say."""
    if device.type == "cuda":
        return HeldMemory(torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device))
    if sys.platform == "linux":
        # getrusage would begin with the peak of the process that started this one.
        lines = _STATUS.read_text(encoding="utf-8").splitlines() if _STATUS.is_file() else []
        sizes = {name: size for name, _, size in (line.partition(":") for line in lines)}
        if {"VmRSS", "VmHWM"} <= sizes.keys():  # some sandboxes lack the second
            return HeldMemory(*(int(sizes[name].removesuffix("kB")) * 1024 for name in ("VmRSS", "VmHWM")))
    if sys.platform == "win32":
        return None  # it has no module resource
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return HeldMemory(None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def release_memory() -> None:
    """Free models of earlier runs and return their memory to the system.

    A trainer is part of reference cycles, so it keeps its model and optimizer until the garbage collector happens to
    run, and glibc keeps most of what is freed then.
    """
    gc.collect()
    torch.cuda.empty_cache()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def return_freed_blocks() -> None:
    """Let glibc return blocks of a megabyte and more to the system once they are freed.

    It raises that size to 32 MiB as a process goes on, so that freed activations stay in fragments: a quarter of the
    process in a small SFT. The system clears what it gives again, which cost that run a third of its speed.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)
