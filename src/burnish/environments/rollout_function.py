"""TRL's `rollout_func`: a function of the user's that returns the completions of a rollout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

from burnish.data.tokens import decode_text
from burnish.errors import EngineError
from burnish.rollout.collect import generate
from burnish.rollout.engine import Engine, EngineOver, Request, SamplingParams
from burnish.types import Completion, Episode, StopReason

__all__ = ["RolloutFunctionEngine"]

_COLUMNS = ("prompt_ids", "completion_ids", "logprobs")


class RolloutFunctionEngine(EngineOver):
    """Engine that asks a function for the completions.

    Args:
        engine: the engine that the run would sample with, for `sample`.
        function: prompts of the data set, each once -> columns `prompt_ids`, `completion_ids` and `logprobs`, G rows
            for each prompt, in order; optionally `env_mask` (1 for sampled tokens) and `logprob_token_ids`. Other
            columns reach the reward functions.
        tokenizer: decodes texts.
        params: how the run samples.
    """

    def __init__(
        self,
        engine: Engine,
        function: Callable[[list[Any]], Mapping[str, Sequence[Any]]],
        tokenizer: Any,
        params: SamplingParams,
    ) -> None:
        self.engine = engine
        self._function, self._tokenizer, self._params = function, tokenizer, params
        self._key, self._calls = (0, 0), count()

    def generate(self, requests: Sequence[Request], *, seed: int, step: int) -> list[list[Completion]]:
        """Call the function with the prompts of this rank.

        Raises:
            EngineError: it returned something else.
        """
        self._key, self._calls = (seed, step), count()
        found = self._function([request.row["prompt"] for request in requests])
        sizes = [request.num_samples for request in requests]
        columns = {name: list(values) for name, values in found.items()}
        for name in _COLUMNS:
            if name not in columns:
                raise EngineError(f"rollout_func returned no {name!r} (it has: {', '.join(columns) or 'nothing'}).")
        for name, values in columns.items():
            if len(values) != sum(sizes):
                raise EngineError(
                    f"rollout_func returned {len(values)} {name} for {sum(sizes)} completions of {len(sizes)} prompts: "
                    "return num_generations rows for each prompt, in order."
                )
        rows = [{name: values[i] for name, values in columns.items()} for i in range(sum(sizes))]
        flat = iter([self._completion(row) for row in rows])
        completions = [[next(flat) for _ in range(size)] for size in sizes]
        for request, group in zip(requests, completions, strict=True):
            for completion in group:
                episode = completion.episode
                if episode is not None and episode.opening == list(request.prompt_ids):
                    episode.opening = None
        return completions

    def sample(self, prompt_ids: Sequence[Sequence[int]], num_samples: int = 1) -> list[list[Completion]]:
        """Sample completions of prompts with the run's engine and parameters: what the function may call."""
        calls = next(self._calls)
        requests = [
            Request(list(ids), num_samples, self._params, index=i, first_sample=calls << 20)
            for i, ids in enumerate(prompt_ids)
        ]
        return generate(self.engine, requests, seed=self._key[0], step=self._key[1])

    def _completion(self, row: Mapping[str, Any]) -> Completion:
        token_ids = [int(token) for token in row["completion_ids"]]
        given = list(row["logprobs"])
        listed = row.get("logprob_token_ids") or [None] * len(given)
        if len(given) != len(token_ids):
            raise EngineError(f"rollout_func returned {len(given)} logprobs for {len(token_ids)} tokens.")
        logprobs = [_logprob(*entry) for entry in zip(given, listed, token_ids, strict=True)]
        mask = row.get("env_mask")
        if mask is not None:
            logprobs = [value if kept else 0.0 for value, kept in zip(logprobs, mask, strict=True)]
        params = self._params
        is_whole = params.top_p == 1 and not params.top_k and not params.min_p and params.repetition_penalty == 1
        ended = bool(token_ids) and token_ids[-1] in params.eos_token_ids
        return Completion(
            token_ids,
            loss_mask=None if mask is None or all(mask) else [bool(kept) for kept in mask],
            text=decode_text(self._tokenizer, token_ids, params.eos_token_ids),
            stop_reason=StopReason.EOS if ended else StopReason.LENGTH,
            sampler_logprobs=logprobs,
            policy_logprobs=list(logprobs) if is_whole else None,
            episode=Episode(
                name="rollout_func",
                opening=[int(token) for token in row["prompt_ids"]],
                fields={name: v for name, v in row.items() if name not in (*_COLUMNS, "env_mask", "logprob_token_ids")},
            ),
        )


def _logprob(value: Any, listed: Any, token: int) -> float:
    """Return the log-probability of a token out of one number, or of those of the likeliest tokens."""
    if not isinstance(value, list | tuple):
        return float(value)
    if listed is None or token not in listed:
        return float(value[0])
    return float(value[list(listed).index(token)])
