"""Servers that share the groups of a rollout: lost ones are dropped, their groups replayed, and they rejoin."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from burnish.errors import EngineError
from burnish.rollout.engine import Request
from burnish.rollout.vllm.client import Deadlines, ServerClient, ServerLost, ServerRefused
from burnish.rollout.vllm.delivery import Server, confirm, deliver, prove
from burnish.rollout.vllm.identity import check_logprobs_mode, check_tokenizer, read_served
from burnish.rollout.vllm.updates import Update
from burnish.rollout.vllm.wire import completion_request, parse_completions
from burnish.types import Completion

__all__ = ["ServerPool"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CAPACITY = 256
"""Completions that one server gets at a time; the rest waits for whichever is done first."""

_TICK_SECONDS = 0.5


class ServerPool:
    """Servers, and the loop that talks to them.

    Args:
        clients: URL of each server, and its token; None looks the token up.
        tokenizer: the trainer's.
        deadlines: see `Deadlines`.
    """

    def __init__(self, clients: Sequence[tuple[str, str | None]], tokenizer: Any, deadlines: Deadlines) -> None:
        self.deadlines, self.tokenizer = deadlines, tokenizer
        self.servers = [Server(ServerClient(url, token, deadlines)) for url, token in clients]
        self.update: Update | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_serve_loop, args=(self._loop,), name="burnish-vllm", daemon=True)
        self._thread.start()

    @classmethod
    def connected(cls, urls: Sequence[str], tokenizer: Any, timeout: float) -> ServerPool:
        """Connect to servers, waiting until one is up.

        Args:
            urls: one or more.
            tokenizer: the trainer's.
            timeout: longest wait in seconds.

        Raises:
            ConfigError: a server has another tokenizer.
            EngineError: none is up in time.
        """
        pool = cls([(url, None) for url in urls], tokenizer, Deadlines(start=timeout))
        try:
            pool.call(pool.connect())
        except BaseException:
            pool.close()
            raise
        return pool

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the pool's loop, and cancel it if the caller is interrupted."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Close the connections and end the loop."""
        if not self._thread.is_alive():
            return

        async def close_all() -> None:
            for server in self.servers:
                if server.adapter is not None and server.version is not None:
                    with contextlib.suppress(EngineError):
                        await server.client.post("/v1/unload_lora_adapter", {"lora_name": server.adapter}, deadline=5.0)
                await server.client.close()

        self.call(close_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)

    @property
    def ready(self) -> list[Server]:
        """Servers that were verified at the current version."""
        tag = self.update.tag if self.update is not None else None
        return [server for server in self.servers if tag is not None and server.version == tag]

    async def connect(self) -> None:
        """Wait until a server is up, and check all that are.

        Raises:
            ConfigError: a server has another tokenizer, or reports other log-probabilities.
            EngineError: none is up in time.
        """
        await self._until_one(lambda server: self._identify(server))

    async def sync(self, update: Update) -> None:
        """Deliver an update to every server that answers.

        Raises:
            CheckFailed: a server samples from other weights.
            EngineError: no server took it in time.
        """
        self.update = update
        await self._until_one(lambda server: self._restore(server, update))

    async def _until_one(self, work: Any) -> None:
        """Do a work on every server, and again on the lost ones until one is done; deadlines.start at most."""
        started = time.monotonic()
        while True:
            outcomes = await asyncio.gather(*(self._tried(server, work(server)) for server in self.servers))
            if None in outcomes:
                return
            if all(isinstance(outcome, ServerRefused) for outcome in outcomes):
                raise EngineError(" ".join(str(outcome) for outcome in outcomes))
            waited = time.monotonic() - started
            if waited >= self.deadlines.start:
                raise EngineError(
                    f"no vLLM server is ready after {waited:.0f} s (vllm_server_timeout = {self.deadlines.start:g}): "
                    f"{'; '.join(server.reason for server in self.servers)} Start one with `burnish serve MODEL`, or "
                    "set vllm_server_base_url to one that runs."
                )
            await asyncio.sleep(min(2.0, self.deadlines.heartbeat))

    async def _tried(self, server: Server, work: Coroutine[Any, Any, None]) -> ServerLost | ServerRefused | None:
        """Do a work on a server; return the failure that makes it unusable for now."""
        was_ready = server.version is not None
        try:
            await work
        except (ServerLost, ServerRefused) as error:
            if was_ready:
                self.drop(server, str(error))
            server.version, server.reason = None, str(error)
            return error
        return None

    async def _identify(self, server: Server) -> None:
        client = server.client
        # A short look first: a stopped process accepts connections and answers nothing.
        await client.get("/health", deadline=min(self.deadlines.call, 2 * self.deadlines.heartbeat))
        if server.served is not None:
            return
        served = await read_served(client)
        await check_tokenizer(client, served, self.tokenizer)
        server.served = served

    async def _restore(self, server: Server, update: Update) -> None:
        """Bring a server to the current version: what it has is proven, anything else is delivered."""
        await self._identify(server)
        if server.version == update.tag:
            return
        was_lost = bool(server.reason)
        if server.proof.last is not None and server.proof.last.version == update.tag:
            with contextlib.suppress(ServerLost, ServerRefused):
                await confirm(server, update.tag)
                await prove(server, update, self.deadlines)
                server.version, server.reason = update.tag, ""
        if server.version is None or server.version != update.tag:
            await deliver(server, update, self.deadlines)
        assert server.served is not None
        if was_lost:
            await check_logprobs_mode(server.client, server.served, update.sequences[0][:2])
            logger.info("vLLM server ready: %s at %s", server.client.url, update.tag)

    async def adopt(self, update: Update, ready: Sequence[tuple[str, str | None]]) -> None:
        """Take over what the first rank has synced: the URL and adapter of each server that is ready."""
        self.update = update
        adapters = dict(ready)
        for server in self.servers:
            is_ready = server.client.url in adapters
            server.version = update.tag if is_ready else None
            server.adapter = adapters.get(server.client.url)
            if is_ready and server.served is None:
                server.served = await read_served(server.client)

    async def generate(self, requests: Sequence[Request], *, seed: int, step: int) -> list[list[Completion]]:
        """Sample each request on some server; whatever happens to servers, none is lost and none sampled twice.

        Raises:
            EngineError: a request is refused, or no server is left and none comes back in time.
        """
        return await _Rollout(self, requests, seed=seed, step=step).run()

    async def revive(self) -> None:
        """Wait for a lost server to come back, and bring it to the current version."""
        assert self.update is not None
        await self.sync(self.update)

    def drop(self, server: Server, reason: str) -> None:
        """Stop giving work to a server until a sync restores it."""
        logger.warning("vLLM server lost: %s", reason)
        server.version, server.reason = None, reason


