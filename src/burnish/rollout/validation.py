"""Validation of what an engine is asked for, and of its completions before any other code relies on them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from burnish.errors import EngineError
from burnish.rollout.engine import Request
from burnish.types import Completion, StopReason

__all__ = ["check_completions", "check_requests"]

_ROUNDING_NATS = 1e-2
"""Tolerance above 0 for the rounded logarithm of a probability of 1."""

_LOGPROBS = ("sampler_logprobs", "policy_logprobs")


def check_requests(requests: Sequence[Request]) -> None:
    """Raise EngineError for a request with an empty prompt or without samples."""
    for index, request in enumerate(requests):
        if not len(request.prompt_ids):
            raise EngineError(f"requests[{index}].prompt_ids is empty: give at least one token (for example BOS).")
        if request.num_samples < 1:
            raise EngineError(f"requests[{index}].num_samples = {request.num_samples}: ask for at least one sample.")


def check_completions(
    requests: Sequence[Request],
    found: Sequence[Sequence[Completion]],
    *,
    engine: str = "the engine",
    vocab_size: int | None = None,
) -> None:
    """Validate completions against their requests.

    Unknown log-probabilities must be None in every completion of a call: NaN marks single unknown tokens, and would
    disable the check of sampler against trainer.

    Raises:
        EngineError: too few or too many completions, or one that breaks the contract of `Engine.generate`.
    """
    if len(found) != len(requests):
        raise EngineError(f"{engine} returned {len(found)} lists of completions for {len(requests)} prompts.")
    for index, (request, completions) in enumerate(zip(requests, found, strict=True)):
        if len(completions) != request.num_samples:
            raise EngineError(
                f"{engine}, prompt {index}: {len(completions)} completions instead of num_samples = "
                f"{request.num_samples}."
            )
        for number, completion in enumerate(completions):
            problem = next(_problems(completion, request, vocab_size), None)
            if problem is not None:
                raise EngineError(f"{engine}, prompt {index}, sample {number}: {problem}.")
    returned = [completion for completions in found for completion in completions]
    for name in _LOGPROBS:
        missing = sum(getattr(completion, name) is None for completion in returned)
        if 0 < missing < len(returned):
            raise EngineError(
                f"{engine}: {missing} of {len(returned)} completions have no {name}; fill it in all, or in none."
            )


def _problems(completion: Any, request: Request, vocab_size: int | None) -> Iterator[str]:
    params = request.params
    if not isinstance(completion, Completion):
        yield f"a {type(completion).__name__} instead of a burnish.types.Completion"
        return
    token_ids: Any = completion.token_ids
    if not isinstance(token_ids, list) or not token_ids:
        yield f"token_ids = {token_ids!r:.60}: a list of at least one token is expected, the end-of-sequence token too"
        return
    bad: list[Any] = [
        i for i in token_ids if type(i) is not int or i < 0 or (vocab_size is not None and i >= vocab_size)
    ]
    if bad:
        below = "" if vocab_size is None else f" below {vocab_size}, the size of the model's vocabulary,"
        yield f"token id {bad[0]!r} where integers from 0{below} are expected"
    length = len(token_ids)
    if length > params.max_new_tokens:
        yield f"{length} tokens, above max_new_tokens = {params.max_new_tokens}"
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
    reason, last = completion.stop_reason, completion.token_ids[-1]
    ends = not params.eos_token_ids or last in params.eos_token_ids
    if not isinstance(reason, StopReason):
        yield f"stop_reason = {reason!r}: use one of {', '.join(StopReason)}"
    elif reason is StopReason.EOS and not ends:
        yield f"stop_reason = 'eos', but the last token {last} is not one of {params.eos_token_ids}"
    elif reason not in (StopReason.EOS, StopReason.BUDGET) and params.eos_token_ids and ends:
        yield f"stop_reason = {reason.value!r}, but the last token {last} is an end-of-sequence token: use 'eos'"
    elif reason is StopReason.STOP and not params.stop:
        yield "stop_reason = 'stop', but the request has no stop strings"
    elif reason is StopReason.SETTLED and request.is_settled is None:
        yield "stop_reason = 'settled', but the request has no is_settled"
