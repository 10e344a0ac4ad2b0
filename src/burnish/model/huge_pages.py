"""Huge pages for large buffers on a CPU."""

from __future__ import annotations

import ctypes
import mmap
import platform
from functools import cache

from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

__all__ = ["on_huge_pages"]

_SMALLEST = 2**23
"""Bytes below which a buffer is left alone: whole huge pages, of 2 MiB, lie only in larger ones."""


@cache
def _libc() -> ctypes.CDLL | None:
    if platform.system() != "Linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def on_huge_pages(buffer: Tensor) -> Tensor:
    """Ask the kernel to back a new buffer by huge pages where it is on a CPU; return it.

    A buffer of 64 MiB that is freed after every step costs 16,000 page faults each time that it is first written,
    which takes longer than writing it. Memory that is not written is not taken.
    """
    size = buffer.untyped_storage().nbytes()
    if buffer.device.type == "cpu" and size >= _SMALLEST and not is_fake(buffer) and (libc := _libc()) is not None:
        first = -(-buffer.untyped_storage().data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        last = buffer.untyped_storage().data_ptr() + size
        libc.madvise(first, last - first, mmap.MADV_HUGEPAGE)  # a kernel without huge pages refuses: no harm
    return buffer
