"""Rollouts by vLLM in the trainer's process: the same requests, answers and proof as with servers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from burnish.errors import CheckFailed, EngineError
from burnish.rollout.engine import Engine, Request
from burnish.rollout.vllm.embedded import EmbeddedLLM
from burnish.rollout.vllm.updates import Proof, Update, Updates, check_fits, probe_metrics
from burnish.rollout.vllm.weights import WeightFolders, checkpoint_weights, has_adapters, refuse_unsupported
from burnish.rollout.vllm.wire import PROBE_FIELDS, assemble_group, parse_pieces, parse_prompt_logprobs, sampling_fields
from burnish.types import Completion

__all__ = ["VLLMColocatedEngine"]


class VLLMColocatedEngine(Engine):
    """Engine that samples from vLLM in this process with the trainer's weights.

    `sync` hands vLLM the trainer's tensors (or its LoRA adapters in a folder, on a base that it got so) and compares
    its log-probabilities of fixed tokens with the trainer's. `sleep` frees the memory that training needs.

    Args:
        model: the model being trained, bare or with LoRA adapters, prepared for scoring.
        tokenizer: the trainer's.
        llm: vLLM, started for this model; closed with the engine.
        bound: largest KL of the probe that rounding explains, in nats per token.
        weights_dir: folder for adapters; None for shared memory.
        rank: number of this process among those that train together.
        gathered: concatenates the lists of all ranks, in their order.

    Raises:
        ConfigError: weights train that vLLM would ignore.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        llm: EmbeddedLLM,
        *,
        bound: float,
        weights_dir: str | None = None,
        rank: int = 0,
        gathered: Callable[[list[Any]], list[Any]] = list,
    ) -> None:
        refuse_unsupported(model)
        self._model, self._tokenizer, self._llm = model, tokenizer, llm
        self._rank, self._gathered = rank, gathered
        self._folders = WeightFolders(weights_dir) if has_adapters(model) else None
        self._updates = Updates(model, tokenizer, bound=bound, folders=self._folders)
        self._proof = Proof()
        self._proven: Update | None = None
        """Update that vLLM samples from."""
        self.version = 0

    def generate(self, requests: Sequence[Request], *, seed: int, step: int) -> list[list[Completion]]:
        """Sample completions of each request, in order, one prompt of vLLM's a group.

        Raises:
            EngineError: a request is unusable.
            ConfigError: a completion does not fit behind its prompt.
            CheckFailed: after sleeping, vLLM does not sample from the weights of the last `sync`.
        """
        if self._updates.newest is None:
            raise EngineError("generate() before sync(): vLLM does not have the trainer's weights yet.")
        if self._proven is None:
            self._deliver(self._updates.newest)
        shared, mine = self._with_group(requests)
        fix = "set vllm_max_model_length to {tokens}, or more"
        check_fits(shared, self._llm.max_model_length, limit="vLLM's", fix=fix)
        asked = [(request.prompt_ids, sampling_fields(request, seed=seed, step=step)) for request in shared]
        found: list[list[Completion]] = []
        for answer, (_, fields), request in zip(self._llm.answer(asked)[mine], asked[mine], requests, strict=True):
            pieces = [[piece] for piece in parse_pieces(answer, fields["n"], self.version)]
            found.append(assemble_group(pieces, request, self._tokenizer))
            if request.on_done is not None:
                request.on_done(found[-1])
        return found

    def sync(self, version: int) -> Mapping[str, float]:
        """Deliver the trainer's weights and prove what vLLM answers with; every rank must call it.

        Returns:
            Metrics of the sync; none where vLLM has this version.

        Raises:
            CheckFailed: vLLM of any rank samples from other weights.
        """
        self.version = version
        update, is_new = self._updates.next(
            version, longest=self._llm.max_model_length, agreed=lambda is_new: any(self._gathered([is_new]))
        )
        if not is_new and self._proven is update:
            return {}
        self._deliver(update)
        return probe_metrics([self._proof])

    def sleep(self) -> None:
        """Free the memory of vLLM's weights and cache, with `vllm_enable_sleep_mode` on a GPU."""
        self._llm.sleep()
        if not self._llm.is_loaded:
            self._proven = None

    def close(self) -> None:
        """Stop vLLM, and remove the adapters' folders."""
        self._llm.close()
        if self._folders is not None:
            self._folders.close()

    def _with_group(self, requests: Sequence[Request]) -> tuple[list[Request], slice]:
        """Return the requests of all ranks that hold one copy of the weights, and the place of this rank's."""
        size = self._llm.options.tensor_parallel_size
        if size == 1:
            return list(requests), slice(None)
        first = self._rank // size * size
        # A callback cannot be sent to other ranks.
        lists = self._gathered([[replace(request, on_done=None) for request in requests]])[first : first + size]
        start = sum(len(one) for one in lists[: self._rank - first])
        return [request for one in lists for request in one], slice(start, start + len(requests))

    def _deliver(self, update: Update) -> None:
        """Hand over weights or adapters, and prove them on every rank."""
        self._proven = None
        if not update.is_adapter or not self._llm.is_loaded:
            self._llm.load(checkpoint_weights(self._model))
        if update.is_adapter:
            self._llm.load_adapter(update.tag, update.folder)
        observed: list[float] = []
        for tokens in update.sequences:
            # One at a time, as from servers: with adapters vLLM 0.32 cannot score several prompts in one forward.
            [answer] = self._llm.answer([(tokens, PROBE_FIELDS)])
            observed += parse_prompt_logprobs(answer, tokens)
        problems = self._gathered([self._proof.problem(update, observed)])
        if any(problems):
            where = [
                f" of rank {rank}" if len(problems) > 1 else "" for rank, problem in enumerate(problems) if problem
            ]
            raise CheckFailed(
                f"vLLM in the trainer's process{where[0]} {next(filter(None, problems))} Sample from a server, whose "
                'log shows what it loaded (vllm_mode = "server"), or with the native engine (use_vllm = false); the '
                "run stops before it samples from the wrong weights."
            )
        self._proven = update
