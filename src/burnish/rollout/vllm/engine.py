"""Rollouts by stock vLLM servers: ids in, ids and log-probabilities out, and weights that are proven at every sync."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from burnish.errors import EngineError
from burnish.rollout.engine import OverlappingEngine, Request
from burnish.rollout.vllm.dispatch import Samples
from burnish.rollout.vllm.pool import ServerPool
from burnish.rollout.vllm.transfer import Transport, make_transfer
from burnish.rollout.vllm.updates import Update, Updates, check_fits, probe_metrics
from burnish.rollout.vllm.weights import WeightFolders, has_adapters, refuse_unsupported
from burnish.rollout.vllm.wire import LogprobsMode
from burnish.types import Completion

__all__ = ["VLLMServerEngine"]

T = TypeVar("T")


def _alone(work: Callable[[], T]) -> T:
    return work()


class VLLMServerEngine(OverlappingEngine):
    """Engine that samples from vLLM servers with the trainer's weights.

    `sync` writes the weights (or the LoRA adapters) to a folder in shared memory, or sends weights from GPU to GPU, has
    every server load them by vLLM's own routes, and compares its log-probabilities of fixed tokens with the trainer's.
    A server that dies, stops or is slow is dropped and its groups are replayed; it rejoins at a later sync.

    Args:
        model: the model being trained, bare or with LoRA adapters, prepared for scoring.
        tokenizer: the trainer's.
        pool: connected servers.
        bound: largest KL of the probe that rounding explains, in nats per token.
        weights_dir: folder that trainer and servers see; None for shared memory.
        transport: way of full weights, see `burnish.rollout.vllm.transfer`; adapters go by the folder.
        agreed: runs a function on the first rank and returns its result on all.
        gathered: concatenates the lists of all ranks.

    Raises:
        ConfigError: weights train that a server would ignore.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        pool: ServerPool,
        *,
        bound: float,
        weights_dir: str | None = None,
        transport: Transport = "folder",
        agreed: Callable[[Callable[[], T]], T] = _alone,
        gathered: Callable[[list[Any]], list[Any]] = list,
    ) -> None:
        refuse_unsupported(model)
        self._pool = pool
        self._agreed: Callable[[Callable[[], Any]], Any] = agreed
        self._gathered = gathered
        needs_folder = transport == "folder" or has_adapters(model)
        self._folders = WeightFolders(weights_dir) if needs_folder else None
        self._updates = Updates(model, tokenizer, bound=bound, folders=self._folders)
        pool.transfer = make_transfer(transport, model)
        self.version = 0
        self._finalizer = weakref.finalize(self, _close, pool, self._folders)

    def generate(self, requests: Sequence[Request], *, seed: int, step: int) -> list[list[Completion]]:
        """Sample completions of each request, in order, one request a group.

        Raises:
            EngineError: a request is unusable, or no server is left and none comes back in time.
        """
        begun = self.start(requests, seed=seed, step=step)
        try:
            return [samples.result() for samples in begun]
        except BaseException:
            self.cancel(begun)
            raise

    def start(self, requests: Sequence[Request], *, seed: int, step: int) -> list[Samples]:
        """Begin to sample the completions of each request; a sync in between changes the weights of later tokens.

        Raises:
            EngineError: a request is unusable.
        """
        if self._pool.update is None:
            raise EngineError("generate() before sync(): the servers do not have the trainer's weights yet.")
        lengths = (s.served.max_model_len for s in self._pool.ready if s.served is not None)
        longest = min((length for length in lengths if length), default=2**31)
        fix = "start it with `burnish serve MODEL --max-model-len {tokens}`"
        check_fits(requests, longest, limit="the server's", fix=fix)
        return self._pool.call(self._pool.submit(requests, seed=seed, step=step))

    def cancel(self, begun: Sequence[Samples]) -> None:
        """Give up what `start` has begun."""
        self._pool.call(self._pool.cancel(begun))

    def sync(self, version: int) -> Mapping[str, float]:
        """Deliver the trainer's weights to every server, and prove what each answers with.

        Returns:
            Metrics of the sync; none where the servers have this version.

        Raises:
            CheckFailed: a server samples from other weights.
            EngineError: no server took them in time.
        """
        self.version = version
        update, is_new = self._agreed(lambda: self._updates.next(version, longest=self._longest() or None))
        if is_new:
            self._end_running()
        ready, mode = self._agreed(lambda: self._deliver(update))
        self._pool.call(self._pool.adopt(update, ready, mode))
        if not is_new:
            return {}
        return {"sampling/servers": float(len(ready)), **probe_metrics(s.proof for s in self._pool.ready)}

    def close(self) -> None:
        """Unload adapters, close the connections, remove the weights."""
        self._finalizer()

    def _longest(self) -> int:
        return min((s.served.max_model_len or 0 for s in self._pool.servers if s.served is not None), default=0)

    def _end_running(self) -> None:
        """End the groups of all ranks that are running, keeping their tokens so far."""
        pool = self._pool
        # Each step waits for the one before on all ranks: a group must not start on a paused server, nor end after the
        # weights have changed.
        busy = set(self._gathered(list(pool.call(pool.hold()))))
        lost = self._agreed(lambda: pool.call(pool.end(busy)))
        pool.call(pool.drain(lost))
        self._gathered([])

    def _deliver(self, update: Update) -> tuple[list[tuple[str, str | None]], LogprobsMode | None]:
        """Deliver an update, or restore lost servers; return what is ready, and the log-probabilities it reports."""
        self._pool.call(self._pool.sync(update))
        return [(server.client.url, server.adapter) for server in self._pool.ready], self._pool.mode


def _close(pool: ServerPool, folders: WeightFolders | None) -> None:
    pool.close()
    if folders is not None:
        folders.close()
