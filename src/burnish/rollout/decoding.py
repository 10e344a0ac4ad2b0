"""Decoding shared by the in-process engines: running completions, token draws, checks and statistics."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from burnish.data.tokens import decode_text
from burnish.errors import ConfigError, EngineError
from burnish.model.positions import check_positions
from burnish.model.scoring import causal_lm, eval_mode
from burnish.model.self_test import without_router_logits
from burnish.model.tiled_head import HeadSpec
from burnish.rollout.engine import Request
from burnish.rollout.sampling import SamplingBatch, draw, stream_key, uniforms
from burnish.rollout.stop_strings import GrowingText, StopMatcher
from burnish.types import Completion, StopReason

__all__ = [
    "OnProgress",
    "RolloutStats",
    "Track",
    "Vocabulary",
    "check_bounds",
    "check_request_lengths",
    "draw_for",
    "sampling_mode",
]

_CHECK_TOKENS = 8
"""Tokens between two checks of whether the reward of a completion is settled."""

OnProgress = Callable[[int, int, int], None]
"""Called with (finished completions, all completions, tokens drawn so far)."""


@dataclass(slots=True)
class RolloutStats:
    """Statistics of one call of `generate`.

    Attributes:
        prompt_tokens: prompt tokens prefilled, each prompt once.
        decoded_tokens: tokens drawn.
        forwards: number of decode forwards.
        seconds: wall-clock time of the call.
        peak_cache_bytes: peak memory of keys and values.
        peak_rows: peak number of running completions.
        guessed_tokens: guesses computed.
        accepted_tokens: guesses that were drawn.
    """

    prompt_tokens: int = 0
    decoded_tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0
    peak_cache_bytes: int = 0
    peak_rows: int = 0
    guessed_tokens: int = 0
    accepted_tokens: int = 0


class Track:
    """One completion being sampled, with its random key and stop conditions.

    Args:
        request: the request it belongs to.
        sample: index of the completion within its group.
        tokenizer: decodes text.
        seed: keys its random numbers, with the step, the request's index and the sample.
        step: see `seed`.
    """

    __slots__ = ("_ends", "_eos", "_growing", "_matcher", "_stopped_text", "completion", "key", "request", "sample")

    def __init__(self, request: Request, sample: int, tokenizer: Any, *, seed: int, step: int) -> None:
        self.request = request
        self.sample = sample
        self.key: np.uint64 = stream_key(seed, step, request.index, request.first_sample + sample)
        self.completion = Completion([], sampler_logprobs=[], policy_logprobs=[])
        self._eos = frozenset(request.params.eos_token_ids)
        self._ends = self._eos | {tokenizer.pad_token_id}
        self._matcher = StopMatcher(tokenizer, request.params.stop) if request.params.stop else None
        self._stopped_text: str | None = None
        self._growing = GrowingText(tokenizer) if request.is_settled is not None else None

    @property
    def length(self) -> int:
        """Number of tokens drawn so far."""
        return len(self.completion.token_ids)

    @property
    def seen(self) -> list[int]:
        """Tokens of the prompt and of the completion so far."""
        return [*self.request.prompt_ids, *self.completion.token_ids]

    @property
    def last_token(self) -> int:
        """Token to feed next."""
        return self.completion.token_ids[-1]

    def push(self, token: int, sampler_logprob: float, policy_logprob: float) -> bool:
        """Add a drawn token; return True once the completion has ended."""
        done = self.completion
        assert done.sampler_logprobs is not None and done.policy_logprobs is not None
        done.token_ids.append(token)
        done.sampler_logprobs.append(sampler_logprob)
        done.policy_logprobs.append(policy_logprob)
        if token in self._eos:
            done.stop_reason = StopReason.EOS
            return True
        if self._matcher is not None:
            self._stopped_text = self._matcher.push(token)
            if self._stopped_text is not None:
                done.stop_reason = StopReason.STOP
                return True
        if len(done.token_ids) >= self.request.params.max_new_tokens:
            done.stop_reason = StopReason.LENGTH
            return True
        if self._growing is not None and len(done.token_ids) % _CHECK_TOKENS == 0 and self._is_settled(self._growing):
            done.stop_reason = StopReason.SETTLED
            return True
        return False

    def _is_settled(self, growing: GrowingText) -> bool:
        """Decode the tokens since the last check, and ask whether any continuation could change the reward."""
        rest = growing.push(*self.completion.token_ids[-_CHECK_TOKENS:])
        if self.completion.token_ids[-1] in self._ends:  # padding at the end is not part of the final text
            return False
        text = growing.text + rest
        # The beginning of a stop string would be cut from the text once the rest of it follows.
        stops = self.request.params.stop
        begun = max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        assert self.request.is_settled is not None
        return self.request.is_settled(text[: len(text) - begun])

    def finish(self, tokenizer: Any) -> Completion:
        """Decode the text and return the completion."""
        text = self._stopped_text
        if text is None:
            text = decode_text(tokenizer, self.completion.token_ids, self._ends)
        self.completion.text = text
        return self.completion


@contextmanager
def sampling_mode(model: nn.Module) -> Generator[None]:
    """Sample in evaluation mode, without autograd and router logits; restore each module's mode on exit.

    Raises:
        EngineError: a prompt-learning adapter is active; its virtual tokens are not part of the sampled model.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise EngineError(
            f"model = {type(model).__name__} with a prompt-learning adapter: its virtual tokens are outside the base "
            "model; use LoRA or another adapter of weights."
        )
    with eval_mode(model), without_router_logits(causal_lm(model)), torch.no_grad():
        yield


