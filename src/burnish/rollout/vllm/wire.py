"""Requests to vLLM and its answers: sampling parameters to JSON, JSON to completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from burnish.data.tokens import decode_text
from burnish.errors import EngineError
from burnish.rollout.engine import Request, SamplingParams
from burnish.rollout.sampling import stream_key
from burnish.rollout.stop_strings import StopMatcher
from burnish.types import Completion, StopReason

__all__ = [
    "PROBE_FIELDS",
    "LogprobsMode",
    "Piece",
    "assemble",
    "assemble_group",
    "completion_request",
    "continuation",
    "parse_pieces",
    "parse_prompt_logprobs",
    "probe_request",
    "samples_policy",
    "sampling_fields",
]

PROBE_FIELDS: dict[str, Any] = {
    "max_tokens": 1,
    "temperature": 0.0,
    "prompt_logprobs": 0,
    "logprobs": 0,
    "ignore_eos": True,
}
"""Sampling parameters under which vLLM scores a prompt at temperature 1."""

_SEED_BITS = 62
"""Seeds of vLLM are signed 64-bit integers, and sample k of a request takes the request's seed + k."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that one request sampled for one completion: all of them, or those up to a change of the weights.

    Attributes:
        token_ids: the tokens; none where the request was ended before the first.
        logprobs: log-probability of each under the distribution it was sampled from.
        finish: "stop", "length", or "abort" where the server was paused.
        version: version of the weights.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish: str
    version: int


LogprobsMode = Literal["processed", "raw"]
"""Which log-probability a server returns of a token: that of the distribution sampled from, or that of the model at
temperature 1, before truncation and penalty."""


def samples_policy(params: SamplingParams) -> bool:
    """Return whether the sampling distribution is the policy's at that temperature: no truncation, no penalty."""
    is_whole = params.top_p == 1 and params.top_k == 0 and params.min_p == 0
    return params.repetition_penalty == 1 and (is_whole or params.temperature == 0)


def sampling_fields(request: Request, *, seed: int, step: int, sampled: int = 0) -> dict[str, Any]:
    """Map a request to vLLM's sampling parameters, which `/v1/completions` and `vllm.SamplingParams` both take.

    Args:
        request: prompt and sampling parameters.
        seed: seed of the run.
        step: round of sampling; sample k is keyed by (seed, step, index) and k.
        sampled: tokens that a continuation follows; part of the key.
    """
    params = request.params
    key = int(stream_key(seed, step, request.index, sampled)) >> (64 - _SEED_BITS)
    return {
        # vLLM refuses several greedy samples of a prompt, which would all be equal.
        "n": 1 if params.temperature == 0 else request.num_samples,
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": key + request.first_sample,
        "stop": list(params.stop),
        "stop_token_ids": list(params.eos_token_ids),
        # Ends are those of the request: vLLM's own list may differ.
        "ignore_eos": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "logprobs": 0,
    }


def completion_request(request: Request, *, model: str, seed: int, step: int, sampled: int = 0) -> dict[str, Any]:
    """Build the body of `/v1/completions` for one group: token ids in, n = G samples out.

    Args:
        request: prompt and sampling parameters.
        model: name of the served model or adapter.
        seed: as in `sampling_fields`.
        step: as in `sampling_fields`.
        sampled: as in `sampling_fields`.
    """
    return {
        "model": model,
        "prompt": list(request.prompt_ids),
        **sampling_fields(request, seed=seed, step=step, sampled=sampled),
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "add_special_tokens": False,
        "stream": False,
    }


def continuation(request: Request, sample: int, token_ids: Sequence[int]) -> Request:
    """Return the request for the rest of a sample that was ended after `token_ids`."""
    return replace(
        request,
        prompt_ids=[*request.prompt_ids, *token_ids],
        num_samples=1,
        params=replace(request.params, max_new_tokens=request.params.max_new_tokens - len(token_ids)),
        first_sample=request.first_sample + sample,
    )


def probe_request(tokens: Sequence[int], *, model: str) -> dict[str, Any]:
    """Build the body of `/v1/completions` that scores tokens at temperature 1."""
    return {
        "model": model,
        "prompt": list(tokens),
        **PROBE_FIELDS,
        "return_token_ids": True,
        "add_special_tokens": False,
        "stream": False,
    }


def parse_pieces(answer: Any, wanted: int, version: int) -> list[Piece]:
    """Read the samples from the answer to `completion_request`.

    Args:
        answer: decoded JSON.
        wanted: n of the request.
        version: version of the weights that the server had.

    Raises:
        EngineError: the answer breaks the contract: a choice is missing, or without ids or log-probabilities.
    """
    choices = sorted(_choices(answer), key=lambda choice: int(choice.get("index", 0)))
    if [choice.get("index") for choice in choices] != list(range(wanted)):
        raise EngineError(f"{len(choices)} choices instead of n = {wanted}.")
    return [_piece(choice, version) for choice in choices]


