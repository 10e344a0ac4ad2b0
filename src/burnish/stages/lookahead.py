"""Groups that are sampled before they are needed, so that servers sample while the trainer trains."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from burnish.rollout import Request
from burnish.rollout.engine import OverlappingEngine
from burnish.rollout.prompts import Shard
from burnish.types import Completion

__all__ = ["Lookahead"]


@dataclass(slots=True)
class _Begun:
    """A shard of this rank whose completions are being sampled."""

    shard: Shard
    request: Request
    samples: Future[list[Completion]]


@dataclass(slots=True)
class _Span:
    """Prompts of all ranks that were begun together: position after the last one, and version of the weights then."""

    end: int
    version: int


class Lookahead:
    """A queue of groups in the order of their positions, of which each rank samples its shards.

    Lengths, positions and versions are those of the prompts, equal on all ranks, whether a rank has a shard of them or
    not. A checkpoint does not hold them: a resumed run samples them again, so it loses none and repeats none.

    Args:
        engine: samples in the background.
        requests: shards -> their requests.
        seed: seed of the run.
    """

    def __init__(
        self, engine: OverlappingEngine, requests: Callable[[Sequence[Shard]], list[Request]], *, seed: int
    ) -> None:
        self._engine, self._requests, self._seed = engine, requests, seed
        self._begun: deque[_Begun] = deque()
        self._spans: deque[_Span] = deque()
        self._first = 0
        """Position of the first prompt that is not taken."""

    def __len__(self) -> int:
        return self._spans[-1].end - self._first if self._spans else 0

    def begin(self, shards: Sequence[Shard], positions: range, *, step: int, version: int) -> None:
        """Begin to sample prompts that follow those begun before.

        Args:
            shards: this rank's.
            positions: of the prompts.
            step: the round, part of the key of their random numbers.
            version: of the weights now.
        """
        requests = self._requests(shards)
        samples = self._engine.start(requests, seed=self._seed, step=step)
        self._begun += map(_Begun, shards, requests, samples)
        if not self._spans:
            self._first = positions.start
        self._spans.append(_Span(positions.stop, version))

    def oldest(self) -> int | None:
        """Return the version of the weights that the first prompt was begun with; None without a prompt."""
        return self._spans[0].version if self._spans else None

    def take(self, number: int) -> tuple[list[Shard], list[Request], list[list[Completion]]]:
        """Wait for this rank's shards of the first prompts, and remove them.

        Raises:
            EngineError: they cannot be sampled.
        """
        end = self._first + number
        first = [begun for begun in self._begun if begun.shard.position < end]
        found = [begun.samples.result() for begun in first]
        for _ in first:
            self._begun.popleft()
        self._first = end
        while self._spans and self._spans[0].end <= end:
            self._spans.popleft()
        return [begun.shard for begun in first], [begun.request for begun in first], found

    def give_up(self) -> int:
        """Stop sampling; return the number of prompts that are not taken."""
        left, number = [begun.samples for begun in self._begun], len(self)
        self._begun.clear()
        self._spans.clear()
        self._engine.cancel(left)
        return number
