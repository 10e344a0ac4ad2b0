"""What this process holds, and what is released."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch

from burnish.training import process_memory
from burnish.training.process_memory import held_memory, release_memory

CPU = torch.device("cpu")
MANY = 64
"""MB of the blocks below: the interpreter and the libraries move by a few MB meanwhile."""


class Cycle:
    def __init__(self) -> None:
        self.itself = self
        # Of 128 KiB, which glibc takes from its heap; a larger block by itself would be returned when it is freed.
        self.blocks = [torch.ones(2**15) for _ in range(8 * MANY)]
        self.last = torch.ones(2**15)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep freed memory in other ways")
def test_what_a_cycle_held_returns_to_the_system() -> None:
    release_memory()
    before = held_memory(CPU)
    gc.disable()
    try:
        made = Cycle()
        keeps, cycle = made.last, weakref.ref(made)  # the heap ends with a live block, so it cannot just shrink
        del made
        during = held_memory(CPU)
        assert cycle() is not None
        release_memory()
        after = held_memory(CPU)
    finally:
        gc.enable()
    assert cycle() is None
    assert before is not None
    assert during is not None
    assert after is not None
    assert before.now is not None
    assert during.now is not None
    assert after.now is not None
    assert during.now - before.now > 0.8 * MANY * 2**20
    assert after.now - before.now < 0.2 * MANY * 2**20
    assert after.peak > 0.99 * during.now, "pages are counted in batches"
    assert keeps.sum() == 2**15


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file")
@pytest.mark.parametrize("text", ["VmRSS:\t 5 kB\n", None])
def test_a_system_that_does_not_say_all_of_it(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, file = held_memory(CPU), tmp_path / "status"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(process_memory, "_STATUS", file)
    found = held_memory(CPU)
    assert said is not None
    assert found is not None
    assert found.now is None
    assert found.peak >= 0.99 * said.peak