class Vocabulary:
    """Finder of head columns that are no token of the tokenizer, as in padded vocabularies.

    Args:
        tokenizer: defines the tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._unknown: dict[tuple[Any, ...], Tensor | None] = {}

    def unknown(self, logits: Tensor, tracks: Sequence[Track]) -> Tensor | None:
        """Return the [U] columns of logits [B, V] that must not be drawn, or None where all are tokens."""
        if not callable(getattr(self._tokenizer, "get_vocab", None)):
            return None
        ends = frozenset(token for track in tracks for token in track.request.params.eos_token_ids)
        key = (len(self._tokenizer), logits.shape[-1], logits.device, ends)
        if key not in self._unknown:
            known = torch.tensor(sorted({*self._tokenizer.get_vocab().values(), *ends}), device=logits.device)
            absent = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
            absent[known[known < logits.shape[-1]]] = False
            self._unknown = {key: absent.nonzero()[:, 0] if bool(absent.any()) and not bool(absent.all()) else None}
        return self._unknown[key]


def draw_for(
    logits: Tensor, tracks: Sequence[Track], spec: HeadSpec, vocabulary: Vocabulary, guesses: Sequence[list[int]] = ()
) -> list[bool]:
    """Draw the next tokens of each track from its rows of logits; return which tracks have ended.

    Args:
        logits: [B * W, V], the W rows of a track together: after its last token, and after each of its guesses.
        tracks: the B completions.
        spec: scale and softcap of the logits.
        vocabulary: finds columns that must not be drawn.
        guesses: [B] at most W - 1 guessed tokens each; a draw that differs from its guess is a track's last one. Empty
            for none.
    """
    width = len(logits) // len(tracks)
    keys = np.array([track.key for track in tracks], dtype=np.uint64).repeat(width)
    places = (np.array([track.length for track in tracks])[:, None] + np.arange(width)).reshape(-1)
    drawn = draw(
        logits,
        torch.from_numpy(uniforms(keys, places)).to(logits.device),
        SamplingBatch.of([track.request.params for track in tracks for _ in range(width)], logits.device),
        scale=spec.scale,
        softcap=spec.softcap,
        unknown=vocabulary.unknown(logits, tracks),
        seen=[track.seen for track in tracks] if any(t.request.params.repetition_penalty != 1 for t in tracks) else (),
    )
    columns = (drawn.token_ids.tolist(), drawn.sampler_logprobs.tolist(), drawn.policy_logprobs.tolist())
    tokens = list(zip(*columns, strict=True))
    parts = [tokens[start : start + width] for start in range(0, len(tokens), width)]
    return [
        _push(track, part, guesses[row] if guesses else [])
        for row, (track, part) in enumerate(zip(tracks, parts, strict=True))
    ]


def _push(track: Track, drawn: Sequence[tuple[int, float, float]], guess: Sequence[int]) -> bool:
    """Add drawn tokens up to the first that differs from its guess; return True once the completion has ended."""
    for place, token in enumerate(drawn):
        if track.push(*token):
            return True
        if place == len(guess) or token[0] != guess[place]:
            return False
    return False


def check_bounds(max_running: int, max_cache_tokens: int | None) -> None:
    """Raise ConfigError for a bound below 1."""
    for name, value in (("max_running", max_running), ("max_cache_tokens", max_cache_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} = {value!r}: use a positive integer.")


def check_request_lengths(requests: Sequence[Request], model: nn.Module) -> None:
    """Raise ModelError for a request that is longer than the model's positions."""
    longest = max((len(request.prompt_ids) + request.params.max_new_tokens for request in requests), default=0)
    check_positions(model, longest, "a prompt with its completion", "lower max_completion_length, or shorten prompts")
