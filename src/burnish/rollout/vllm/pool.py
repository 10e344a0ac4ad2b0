"""Servers that share the groups of a rollout: lost ones are dropped, their groups replayed, and they rejoin."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any, TypeVar

from burnish.errors import CheckFailed, ConfigError, EngineError
from burnish.rollout.engine import Request
from burnish.rollout.vllm.client import Deadlines, ServerClient, ServerLost, ServerRefused
from burnish.rollout.vllm.delivery import Server, deliver, has, prove
from burnish.rollout.vllm.dispatch import Dispatcher, Samples
from burnish.rollout.vllm.identity import check_tokenizer, read_logprobs_mode, read_served
from burnish.rollout.vllm.transfer import FolderTransfer, WeightTransfer
from burnish.rollout.vllm.updates import Update
from burnish.rollout.vllm.wire import LogprobsMode

__all__ = ["ServerPool"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class ServerPool:
    """Servers, and the loop that talks to them.

    Args:
        clients: URL of each server, and its token; None looks the token up.
        tokenizer: the trainer's.
        deadlines: see `Deadlines`.
        modes: log-probabilities that the run can use; all servers report the same.
    """

    def __init__(
        self,
        clients: Sequence[tuple[str, str | None]],
        tokenizer: Any,
        deadlines: Deadlines,
        modes: Collection[LogprobsMode] = ("processed",),
    ) -> None:
        self.deadlines, self.tokenizer = deadlines, tokenizer
        self._modes: Collection[LogprobsMode] = modes
        self.mode: LogprobsMode | None = None
        self.servers = [Server(ServerClient(url, token, deadlines)) for url, token in clients]
        self.update: Update | None = None
        self.transfer: WeightTransfer = FolderTransfer()
        self._dispatcher, self._lock = Dispatcher(self), asyncio.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_serve_loop, args=(self._loop,), name="burnish-vllm", daemon=True)
        self._thread.start()

    @classmethod
    def connected(
        cls, urls: Sequence[str], tokenizer: Any, timeout: float, modes: Collection[LogprobsMode] = ("processed",)
    ) -> ServerPool:
        """Connect to servers, waiting until one is up.

        Args:
            urls: one or more.
            tokenizer: the trainer's.
            timeout: longest wait in seconds.
            modes: log-probabilities that the run can use.

        Raises:
            ConfigError: a server has another tokenizer.
            EngineError: none is up in time.
        """
        pool = cls([(url, None) for url in urls], tokenizer, Deadlines(start=timeout), modes)
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
        """Give up all groups, close the connections and end the loop."""
        if not self._thread.is_alive():
            return

        async def close_all() -> None:
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            for server in self.servers:
                if server.adapter is not None and server.version is not None:
                    with contextlib.suppress(EngineError):
                        await server.client.tell("/v1/unload_lora_adapter", {"lora_name": server.adapter}, deadline=5.0)
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

    async def hold(self) -> set[str]:
        """Start no group until `adopt`; return the URLs of servers on which groups of this process run."""
        return self._dispatcher.hold()

    async def end(self, urls: Collection[str]) -> set[str]:
        """End what runs on servers, for any process; return the URLs of those that are lost meanwhile."""
        return await self._dispatcher.end(urls)

    async def drain(self, lost: Collection[str]) -> None:
        """Wait until no group of this process runs, giving up those on lost servers."""
        for server in self.servers:
            if server.client.url in lost and server.version is not None:
                self._dispatcher.drop(server, f"{server.client.url} was lost before its weights could change.")
        await self._dispatcher.drain()

    async def sync(self, update: Update) -> None:
        """Deliver an update to every server that answers, while no process has running groups.

        Raises:
            CheckFailed: a server samples from other weights.
            EngineError: no server took it in time.
        """
        async with self._lock:
            self.update = update
            await self._until_one(lambda server: self._restore(server, update))

    async def _until_one(self, work: Any) -> None:
        """Do a work on every server, and again on the lost ones until one is done; deadlines.start at most."""
        started = time.monotonic()
        while True:
            outcomes = await asyncio.gather(*(self._tried(server, work) for server in self.servers))
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

    async def _tried(
        self, server: Server, work: Callable[[Server], Coroutine[Any, Any, None]]
    ) -> ServerLost | ServerRefused | None:
        """Do a work on a server; return the failure that makes it unusable for now."""
        was_ready = server.version is not None
        try:
            await work(server)
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
        """Bring a server to the current version: what it says that it has is proven, anything else is delivered."""
        await self._identify(server)
        if server.version == update.tag:
            return
        was_lost = bool(server.reason)
        with contextlib.suppress(ServerLost, ServerRefused, CheckFailed):
            if await has(server, update, self.deadlines):
                await prove(server, update, self.deadlines)
                server.version, server.reason = update.tag, ""
        if server.version is None or server.version != update.tag:
            await deliver(server, update, self.transfer, self.deadlines)
        assert server.served is not None
        if was_lost:
            self._check_mode(server, await read_logprobs_mode(server.client, server.served, update.sequences[0][:2]))
            logger.info("vLLM server ready: %s at %s", server.client.url, update.tag)

    def _check_mode(self, server: Server, mode: LogprobsMode) -> None:
        url = server.client.url
        if mode == "raw" and mode not in self._modes:
            raise ConfigError(
                f"{url} reports log-probabilities before temperature and truncation, and this run needs those after: "
                "start it with --logprobs-mode processed_logprobs, as `burnish serve` does."
            )
        if mode not in self._modes:
            raise ConfigError(
                f"{url} reports log-probabilities after truncation, by which stale samples cannot be weighted: start "
                "it with `burnish serve MODEL --raw-logprobs`, or sample from all tokens (no top_p, top_k, min_p or "
                "repetition_penalty)."
            )
        if self.mode not in (None, mode):
            raise ConfigError(
                f"{url} reports {mode} log-probabilities and another server {self.mode} ones: start all of them with "
                "--raw-logprobs, or none."
            )
        self.mode = mode

    async def adopt(self, update: Update, ready: Sequence[tuple[str, str | None]], mode: LogprobsMode | None) -> None:
        """Start groups again with what the first rank has synced.

        Args:
            update: what was delivered.
            ready: URL and adapter of each server that is ready.
            mode: log-probabilities that the servers report.
        """
        self.update, self.mode = update, mode
        adapters = dict(ready)
        for server in self.servers:
            is_ready = server.client.url in adapters
            server.version = update.tag if is_ready else None
            server.adapter = adapters.get(server.client.url)
            if is_ready and server.served is None:
                server.served = await read_served(server.client)
        self._dispatcher.release()

    async def submit(self, requests: Sequence[Request], *, seed: int, step: int) -> list[Samples]:
        """Begin to sample; whatever happens to servers, no request is lost and none sampled twice.

        Returns:
            The completions of each request, or EngineError: it is refused, or no server is left and none comes back in
            time.
        """
        return self._dispatcher.submit(requests, seed=seed, step=step)

    async def cancel(self, given_up: Collection[Samples]) -> None:
        """Give up requests that were submitted."""
        self._dispatcher.cancel(given_up)

    async def revive(self) -> None:
        """Wait for a lost server to come back, and bring it to the current version."""
        async with self._lock:
            update = self.update
            assert update is not None
            await self._until_one(lambda server: self._restore(server, update))

    def drop(self, server: Server, reason: str) -> None:
        """Stop giving work to a server until a sync restores it."""
        logger.warning("vLLM server lost: %s", reason)
        server.version, server.reason = None, reason


def _serve_loop(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()
