"""What an engine returned, checked before anything believes it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from burnish.errors import EngineError
from burnish.rollout.engine import Engine, Request, SamplingParams
from burnish.types import Completion, StopReason

__all__ = ["check_completions", "generate"]

_ROUNDING_NATS = 1e-2
"""How far above 0 rounding may lift the logarithm of a probability of 1."""

_LOGPROBS = ("sampler_logprobs", "policy_logprobs")


def generate(
    engine: Engine, requests: Sequence[Request], *, seed: int, step: int, vocab_size: int | None = None
) -> list[list[Completion]]:
    """Sample, and check what came back.

    Args:
        engine: samples.
        requests: what is asked for.
        seed: seed of the run.
        step: training step, or round of sampling.
        vocab_size: tokens that the trained model has; None where no model reads the tokens.

    Raises:
        EngineError: the engine broke its contract.
    """
    found = engine.generate(requests, seed=seed, step=step)
    check_completions(requests, found, engine=type(engine).__name__, vocab_size=vocab_size)
    return found


def check_completions(
    requests: Sequence[Request],
    found: Sequence[Sequence[Completion]],
    *,
    engine: str = "the engine",
    vocab_size: int | None = None,
) -> None:
    """Compare completions with the requests that asked for them.

    A log-probability that is unknown is None for all completions of a call: a NaN would pass for a token that nothing
    is known of, and switch off the check of sampler against trainer.

    Raises:
        EngineError: too few or too many completions, or one that breaks the contract of `Engine.generate`.
    """
    if len(found) != len(requests):
        raise EngineError(f"{engine} returned {len(found)} lists of completions for {len(requests)} prompts.")
    for place, (request, completions) in enumerate(zip(requests, found, strict=True)):
        if len(completions) != request.num_samples:
            raise EngineError(
                f"{engine}, prompt {place}: {len(completions)} completions instead of num_samples = "
                f"{request.num_samples}."
            )
        for number, completion in enumerate(completions):
            problem = next(_problems(completion, request.params, vocab_size), None)
            if problem is not None:
                raise EngineError(f"{engine}, prompt {place}, sample {number}: {problem}.")
    _check_all_or_none([c for completions in found for c in completions], engine)


def _check_all_or_none(completions: Sequence[Completion], engine: str) -> None:
    for name in _LOGPROBS:
        missing = sum(getattr(c, name) is None for c in completions)
        if 0 < missing < len(completions):
            raise EngineError(
                f"{engine}: {missing} of {len(completions)} completions have no {name}; fill it in all, or in none."
            )


def _problems(completion: Any, params: SamplingParams, vocab_size: int | None) -> Iterator[str]:
    if not isinstance(completion, Completion):
        yield f"a {type(completion).__name__} instead of a burnish.types.Completion"
        return
    yield from _token_problems(completion.token_ids, params, vocab_size)
    length = len(completion.token_ids)
    parts = {name: getattr(completion, name) for name in (*_LOGPROBS, "loss_mask")} | completion.token
    for name, values in parts.items():
        if values is not None and len(values) != length:
            yield f"{len(values)} {name} for {length} tokens"
    for name in _LOGPROBS:
        for value in getattr(completion, name) or ():
            if not (math.isfinite(value) and value <= _ROUNDING_NATS):
                yield (
                    f"{name} holds {value}, which is not the logarithm of a probability; if the engine is right, the "
                    "model's logits overflowed: lower learning_rate, or resume from an earlier checkpoint"
                )
    if not isinstance(completion.text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        yield f"text is a {type(completion.text).__name__}"
    yield from _ending_problems(completion, params)


def _token_problems(token_ids: Any, params: SamplingParams, vocab_size: int | None) -> Iterator[str]:
    if not isinstance(token_ids, list) or not token_ids:
        yield f"token_ids = {token_ids!r:.60}: a list of at least one token is expected, the end-of-sequence token too"
        return
    bad: list[Any] = [
        i for i in token_ids if type(i) is not int or i < 0 or (vocab_size is not None and i >= vocab_size)
    ]
    if bad:
        below = "" if vocab_size is None else f" below {vocab_size}, the size of the model's vocabulary,"
        yield f"token id {bad[0]!r} where integers from 0{below} are expected"
    if len(token_ids) > params.max_new_tokens:
        yield f"{len(token_ids)} tokens, above max_new_tokens = {params.max_new_tokens}"


def _ending_problems(completion: Completion, params: SamplingParams) -> Iterator[str]:
    reason, last = completion.stop_reason, completion.token_ids[-1]
    ends = not params.eos_token_ids or last in params.eos_token_ids
    if not isinstance(reason, StopReason):
        yield f"stop_reason = {reason!r}: use one of {', '.join(StopReason)}"
    elif reason is StopReason.EOS and not ends:
        yield f"stop_reason = 'eos', but the last token {last} is none of {params.eos_token_ids}"
    elif reason is not StopReason.EOS and params.eos_token_ids and ends:
        yield f"stop_reason = {reason.value!r}, but the last token {last} ends a completion: use 'eos'"
    elif reason is StopReason.STOP and not params.stop:
        yield "stop_reason = 'stop', but no stop strings were asked for"
