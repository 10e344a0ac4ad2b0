"""Huge pages for large buffers."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish.model.huge_pages import on_huge_pages


def flags_at(address: int) -> list[str]:
    """Return the flags of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping at {address:#x}")


def test_a_large_buffer_is_on_huge_pages_and_a_small_one_is_not() -> None:
    if not hasattr(mmap, "MADV_HUGEPAGE") or not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("no huge pages on this system")
    # Of such sizes, each is a mapping of its own.
    large, plain = torch.empty(2**26, dtype=torch.uint8), torch.empty(2**26, dtype=torch.uint8)
    assert on_huge_pages(large) is large
    middle = 2**25
    assert "hg" in flags_at(large.data_ptr() + middle)
    assert "hg" not in flags_at(plain.data_ptr() + middle)
    assert on_huge_pages(torch.ones(3)).tolist() == [1.0, 1.0, 1.0]


def test_tensors_without_values_pass() -> None:
    with FakeTensorMode():
        assert on_huge_pages(torch.empty(2**26)).shape == (2**26,)
    assert on_huge_pages(torch.empty(2**26, device="meta")).shape == (2**26,)
    assert on_huge_pages(torch.empty(0)).shape == (0,)
