"""Wall-clock time and tokens of optimizer steps by phase: sampling, rewards, scoring, update and the rest."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from transformers import TrainerCallback

__all__ = ["PhaseCallback", "Phases"]


class Phases:
    """Clock that attributes every moment of a run to one phase, so that the phases of a step sum to its time.

    The phases are `sampling`, `sync` (weights to the sampler), `rewards`, `scoring` (log-probabilities of the
    reference, the old policy and the critic), `update`, `evaluation`, `saving`, and `other` for everything else.

    Args:
        clock: seconds since any moment.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.start()

    def start(self) -> None:
        """Forget what was measured: a run begins."""
        self._seconds: dict[str, float] = defaultdict(float)
        self._tokens: dict[str, int] = defaultdict(int)
        self._steps = 0
        self._base = "other"
        self._current: str | None = None
        self._since = self._clock()

    def begin(self, phase: str) -> None:
        """Attribute the time from now on to a phase, except where another is measured."""
        if self._current is None:
            self._count(self._base)
        self._base = phase

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Attribute the time inside to a phase; inside another phase it stays with that one."""
        if self._current is not None:
            yield
            return
        self._count(self._base)
        self._current = name
        try:
            yield
        finally:
            self._count(name)
            self._current = None

    def add_tokens(self, phase: str, count: int) -> None:
        """Count tokens that a phase of this step has processed; those of an evaluation do not count."""
        if self._current != "evaluation":
            self._tokens[phase] += count

    def end_step(self) -> dict[str, int]:
        """End an optimizer step; return its tokens by phase."""
        self._count(self._base)
        self._steps += 1
        tokens, self._tokens = dict(self._tokens), defaultdict(int)
        return tokens

    def flush(self, gathered: Callable[[Sequence[Any]], list[Any]]) -> dict[str, float]:
        """Return the mean seconds per step of each phase since the last flush, over the ranks.

        Args:
            gathered: concatenates the lists of all ranks.
        """
        own = {name: seconds / max(self._steps, 1) for name, seconds in self._seconds.items()}
        # A phase that has been seen stays in the log, at 0.
        self._seconds = defaultdict(float, dict.fromkeys(self._seconds, 0.0))
        self._steps = 0
        ranks = gathered([own])
        names = sorted({name for found in ranks for name in found})
        return {f"seconds/{name}": fmean(found.get(name, 0.0) for found in ranks) for name in names}

    def _count(self, name: str) -> None:
        now = self._clock()
        self._seconds[name] += now - self._since
        self._since = now


class PhaseCallback(TrainerCallback):
    """Mark the beginning of a run and the ends of updates and steps.

    Args:
        phases: the clock.
        end_step: receives the tokens of each step by phase.
    """

    def __init__(self, phases: Phases, end_step: Callable[[dict[str, int]], None]) -> None:
        self._phases, self._end_step = phases, end_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._phases.start()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the update."""
        self._phases.begin("other")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the step, before it is logged."""
        self._end_step(self._phases.end_step())
