"""Progress: phases with their time, a bar where lines can be redrawn, else lines at intervals with the time left."""

from __future__ import annotations

import io
import sys
import time
from functools import partial
from types import ModuleType

import pytest
from rich.console import Console

from burnish import progress
from burnish.progress import Progress, phase


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as its only element."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_has_lines_at_intervals_with_the_time_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("work", 110, completed=10) as shown:
        for step in range(11, 61):
            clock[0] += 1.0
            shown.update(step, f"{step} tokens")
        clock[0] += 1.0
        shown.update(61, now=True)
    assert capsys.readouterr().err.splitlines() == [
        "[burnish] work 30/110  left 1:20  30 tokens",
        "[burnish] work 50/110  left 1:00  50 tokens",
        "[burnish] work 61/110  left 0:49  60 tokens",
    ]


def test_a_terminal_has_a_bar_with_the_same(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "_live_console", lambda: Console(file=screen, force_terminal=True, width=120))
    with Progress("work", 100) as shown:
        clock[0] += 25.0
        shown.update(50, "loss 1.5")
    drawn = screen.getvalue()
    assert all(part in drawn for part in ("work", "50/100", "left 0:25", "loss 1.5"))
    assert drawn.rindex("\x1b[?25h") > drawn.rindex("\x1b[?25l"), "the cursor comes back"
    assert capsys.readouterr().err == ""


def test_a_notebook_without_widgets_has_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    progress._console.cache_clear()
    for installed, redraws in ((None, False), (object(), True)):
        monkeypatch.setattr(progress, "find_spec", lambda name, found=installed: found)
        assert (progress._live_console() is not None) == redraws
    progress._console.cache_clear()


def test_a_phase_inside_a_bar_stands_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("rich.console.Console", partial(Console, file=screen, force_terminal=True, width=120))
    progress._console.cache_clear()
    with Progress("work", 100) as shown:
        with phase("compiling"):
            time.sleep(0.3)
        shown.update(50, "loss 1.5")
    progress._console.cache_clear()
    drawn = screen.getvalue()
    assert "compiling ..." in drawn
    assert "50/100" in drawn


@pytest.mark.parametrize(("seconds", "said"), [(0.05, ""), (0.31, "0.3 s"), (12.4, "12 s")])
def test_a_phase_says_how_long_it_took(
    clock: list[float], capsys: pytest.CaptureFixture[str], seconds: float, said: str
) -> None:
    with phase("encoding 800 rows"):
        clock[0] += seconds
    assert capsys.readouterr().err == (f"[burnish] encoding 800 rows ... {said}\n" if said else "")


def test_other_ranks_say_nothing(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with phase("loading"), Progress("work", 2) as shown:
        clock[0] += 30.0
        shown.update(1, now=True)
    assert capsys.readouterr().err == ""