def assemble_group(
    pieces: Sequence[Sequence[Piece]], request: Request, tokenizer: Any, mode: LogprobsMode = "processed"
) -> list[Completion]:
    """Join the pieces of each sample of a request, or of the one that stands for all greedy ones.

    Returns:
        G completions; see `assemble`.
    """
    return [assemble(one, request, tokenizer, mode) for one in [*pieces] * (request.num_samples // len(pieces))]


def assemble(pieces: Sequence[Piece], request: Request, tokenizer: Any, mode: LogprobsMode = "processed") -> Completion:
    """Join the pieces of a completion, the last of which is not aborted.

    Returns:
        A completion with the stream `policy_version`. Under truncation or a penalty a server tells either
        `policy_logprobs` or `sampler_logprobs`, as its mode says, and the others are None.

    Raises:
        EngineError: it was cut short, or stopped at something that the request did not ask for.
    """
    params = request.params
    if pieces[-1].finish == "abort":
        raise EngineError("a completion ended with finish_reason = 'abort'.")
    ids = [token for piece in pieces for token in piece.token_ids]
    # A server looks for stop strings in what one request samples; one may span two pieces.
    length = _stop_length(ids, params.stop, tokenizer) if len(pieces) > 1 else None
    ids = ids[:length]
    ends = frozenset(params.eos_token_ids)
    if length is not None:
        reason = StopReason.STOP
    elif ids[-1] in ends:
        reason = StopReason.EOS
    elif pieces[-1].finish == "length":
        reason = StopReason.LENGTH
        if len(ids) < params.max_new_tokens:
            raise EngineError(
                f"a completion was cut at {len(ids)} of {params.max_new_tokens} tokens: raise --max-model-len of the "
                "server, and start it with --generation-config vllm, so that no default of the model limits it."
            )
    else:
        reason = StopReason.STOP
    sampled = [value for piece in pieces for value in piece.logprobs][:length]
    versions = [float(piece.version) for piece in pieces for _ in piece.token_ids][:length]
    return Completion(
        ids,
        text=_text(ids, params, ends | {tokenizer.pad_token_id}, tokenizer, is_stopped=reason is StopReason.STOP),
        stop_reason=reason,
        sampler_logprobs=sampled if mode == "processed" or samples_policy(params) else None,
        policy_logprobs=list(sampled) if mode == "raw" or samples_policy(params) else None,
        token={"policy_version": versions},
    )


def _stop_length(ids: Sequence[int], stop: Sequence[str], tokenizer: Any) -> int | None:
    """Return the number of tokens up to the end of the first stop string; None without one."""
    if not stop:
        return None
    matcher = StopMatcher(tokenizer, stop)
    return next((number for number, token in enumerate(ids, 1) if matcher.push(token) is not None), None)


def parse_prompt_logprobs(answer: Any, tokens: Sequence[int]) -> list[float]:
    """Read the log-probabilities of all tokens but the first from the answer to `probe_request`.

    Raises:
        EngineError: they are missing, or of other tokens.
    """
    rows: Any = _choices(answer)[0].get("prompt_logprobs") if _choices(answer) else None
    if not isinstance(rows, list) or len(cast("list[Any]", rows)) != len(tokens):
        raise EngineError("the answer has no prompt_logprobs of the probe's tokens.")
    found: list[float] = []
    for token, row in zip(tokens[1:], cast("list[Any]", rows)[1:], strict=True):
        entry = row.get(str(token)) if isinstance(row, dict) else None
        if not isinstance(entry, dict) or not isinstance(entry.get("logprob"), int | float):
            raise EngineError(f"the answer has no log-probability of the probe's token {token}.")
        found.append(float(entry["logprob"]))
    return found


def _choices(answer: Any) -> list[dict[str, Any]]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in cast("list[Any]", choices)):
        raise EngineError(f"an answer without choices: {answer!r:.200}.")
    return cast("list[dict[str, Any]]", choices)


def _piece(choice: dict[str, Any], version: int) -> Piece:
    token_ids = choice.get("token_ids")
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
    finish = choice.get("finish_reason")
    if finish not in ("stop", "length", "abort"):
        raise EngineError(f"a completion ended with finish_reason = {finish!r}.")
    if finish == "abort" and not token_ids:
        return Piece([], [], finish, version)
    if not isinstance(token_ids, list) or not token_ids:
        raise EngineError("a completion without token_ids: the server must support return_token_ids (vLLM 0.11).")
    ids = cast("list[int]", token_ids)
    values = cast("list[Any]", logprobs) if isinstance(logprobs, list) else []
    if len(values) != len(ids) or not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise EngineError(f"{len(ids)} tokens with {len(values)} log-probabilities: one finite number each is needed.")
    return Piece(ids, [float(value) for value in values], finish, version)


def _text(ids: Sequence[int], params: SamplingParams, ends: frozenset[int], tokenizer: Any, *, is_stopped: bool) -> str:
    if not is_stopped:
        return decode_text(tokenizer, ids, ends)
    text = decode_text(tokenizer, ids)
    found = [place for stop in params.stop if (place := text.find(stop)) >= 0]
    if not found:
        raise EngineError(
            f"a completion ended without an end-of-sequence token or any of the stop strings {list(params.stop)}: the "
            "server decodes with another tokenizer, or stops at tokens of its own."
        )
    return text[: min(found)]