def _serve_loop(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


class _Rollout:
    """One call of `generate`: waiting groups, running ones by task, and those that are done."""

    def __init__(self, pool: ServerPool, requests: Sequence[Request], *, seed: int, step: int) -> None:
        self._pool, self._requests, self._seed, self._step = pool, requests, seed, step
        self._waiting = deque(range(len(requests)))
        self._running: dict[asyncio.Task[list[Completion]], tuple[Server, int, float]] = {}
        self._done: dict[int, tuple[Server, list[Completion]]] = {}
        self._watches: dict[asyncio.Task[None], Server] = {}
        self._seconds: list[float] = []

    async def run(self) -> list[list[Completion]]:
        try:
            while len(self._done) < len(self._requests):
                if not self._pool.ready:
                    await self._pool.revive()
                self._assign()
                waited = {*self._running, *self._watches}
                finished, _ = await asyncio.wait(waited, timeout=_TICK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                for task in finished:
                    self._collect(task)
                self._drop_slow()
                if len(self._done) == len(self._requests):
                    await self._confirm()
        finally:
            for task in (*self._running, *self._watches):
                task.cancel()
            await asyncio.gather(*self._running, *self._watches, return_exceptions=True)
        return [self._done[index][1] for index in range(len(self._requests))]

    def _load(self, server: Server) -> int:
        """Count the completions that run on a server."""
        return sum(self._requests[index].num_samples for owner, index, _ in self._running.values() if owner is server)

    def _assign(self) -> None:
        """Give waiting groups to the servers with the least work."""
        for server in self._pool.ready:
            if server not in self._watches.values():
                self._watches[asyncio.create_task(self._watch(server))] = server
        while self._waiting:
            server = min(self._pool.ready, key=self._load)
            load = self._load(server)
            if load and load + self._requests[self._waiting[0]].num_samples > _CAPACITY:
                return
            index = self._waiting.popleft()
            task = asyncio.create_task(self._sample(server, self._requests[index]))
            self._running[task] = (server, index, time.monotonic())

    async def _sample(self, server: Server, request: Request) -> list[Completion]:
        body = completion_request(request, model=server.model, seed=self._seed, step=self._step)
        try:
            # No deadline here: `_watch` ends a request whose server makes no tokens, however long it is.
            answer = await server.client.post("/v1/completions", body, deadline=86400.0)
            return parse_completions(answer, request, self._pool.tokenizer)
        except ServerRefused as error:
            if error.status == 404:
                raise ServerLost(f"{server.client.url} no longer has {server.model}: it was restarted.") from error
            raise

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
                self._drop(watched, str(error))
            elif error is not None:
                raise error
            return
        if task not in self._running:
            return  # of a server that was dropped a moment ago
        server, index, started = self._running.pop(task)
        error = task.exception()
        if error is None:
            self._done[index] = (server, task.result())
            self._seconds.append(time.monotonic() - started)
            return
        if not isinstance(error, ServerLost):
            raise error
        self._waiting.appendleft(index)
        self._drop(server, str(error))

    def _drop(self, server: Server, reason: str) -> None:
        """Drop a server; its running groups wait again, in their order."""
        self._pool.drop(server, reason)
        mine = [(task, index) for task, (owner, index, _) in self._running.items() if owner is server]
        for task, _ in mine:
            task.cancel()
            del self._running[task]
        self._waiting.extendleft(sorted((index for _, index in mine), reverse=True))
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
        slow = {owner for owner, _, started in self._running.values() if time.monotonic() - started > limit}
        for server in slow:
            # A replay is compared with a longer time, so that a long group is not passed around.
            self._seconds.append(limit)
            self._drop(server, f"{server.client.url} is slow: a group took more than {limit:.0f} s; others did it.")

    async def _confirm(self) -> None:
        """Replay the groups of servers that are no longer at the version: their answers may be of other weights."""
        assert self._pool.update is not None
        for server in {owner: None for owner, _ in self._done.values()}:
            try:
                await confirm(server, self._pool.update.tag)
            except (ServerLost, ServerRefused) as error:
                lost = sorted(index for index, (owner, _) in self._done.items() if owner is server)
                self._drop(server, str(error))
                for index in lost:
                    del self._done[index]
                self._waiting.extend(lost)
