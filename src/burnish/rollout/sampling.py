"""Token sampling: counter-based uniforms, truncation, and inverse-CDF draws.

Every random number is a pure function of (seed, step, request index, sample, token position), so a completion does not
depend on its batch, on the order of requests or on the process that sampled it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch._subclasses.fake_tensor import is_fake

from burnish.rollout.engine import SamplingParams

__all__ = ["DrawnTokens", "SamplingBatch", "draw", "stream_key", "uniforms"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_BLOCK = 256
"""Tokens per block of the two-level CDF: one fp32 pass over the vocabulary, then fp64 over the few blocks."""
_TOP = 512
"""Most likely tokens tried for top-p before the whole row is sorted."""
_ROWS = 16
"""Rows drawn together: their fp32 logits stay in cache and peak memory stays small."""


def _mix(value: np.ndarray) -> np.ndarray:
    """Apply splitmix64's finaliser, a bijection of 64-bit words (Steele, Lea and Flood 2014)."""
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


def stream_key(seed: int, step: int, index: int, sample: int) -> np.uint64:
    """Hash (seed, step, index, sample) to the key of one completion's random numbers.

    k_0 = mix(golden), k_{i+1} = mix(k_i xor mix(word_i + golden)) over the words (seed, step, index, sample).

    Args:
        seed: seed of the run; like the others any integer, taken modulo 2^64.
        step: training step, or any number that differs between calls.
        index: index of the prompt in its source.
        sample: index of the completion within its group.

    Returns:
        A 64-bit key.
    """
    key = _mix(np.array([_GOLDEN]))
    for word in (seed, step, index, sample):
        key = _mix(key ^ _mix(np.array([word & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64) + _GOLDEN))
    return np.uint64(key[0])


def uniforms(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Draw one uniform per token: u = floor(mix(key + (position + 1) golden) / 2^11) / 2^53, in [0, 1).

    Args:
        keys: [B] from :func:`stream_key`.
        positions: [B] index of the token in its completion, from 0.

    Returns:
        [B] float64.
    """
    counter = (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    return (_mix(keys.astype(np.uint64) + counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Sampling parameters of B rows, as tensors.

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
        """Stack the parameters of rows, in order."""
        return cls(
            temperature=torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device),
            top_k=torch.tensor([p.top_k for p in params], dtype=torch.int64, device=device),
            top_p=torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device),
            min_p=torch.tensor([p.min_p for p in params], dtype=torch.float32, device=device),
            repetition_penalty=torch.tensor([p.repetition_penalty for p in params], dtype=torch.float32, device=device),
        )

    def rows(self, start: int, stop: int) -> SamplingBatch:
        """Return rows start .. stop - 1."""
        part = slice(start, stop)
        fields = (self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        return SamplingBatch(*(field[part] for field in fields))


@dataclass(frozen=True, slots=True)
class DrawnTokens:
    """B drawn tokens.

    Args:
        token_ids: [B] int64.
        sampler_logprobs: [B] fp32 nats under the sampling distribution: after penalty, temperature and truncation.
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
    """Draw one token per row by inverting the CDF in vocabulary order.

    z = cap tanh(scale logits / cap), penalised at seen tokens; p = softmax(z / temperature), truncated by top-k, then
    by top-p within the top-k, then by min-p (1904.09751, 2407.01082). The token is the first whose cumulative kept
    probability exceeds u. Ties with the last kept token are kept, so the result does not depend on the sort order.
    Tokens of probability zero and those of `unknown` are never drawn; truncation ignores the latter. Temperature 0
    takes the first of the most likely tokens, with sampler log-probability 0.

    Args:
        logits: [B, V] of any float dtype, as the head gives them.
        uniform: [B] float64 in [0, 1).
        params: B rows.
        scale: the model's factor on its logits.
        softcap: the model's cap on its logits; None for none.
        unknown: [U] tokens never drawn; they still count in the normaliser of `policy_logprobs`, as in the loss.
        seen: [B] tokens that the repetition penalty applies to; may be empty where no row has a penalty.

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
    if _any(params.repetition_penalty != 1):
        unpenalised = _by_temperature(scores.clone(), params)
        for row, tokens in enumerate(seen):
            columns = torch.tensor(sorted(set(tokens)), dtype=torch.long, device=scores.device)
            values, penalty = scores[row, columns], params.repetition_penalty[row]
            scores[row, columns] = torch.where(values > 0, values / penalty, values * penalty)
    _by_temperature(scores, params)
    excluded = None
    if unknown is not None:
        excluded = scores[:, unknown].logsumexp(-1)
        scores[:, unknown] = -torch.inf
    peak = scores.amax(-1)
    # Shifted scores are kept beside their weights: log(exp(z - peak)) would lose the tail of the log-probabilities.
    scores.sub_(peak[:, None])
    thresholds = _thresholds(scores, params)
    weights = scores.exp()
    blocks = _block_sums(weights)
    normaliser = blocks.sum(-1).log()
    if excluded is not None:
        normaliser = torch.logaddexp(normaliser, (excluded - peak).to(torch.float64))
    if thresholds is not None:
        blocks = _block_sums(weights.masked_fill_(scores < thresholds[:, None], 0.0))
    token = _invert(weights, blocks, uniform)
    if _any(greedy):
        token = torch.where(greedy, scores.argmax(-1), token)
    score = scores.gather(1, token[:, None])[:, 0].to(torch.float64)
    if unpenalised is None:
        policy = score - normaliser
    else:
        policy = unpenalised.double().log_softmax(-1).gather(1, token[:, None])[:, 0]
    sampler = torch.where(greedy, 0.0, score - blocks.sum(-1).log())
    return token, sampler.to(torch.float32), policy.to(torch.float32)


def _any(mask: torch.Tensor) -> bool:
    """Return whether any entry is true; a trace, which cannot read it, samples without what the entry asks for."""
    return not is_fake(mask) and bool(mask.any())


def _by_temperature(scores: torch.Tensor, params: SamplingBatch) -> torch.Tensor:
    """Divide by the temperature in place; greedy rows stay."""
    if _any(params.temperature != 1):
        scores.div_(torch.where(params.temperature == 0, 1.0, params.temperature)[:, None])
    return scores


def _block_sums(weights: torch.Tensor) -> torch.Tensor:
    """Return [B, ceil(V / block)] float64 sums over blocks of consecutive tokens."""
    whole = weights.shape[1] // _BLOCK * _BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1).to(torch.float64)
    if whole == weights.shape[1]:
        return sums
    return torch.cat((sums, weights[:, whole:].sum(-1, keepdim=True).to(torch.float64)), dim=1)


def _first_above(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the [B] first index whose cumulative sum exceeds the target, else the last of positive weight."""
    above = (cumulative <= target[:, None]).sum(-1)
    return torch.minimum(above, (cumulative < cumulative[:, -1:]).sum(-1))


def _invert(weights: torch.Tensor, blocks: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return the [B] tokens at quantile u: first the block, then the token within it."""
    cumulative = blocks.cumsum(-1)
    target = uniform.to(torch.float64) * cumulative[:, -1]
    block = _first_above(cumulative, target)
    row = torch.arange(len(block), device=block.device)
    before = cumulative[row, block] - blocks[row, block]
    token = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=block.device)
    inside = weights.gather(1, token.clamp(max=weights.shape[1] - 1)).to(torch.float64)
    inside = inside.masked_fill(token >= weights.shape[1], 0.0).cumsum(-1)
    return block * _BLOCK + _first_above(inside, (target - before).clamp(min=0.0))


def _thresholds(scores: torch.Tensor, params: SamplingBatch) -> torch.Tensor | None:
    """Return the [B] smallest kept score (log-weight with peak 0), or None where no row is truncated."""
    vocabulary = scores.shape[1]
    by_k = (params.top_k > 0) & (params.top_k < vocabulary)
    by_p = params.top_p < 1
    if not _any(by_k | by_p | (params.min_p > 0)):
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
    """Return the [B] lowest score of the nucleus: the smallest most likely set with mass top-p within the top-k."""
    kept = scores.exp().masked_fill_(scores < kth[:, None], 0.0)
    mass = top_p.to(torch.float64) * _block_sums(kept).sum(-1)
    found, reached = _last_of_mass(top, mass)
    missing = active & ~reached
    if bool(missing.any()):
        # A flat distribution, whose nucleus exceeds the top tokens: sort the whole row.
        rest = scores[missing].sort(dim=-1, descending=True).values
        found[missing] = _last_of_mass(rest, mass[missing])[0]
    return found


def _last_of_mass(descending: torch.Tensor, mass: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cumulative = descending.to(torch.float64).exp().cumsum(-1)
    # The tolerance of 1e-7 is the rounding of the fp32 sums behind the mass.
    last = (cumulative < (mass * (1 - 1e-7))[:, None]).sum(-1)
    reached = last < descending.shape[1]
    return descending.gather(1, last.clamp(max=descending.shape[1] - 1)[:, None])[:, 0], reached
