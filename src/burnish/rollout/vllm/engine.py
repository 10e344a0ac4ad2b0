"""Rollouts by stock vLLM servers: ids in, ids and log-probabilities out, and weights that are proven at every sync."""

from __future__ import annotations

import logging
import secrets
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from burnish.errors import ConfigError, EngineError
from burnish.model.adapters import without_adapters
from burnish.rollout.engine import OverlappingEngine, Request
from burnish.rollout.validation import check_requests
from burnish.rollout.vllm.delivery import Update
from burnish.rollout.vllm.dispatch import Samples
from burnish.rollout.vllm.pool import ServerPool
from burnish.rollout.vllm.probe import probe_sequences, score_probe
from burnish.rollout.vllm.weights import WeightFolders, has_adapters, refuse_unsupported
from burnish.types import Completion

__all__ = ["VLLMServerEngine"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


def _alone(work: Callable[[], T]) -> T:
    return work()


class VLLMServerEngine(OverlappingEngine):
    """Engine that samples from vLLM servers with the trainer's weights.

    `sync` writes the weights (or the LoRA adapters) to a folder in shared memory, has every server load them by vLLM's
    own routes, and compares its log-probabilities of fixed tokens with the trainer's. A server that dies, stops or is
    slow is dropped and its groups are replayed; it rejoins at a later sync.

    Args:
        model: the model being trained, bare or with LoRA adapters, prepared for scoring.
        tokenizer: the trainer's.
        pool: connected servers.
        bound: largest KL of the probe that rounding explains, in nats per token.
        weights_dir: folder that trainer and servers see; None for shared memory.
        agreed: runs a function on the first rank and returns its result on all.

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
        agreed: Callable[[Callable[[], T]], T] = _alone,
    ) -> None:
        refuse_unsupported(model)
        self._model, self._tokenizer, self._pool, self._bound = model, tokenizer, pool, bound
        self._agreed: Callable[[Callable[[], Any]], Any] = agreed
        self._folders = WeightFolders(weights_dir)
        self._sequences: list[list[int]] = []
        self._run, self._syncs = secrets.token_hex(4), 0
        self._delivered = -1
        """Version of the newest update."""
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
        self._check(requests)
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
        update, ready, is_new = self._agreed(lambda: self._deliver(version))
        self._pool.call(self._pool.adopt(update, ready))
        if not is_new:
            return {}
        agreements = [s.agreement for s in self._pool.ready if s.agreement is not None]
        metrics = {"sampling/servers": float(len(ready))}
        if agreements:
            metrics["sampling/probe/difference"] = max(agreement.difference for agreement in agreements)
            metrics["sampling/probe/moved"] = max(agreement.moved for agreement in agreements)
        return metrics

    def close(self) -> None:
        """Unload adapters, close the connections, remove the weights."""
        self._finalizer()

    def _deliver(self, version: int) -> tuple[Update, list[tuple[str, str | None]], bool]:
        """Deliver an update if it is a new one, or restore lost servers."""
        pool = self._pool
        if not self._sequences:
            longest = min((s.served.max_model_len or 0 for s in pool.servers if s.served is not None), default=0)
            self._sequences = probe_sequences(self._tokenizer, self._model, longest=longest or None)
        expected = score_probe(self._model, self._sequences)
        update = pool.update
        # A step may change weights of which the probe's tokens show nothing, such as rows of the embeddings.
        is_new = update is None or version != self._delivered or update.expected != expected
        if update is None or is_new:
            self._syncs, self._delivered = self._syncs + 1, version
            tag = f"burnish-{self._run}-{version}-{self._syncs}"
            update = Update(
                tag=tag,
                version=version,
                folder=str(self._folders.write(self._model, tag)),
                is_adapter=has_adapters(self._model),
                sequences=self._sequences,
                expected=expected,
                base=self._base(),
                bound=self._bound,
            )
        pool.call(pool.sync(update))
        return update, [(server.client.url, server.adapter) for server in pool.ready], is_new

    def _base(self) -> list[float]:
        """Return the probe's log-probabilities without adapters, to name an adapter that never arrived."""
        if not has_adapters(self._model):
            return []
        with without_adapters(self._model):
            return score_probe(self._model, self._sequences)

    def _check(self, requests: Sequence[Request]) -> None:
        longest = min(
            (s.served.max_model_len or 2**31 for s in self._pool.ready if s.served is not None), default=2**31
        )
        check_requests(requests)
        for request in requests:
            tokens = len(request.prompt_ids) + request.params.max_new_tokens
            if tokens > longest:
                raise ConfigError(
                    f"max_completion_length = {request.params.max_new_tokens}: with a prompt of "
                    f"{len(request.prompt_ids)} tokens it exceeds the server's {longest}; start it with "
                    f"`burnish serve MODEL --max-model-len {tokens}`, or lower max_completion_length."
                )


def _close(pool: ServerPool, folders: WeightFolders) -> None:
    pool.close()
    folders.close()
