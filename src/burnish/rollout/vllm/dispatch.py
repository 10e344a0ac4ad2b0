"""Groups on their way through the servers of a pool: waiting, running, ended by a change of weights, done."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from burnish.rollout.engine import Request
from burnish.rollout.vllm.client import ServerLost, ServerRefused
from burnish.rollout.vllm.delivery import Server, confirm
from burnish.rollout.vllm.wire import (
    LogprobsMode,
    Piece,
    assemble_group,
    completion_request,
    continuation,
    parse_pieces,
)
from burnish.types import Completion

if TYPE_CHECKING:
    from burnish.rollout.vllm.pool import ServerPool

__all__ = ["Dispatcher", "Job", "Samples"]

_CAPACITY = 256
"""Completions that one server gets at a time; the rest waits for whichever is done first."""

_TICK_SECONDS = 0.5

Samples = Future[list[Completion]]
"""The completions of one request, once they are sampled."""


class Job:
    """A group, with the pieces of its samples so far.

    Args:
        request: the prompt, and how to sample.
        seed: seed of the run.
        step: round of sampling.
    """

    def __init__(self, request: Request, *, seed: int, step: int) -> None:
        self.request, self.seed, self.step = request, seed, step
        self.future: Samples = Future()
        # Greedy samples are all equal: one is asked for.
        self.pieces: list[list[Piece]] = [[] for _ in range(1 if request.params.temperature == 0 else self.size)]

    @property
    def size(self) -> int:
        """G."""
        return self.request.num_samples

    def requests(self, model: str) -> list[tuple[list[int], dict[str, Any]]]:
        """Return the numbers of the samples that are not done, and the request for the rest of them."""
        begun = [[token for piece in pieces for token in piece.token_ids] for pieces in self.pieces]
        by: dict[str, Any] = {"model": model, "seed": self.seed, "step": self.step}
        if not any(begun):
            return [(list(range(len(begun))), completion_request(self.request, **by))]
        return [
            ([number], completion_request(continuation(self.request, number, ids), **by, sampled=len(ids)))
            for number, ids in enumerate(begun)
            if not self.pieces[number] or self.pieces[number][-1].finish == "abort"
        ]

    def add(self, found: Iterable[tuple[int, Piece]]) -> bool:
        """Add pieces by the numbers of their samples; return whether all samples are done."""
        for number, piece in found:
            self.pieces[number].append(piece)
        return all(pieces and pieces[-1].finish != "abort" for pieces in self.pieces)

    def result(self, tokenizer: Any, mode: LogprobsMode = "processed") -> list[Completion]:
        """Return the completions, once all samples are done."""
        return assemble_group(self.pieces, self.request, tokenizer, mode)


class Dispatcher:
    """Gives groups to the servers with the least work, and replays those of servers that are lost.

    Its methods run in the pool's loop.

    Args:
        pool: the servers.
    """

    def __init__(self, pool: ServerPool) -> None:
        self._pool = pool
        self._waiting: deque[Job] = deque()
        self._running: dict[asyncio.Task[list[tuple[int, Piece]]], tuple[Server, Job, float]] = {}
        self._watches: dict[asyncio.Task[None], Server] = {}
        self._seconds: deque[float] = deque(maxlen=256)
        self._is_held = False
        self._changed = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    def submit(self, requests: Sequence[Request], *, seed: int, step: int) -> list[Samples]:
        """Queue groups behind those that wait."""
        jobs = [Job(request, seed=seed, step=step) for request in requests]
        self._waiting.extend(jobs)
        self._changed.set()
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._run())
        return [job.future for job in jobs]

    def hold(self) -> set[str]:
        """Start nothing until `release`; return the URLs of servers with running groups."""
        self._is_held = True
        return {owner.client.url for owner, _, _ in self._running.values()}

    async def end(self, urls: Collection[str]) -> set[str]:
        """Have servers end what runs on them, for any process; return the URLs of those that are lost meanwhile."""
        update, lost = self._pool.update, set[str]()
        for server in [server for server in self._pool.servers if server.client.url in urls]:
            try:
                # Who answers now has had these weights all along.
                await confirm(server, "" if update is None else update.tag)
                await server.client.post("/pause?mode=abort", {}, deadline=self._pool.deadlines.sync)
            except (ServerLost, ServerRefused) as error:
                self.drop(server, str(error))
                lost.add(server.client.url)
        return lost

    async def drain(self) -> None:
        """Wait until nothing runs; groups that were ended wait with their tokens so far."""
        while self._running:
            await asyncio.wait(self._running, timeout=_TICK_SECONDS)
            await asyncio.sleep(0)

    def release(self) -> None:
        """Start groups again."""
        self._is_held = False
        self._changed.set()

    def cancel(self, given_up: Collection[Samples]) -> None:
        """Give up groups."""
        self._waiting = deque(job for job in self._waiting if job.future not in given_up)
        for task in [task for task, (_, job, _) in self._running.items() if job.future in given_up]:
            task.cancel()
            del self._running[task]
        self._changed.set()

    async def _run(self) -> None:
        """Work until no group is left; an error is that of every group."""
        self._seconds.clear()
        try:
            while self._waiting or self._running:
                self._changed.clear()
                if not self._is_held:
                    if not self._pool.ready:
                        await self._pool.revive()
                    self._assign()
                await self._wait()
                self._drop_slow()
        except BaseException as error:
            for job in (*self._waiting, *(job for _, job, _ in self._running.values())):
                if isinstance(error, Exception):
                    job.future.set_exception(error)
                else:
                    job.future.cancel()
            self._waiting.clear()
            if not isinstance(error, Exception):
                raise
        finally:
            # Nothing is awaited here: a group that is submitted meanwhile would find this loop alive and wait for good.
            for task in (*self._running, *self._watches):
                task.cancel()
            self._running.clear()
            self._watches.clear()

    async def _wait(self) -> None:
        """Wait until a request or a watch ends, or something has changed; collect what has ended."""
        change = asyncio.create_task(self._changed.wait())
        try:
            waited: set[asyncio.Task[Any]] = {change, *self._running, *self._watches}
            finished, _ = await asyncio.wait(waited, timeout=_TICK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            change.cancel()
        for task in finished - {change}:
            self._collect(task)

    def _load(self, server: Server) -> int:
        """Count the completions that run on a server."""
        return sum(job.size for owner, job, _ in self._running.values() if owner is server)

    def _assign(self) -> None:
        """Give waiting groups to the servers with the least work."""
        for server in self._pool.ready:
            if server not in self._watches.values():
                self._watches[asyncio.create_task(self._watch(server))] = server
        while self._waiting and (ready := self._pool.ready):
            server = min(ready, key=self._load)
            load = self._load(server)
            if load and load + self._waiting[0].size > _CAPACITY:
                return
            job = self._waiting.popleft()
            self._running[asyncio.create_task(self._sample(server, job))] = (server, job, time.monotonic())

    async def _sample(self, server: Server, job: Job) -> list[tuple[int, Piece]]:
        """Sample what is left of a group; return pieces by the number of their sample."""
        assert self._pool.update is not None
        update = self._pool.update

        async def post(numbers: list[int], body: dict[str, Any]) -> list[tuple[int, Piece]]:
            # No deadline here: `_watch` ends a request whose server makes no tokens, however long it is.
            answer = await server.client.post("/v1/completions", body, deadline=86400.0)
            return list(zip(numbers, parse_pieces(answer, len(numbers), update.version), strict=True))

        try:
            found = await asyncio.gather(*(post(*request) for request in job.requests(server.model)))
        except ServerRefused as error:
            if error.status == 404:
                raise ServerLost(f"{server.client.url} no longer has {server.model}: it was restarted.") from error
            raise
        pieces = [entry for entries in found for entry in entries]
        # The answer of a server that was restarted is of other weights. `hold` asks before it ends a request.
        if not self._is_held or all(piece.finish != "abort" for _, piece in pieces):
            await confirm(server, update.tag)
        return pieces

    async def _watch(self, server: Server) -> None:
        """Return never; raise ServerLost once a server with work answers nothing, or makes no tokens."""
        deadlines, missed, seen, moved = self._pool.deadlines, 0, -1.0, time.monotonic()
        while True:
            await asyncio.sleep(deadlines.heartbeat)
            if not self._load(server):
                moved = time.monotonic()
                continue
            try:
                tokens = await server.client.progress()
            except ServerLost as error:
                missed += 1
                if missed >= deadlines.misses:
                    raise ServerLost(f"{missed} looks in a row failed: {error}") from error
                continue
            missed = 0
            if tokens != seen:
                seen, moved = tokens, time.monotonic()
            elif time.monotonic() - moved > deadlines.stall:
                raise ServerLost(f"{server.client.url} has work and made no token for {deadlines.stall:g} s.")

    def _collect(self, task: asyncio.Task[Any]) -> None:
        watched = self._watches.pop(task, None)
        if watched is not None:
            if isinstance(error := task.exception(), ServerLost):
                self.drop(watched, str(error))
            elif error is not None:
                raise error
            return
        if task not in self._running:
            return  # of a server that was dropped a moment ago
        server, job, started = self._running.pop(task)
        self._waiting.appendleft(job)
        if isinstance(error := task.exception(), ServerLost):
            self.drop(server, str(error))
        elif error is not None:
            raise error
        elif job.add(task.result()):
            self._seconds.append(time.monotonic() - started)
            found = job.result(self._pool.tokenizer, self._pool.mode or "processed")
            if job.request.on_done is not None:  # an error is that of every group, this one still among the waiting
                job.request.on_done(found)
            self._waiting.popleft()
            job.future.set_result(found)

    def drop(self, server: Server, reason: str) -> None:
        """Drop a server; its running groups wait again, in their order."""
        self._pool.drop(server, reason)
        mine = [(task, job) for task, (owner, job, _) in self._running.items() if owner is server]
        for task, _ in mine:
            task.cancel()
            del self._running[task]
        self._waiting.extendleft(job for _, job in reversed(mine))
        for watch, owner in list(self._watches.items()):
            if owner is server:
                watch.cancel()
                del self._watches[watch]

    def _drop_slow(self) -> None:
        """Drop a server whose group takes many times as long as others did, while another one has nothing to do."""
        deadlines, ready = self._pool.deadlines, self._pool.ready
        idle = [server for server in ready if not self._load(server)]
        if not idle or self._waiting or not self._seconds:
            return
        limit = max(deadlines.slow, deadlines.slow_factor * statistics.median(self._seconds))
        slow = {owner: None for owner, _, started in self._running.values() if time.monotonic() - started > limit}
        for server in slow:
            # A replay is compared with a longer time, so that a long group is not passed around.
            self._seconds.append(limit)
            self.drop(server, f"{server.client.url} is slow: a group took more than {limit:.0f} s; others did it.")
