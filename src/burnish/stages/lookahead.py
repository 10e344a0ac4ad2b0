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
    """A shard whose completions are being sampled, and the version of the weights at its start."""

    shard: Shard
    request: Request
    samples: Future[list[Completion]]
    version: int


class Lookahead:
    """A queue of groups in the order of their positions.

    A checkpoint does not hold them: a resumed run samples them again, so it loses none and repeats none.

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

    def __len__(self) -> int:
        return len(self._begun)

    def begin(self, shards: Sequence[Shard], *, step: int, version: int) -> None:
        """Begin to sample shards; `step` is the round, part of the key of their random numbers."""
        requests = self._requests(shards)
        samples = self._engine.start(requests, seed=self._seed, step=step)
        self._begun += map(_Begun, shards, requests, samples, [version] * len(shards))

    def oldest(self) -> int | None:
        """Return the version of the weights that the first group was begun with; None without a group."""
        return self._begun[0].version if self._begun else None

    def take(self, number: int) -> tuple[list[Shard], list[Request], list[list[Completion]]]:
        """Wait for the first groups, and remove them.

        Raises:
            EngineError: they cannot be sampled.
        """
        first = [self._begun[index] for index in range(number)]
        found = [begun.samples.result() for begun in first]
        for _ in first:
            self._begun.popleft()
        return [begun.shard for begun in first], [begun.request for begun in first], found

    def give_up(self) -> int:
        """Stop sampling; return the number of groups that are not taken."""
        left, self._begun = self._begun, deque()
        self._engine.cancel([begun.samples for begun in left])
        return len(left)
