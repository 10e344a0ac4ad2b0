"""Drawing tokens: counter-based uniforms, truncation, and the inverse of a cumulative distribution.

Every random number is a pure function of (seed, step, request index, sample, token position), so a completion does not
depend on what it was batched with, on the order of requests or on which process sampled it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from burnish.rollout.engine import SamplingParams

__all__ = ["DrawnTokens", "SamplingBatch", "draw", "stream_key", "uniforms"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_BLOCK = 256
"""Tokens summed together before the cumulative sum: one fp32 pass over the vocabulary, then fp64 on the few blocks."""
_TOP = 512
"""Most likely tokens looked at before a whole row is sorted for top-p."""
_ROWS = 16
"""Rows drawn together: their fp32 logits stay near the cache and the peak of memory stays small."""


def _mix(value: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, a bijection of 64 bits (Steele, Lea and Flood 2014)."""
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


def stream_key(seed: int, step: int, index: int, sample: int) -> np.uint64:
    """The key of one completion's random numbers.

    k_0 = mix(golden), k_{i+1} = mix(k_i xor mix(word_i + golden)) over the words (seed, step, index, sample).

    Args:
        seed: seed of the run; any integer, taken modulo 2^64, as are the others.
        step: training step, or any number that separates two calls.
        index: identity of the prompt in its source.
        sample: number of the completion within its group.

    Returns:
        64 bits.
    """
    key = _mix(np.array([_GOLDEN]))
    for word in (seed, step, index, sample):
        key = _mix(key ^ _mix(np.array([word & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64) + _GOLDEN))
    return np.uint64(key[0])


def uniforms(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number per token: u = floor(mix(key + (position + 1) golden) / 2^11) / 2^53, in [0, 1).

    Args:
        keys: [B] from :func:`stream_key`.
        positions: [B] place of the token in its completion, from 0.

    Returns:
        [B] float64.
    """
    counter = (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    return (_mix(keys.astype(np.uint64) + counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The sampling parameters of B rows, as tensors.

    Args:
        temperature: [B] fp32; 0 means greedy.
        top_k: [B] int64; 0 keeps all.
        top_p: [B] fp32; 1 keeps all.
        min_p: [B] fp32; 0 keeps all.
        repetition_penalty: [B] fp32; 1 for none.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    repetition_penalty: torch.Tensor

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device | str = "cpu") -> SamplingBatch:
        """The rows' parameters, in order."""
        return cls(
            temperature=torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device),
            top_k=torch.tensor([p.top_k for p in params], dtype=torch.int64, device=device),
            top_p=torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device),
            min_p=torch.tensor([p.min_p for p in params], dtype=torch.float32, device=device),
            repetition_penalty=torch.tensor([p.repetition_penalty for p in params], dtype=torch.float32, device=device),
        )

    def rows(self, start: int, stop: int) -> SamplingBatch:
        """Rows start .. stop - 1."""
        part = slice(start, stop)
        fields = (self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        return SamplingBatch(*(field[part] for field in fields))


@dataclass(frozen=True, slots=True)
class DrawnTokens:
    """B drawn tokens.

    Args:
        token_ids: [B] int64.
        sampler_logprobs: [B] fp32 nats under the distribution drawn from: after penalty, temperature and truncation.
        policy_logprobs: [B] fp32 nats after temperature (1 where greedy), before penalty and truncation.
    """

    token_ids: torch.Tensor
    sampler_logprobs: torch.Tensor
    policy_logprobs: torch.Tensor


def draw(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    params: SamplingBatch,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    unknown: torch.Tensor | None = None,
    seen: Sequence[Sequence[int]] = (),
) -> DrawnTokens:
    """Draw one token per row by the inverse of the cumulative distribution, in vocabulary order.

    z = cap tanh(scale logits / cap), penalised at tokens seen before, p = softmax(z / temperature), kept(p) by top-k,
    then top-p of what top-k kept,
    then min-p (1904.09751, 2407.01082); the token is the first whose cumulative kept probability exceeds u. Tokens
    tied with the last kept one are kept too, so the result does not depend on a sort's order. A token of probability
    zero is never drawn, nor is one of `unknown`: the truncations see the others alone. Temperature 0 takes the first of
    the most likely tokens; its sampler log-probability is 0.

    Args:
        logits: [B, V] of any float dtype, as the head gives them.
        uniform: [B] float64 in [0, 1).
        params: B rows.
        scale: the model's own factor on its logits.
        softcap: the model's own cap on its logits; None where it has none.
        unknown: [U] tokens that are never drawn; they count in `policy_logprobs`, as in the loss.
        seen: [B] tokens that the repetition penalty acts on; may be left out where no row has one.

    Returns:
        Tokens and their log-probabilities.
    """
    parts = [
        _draw_rows(
            logits[i : i + _ROWS],
            uniform[i : i + _ROWS],
            params.rows(i, i + _ROWS),
            scale,
            softcap,
            unknown,
            seen[i : i + _ROWS],
        )
        for i in range(0, logits.shape[0], _ROWS)
    ]
    columns = (torch.cat(column) for column in zip(*parts, strict=True))
    return DrawnTokens(*columns)


def _draw_rows(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    params: SamplingBatch,
    scale: float,
    softcap: float | None,
    unknown: torch.Tensor | None,
    seen: Sequence[Sequence[int]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scores = logits.to(torch.float32, copy=True)
    if scale != 1.0:
        scores.mul_(scale)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    greedy = params.temperature == 0
    unpenalised: torch.Tensor | None = None
    if bool((params.repetition_penalty != 1).any()):
        unpenalised = _by_temperature(scores.clone(), params)
        _penalise(scores, params.repetition_penalty, seen)
    _by_temperature(scores, params)
    excluded = None
    if unknown is not None:
        excluded = scores[:, unknown].logsumexp(-1)
        scores[:, unknown] = -torch.inf
    peak, best = scores.max(dim=-1)
    # In place from here: log-probabilities come from the drawn token's weight, log(exp(z - peak)) would lose its tail.
    scores.sub_(peak[:, None])
    thresholds = _thresholds(scores, params)
    weights = scores.exp()
    normaliser = _block_sums(weights).sum(-1).log()
    if excluded is not None:
        normaliser = torch.logaddexp(normaliser, (excluded - peak).to(torch.float64))
    if thresholds is not None:
        weights.masked_fill_(scores < thresholds[:, None], 0.0)
    blocks = _block_sums(weights)
    token = torch.where(greedy, best, _invert(weights, blocks, uniform))
    score = scores.gather(1, token[:, None])[:, 0].to(torch.float64)
    if unpenalised is None:
        policy = score - normaliser
    else:
        policy = unpenalised.double().log_softmax(-1).gather(1, token[:, None])[:, 0]
    sampler = torch.where(greedy, 0.0, score - blocks.sum(-1).log())
    return token, sampler.to(torch.float32), policy.to(torch.float32)


def _by_temperature(scores: torch.Tensor, params: SamplingBatch) -> torch.Tensor:
    """Divide by the temperature, in place; 1 where greedy."""
    if bool((params.temperature != 1).any()):
        scores.div_(torch.where(params.temperature == 0, 1.0, params.temperature)[:, None])
    return scores


def _penalise(scores: torch.Tensor, penalty: torch.Tensor, seen: Sequence[Sequence[int]]) -> None:
    """Divide, in place, the scores of the tokens that each row has seen, or multiply them where negative."""
    for row, tokens in enumerate(seen):
        places = torch.tensor(sorted(set(tokens)), dtype=torch.long, device=scores.device)
        values = scores[row, places]
        scores[row, places] = torch.where(values > 0, values / penalty[row], values * penalty[row])


def _block_sums(weights: torch.Tensor) -> torch.Tensor:
    """[B, ceil(V / block)] float64 sums of consecutive tokens."""
    whole = weights.shape[1] // _BLOCK * _BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1).to(torch.float64)
    if whole == weights.shape[1]:
        return sums
    return torch.cat((sums, weights[:, whole:].sum(-1, keepdim=True).to(torch.float64)), dim=1)


def _first_above(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """[B] first place whose cumulative sum exceeds the target, else the last place that adds anything."""
    above = (cumulative <= target[:, None]).sum(-1)
    return torch.minimum(above, (cumulative < cumulative[:, -1:]).sum(-1))


def _invert(weights: torch.Tensor, blocks: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """[B] the token at quantile u: first its block, then its place in the block."""
    cumulative = blocks.cumsum(-1)
    target = uniform.to(torch.float64) * cumulative[:, -1]
    block = _first_above(cumulative, target)
    row = torch.arange(len(block), device=block.device)
    before = cumulative[row, block] - blocks[row, block]
    place = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=block.device)
    inside = weights.gather(1, place.clamp(max=weights.shape[1] - 1)).to(torch.float64)
    inside = inside.masked_fill(place >= weights.shape[1], 0.0).cumsum(-1)
    return block * _BLOCK + _first_above(inside, (target - before).clamp(min=0.0))


def _thresholds(scores: torch.Tensor, params: SamplingBatch) -> torch.Tensor | None:
    """[B] least kept score (scores are log-weights with peak 0), or None where every row keeps all."""
    vocabulary = scores.shape[1]
    by_k = (params.top_k > 0) & (params.top_k < vocabulary)
    by_p = params.top_p < 1
    if not bool((by_k | by_p | (params.min_p > 0)).any()):
        return None
    least = torch.where(params.min_p > 0, params.min_p.log(), -torch.inf)
    if not bool((by_k | by_p).any()):
        return least
    deepest = int(torch.where(by_k, params.top_k, 0).max())
    top = scores.topk(min(max(_TOP, deepest), vocabulary), dim=-1).values
    kth = top.gather(1, (params.top_k - 1).clamp(min=0, max=top.shape[1] - 1)[:, None])[:, 0]
    kth = torch.where(by_k, kth, -torch.inf)
    if bool(by_p.any()):
        nucleus = torch.where(by_p, _nucleus(scores, top, kth, params.top_p, by_p), -torch.inf)
        least = torch.maximum(least, nucleus)
    return torch.maximum(least, kth)


def _nucleus(
    scores: torch.Tensor, top: torch.Tensor, kth: torch.Tensor, top_p: torch.Tensor, active: torch.Tensor
) -> torch.Tensor:
    """[B] score of the last token of the smallest most likely set whose share of what top-k kept reaches top-p."""
    kept = scores.exp().masked_fill_(scores < kth[:, None], 0.0)
    mass = top_p.to(torch.float64) * _block_sums(kept).sum(-1)
    found, reached = _last_of_mass(top, mass)
    missing = active & ~reached
    if bool(missing.any()):
        # A flat distribution: the nucleus is wider than what was looked at, so these rows are sorted whole.
        rest = scores[missing].sort(dim=-1, descending=True).values
        found[missing] = _last_of_mass(rest, mass[missing])[0]
    return found


def _last_of_mass(descending: torch.Tensor, mass: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cumulative = descending.to(torch.float64).exp().cumsum(-1)
    # A part in 10^7 is the rounding of the fp32 sums that the mass comes from: "reaches" is meant up to it.
    last = (cumulative < (mass * (1 - 1e-7))[:, None]).sum(-1)
    reached = last < descending.shape[1]
    return descending.gather(1, last.clamp(max=descending.shape[1] - 1)[:, None])[:, 0], reached
