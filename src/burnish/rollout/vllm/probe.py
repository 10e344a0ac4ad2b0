"""Proof of a sync by behaviour: log-probabilities of fixed tokens, under the server and under the trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from burnish.data.tokens import plain_ids
from burnish.model.packing import pack
from burnish.model.scoring import causal_lm, eval_mode, score
from burnish.types import Completion, Group

__all__ = ["Agreement", "Answers", "compare", "probe_sequences", "score_probe"]

_TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog, which had been asleep since noon, does not even lift "
    "its head. A moment later the fox is gone, and only the grass still moves.",
    "Question: a train leaves at 9:40 and arrives at 13:05 after two stops of 5 minutes each. How long does it travel? "
    "Answer: 3 hours and 25 minutes, of which 10 are stops.",
    "def gcd(a: int, b: int) -> int:\n    while b:\n        a, b = b, a % b\n    return abs(a)\n\nprint(gcd(84, 36))",
    "7 + 8 = 15; 12 - 5 = 7; 3 * 9 = 27; x^2 - 5x + 6 = (x - 2)(x - 3), so x = 2 or x = 3. Therefore the sum is 5.",
)
_TOKENS = 64
"""Most tokens of one text."""

_RESOLVED = 3.0
"""Least change, in multiples of the noise, that tells new weights from old ones."""

_CLIP_NATS = 1.0
"""Differences of single tokens are clipped to this: rounding noise is heavy-tailed in 16 bits."""


def probe_sequences(tokenizer: Any, model: Any, *, longest: int | None = None) -> list[list[int]]:
    """Encode the probe's texts: four sequences of up to 64 tokens that the model has embeddings for."""
    lm = causal_lm(model)
    positions = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    # The server needs room for one new token.
    most = min(_TOKENS, *(limit - 1 for limit in (positions, longest) if limit))
    size = int(lm.get_input_embeddings().weight.shape[0])
    encoded = [[token % size for token in plain_ids(tokenizer, text)[:most]] for text in _TEXTS]
    return [ids for ids in encoded if len(ids) > 1] or [[1 % size, 2 % size, 3 % size]]


@torch.no_grad()
def score_probe(model: torch.nn.Module, sequences: Sequence[Sequence[int]]) -> list[float]:
    """Compute the log-probability of all tokens but the first of each sequence, at temperature 1.

    Args:
        model: prepared by `prepare_for_scoring`.
        sequences: at least two tokens each.

    Returns:
        [N] values, sequence by sequence.
    """
    groups = [Group([ids[0]], [Completion(list(ids[1:]))]) for ids in sequences]
    batch = pack(groups).to(causal_lm(model).get_input_embeddings().weight.device)
    with eval_mode(model):
        return score(model, batch).logprobs.tolist()


@dataclass(frozen=True, slots=True)
class Answers:
    """Log-probabilities of the probe at one version, under the trainer and under a server.

    Attributes:
        version: tag of the weights.
        expected: [N] the trainer's.
        observed: [N] the server's.
    """

    version: str
    expected: list[float]
    observed: list[float]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Comparison of a server with the trainer.

    Attributes:
        kl: half the mean square of the clipped differences, in nats per token.
        difference: mean clipped |difference|, in nats.
        moved: root mean square change of the trainer's values since the version compared with; 0 without one.
        followed: fraction of that change that the server made; 1 if it has the new weights, 0 if it has the old ones,
            NaN where the change is below the noise.
        cause: likely cause of a mismatch; empty where there is none.
    """

    kl: float
    difference: float
    moved: float = 0.0
    followed: float = math.nan
    cause: str = ""

    @property
    def is_resolved(self) -> bool:
        """Whether the change since the version compared with was large enough to tell the two apart."""
        return not math.isnan(self.followed)


def compare(now: Answers, last: Answers | None, anchor: Answers | None, *, bound: float) -> Agreement:
    r"""Compare a server with the trainer after a sync.

    With d = expected - expected_0 the trainer's change, s = observed - observed_0 the server's, and sigma the noise of
    observed_0 - expected_0, the server's part in the change is

    .. math:: c = \frac{\langle s, d \rangle}{\langle d, d \rangle}

    With the old weights c is 0. With the new ones it is 1 in fp32; in 16 bits every change of weights also draws the
    rounding of both anew, so that d holds noise of up to sqrt(2) sigma that s does not follow, and c is above 0.75 once
    rms(d) is at least 3 sigma. c is used from there on. The residual s - d is noise, unless part of the weights was
    left behind.

    Args:
        now: at the new version.
        last: at the sync before, or None.
        anchor: at the last version whose change was resolved, or None; until the next one it stays, so that small
            changes add up.
        bound: largest KL that rounding explains, as `burnish.training.sampler_check.default_bound`.
    """
    errors = _differences(now.observed, now.expected)
    difference, kl = sum(map(abs, errors)) / len(errors), sum(e * e for e in errors) / (2 * len(errors))
    if not math.isfinite(kl):
        return Agreement(kl, difference, cause="its log-probabilities, or the trainer's, are not finite")
    moved, followed, cause = 0.0, math.nan, ""
    if last is not None and _never_arrived(now, last):
        cause = f"it answers bit for bit as at {last.version}: the new weights never arrived"
    if anchor is not None:
        change = [a - b for a, b in zip(now.expected, anchor.expected, strict=True)]
        made = [a - b for a, b in zip(now.observed, anchor.observed, strict=True)]
        moved = _rms(change)
        # A fiftieth of what the bound allows: the noise of a lucky anchor is not the noise of every version.
        noise = max(_rms(_differences(anchor.observed, anchor.expected)), math.sqrt(2 * bound) / 50)
        if moved >= _RESOLVED * noise:
            followed = sum(a * b for a, b in zip(made, change, strict=True)) / sum(a * a for a in change)
        residual = _rms(_differences(made, change))
        if not cause and followed < 0.5:
            cause = f"it answers with the weights of {anchor.version} ({followed:.0%} of the change since then arrived)"
        elif not cause and residual > max(4 * math.sqrt(2) * noise, 0.2 * min(moved, _CLIP_NATS)):
            cause = (
                "part of the weights was left behind; with tied embeddings it is usually the output head, whose packed "
                "copy the server did not rebuild"
            )
    if not cause and not (kl <= bound and difference <= math.sqrt(bound)):
        cause = "it has another model, another dtype, or only part of the weights"
    return Agreement(kl, difference, moved, followed, cause)


def _differences(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [
        x - y if not math.isfinite(x - y) else max(-_CLIP_NATS, min(_CLIP_NATS, x - y))
        for x, y in zip(a, b, strict=True)
    ]


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


def _never_arrived(now: Answers, last: Answers) -> bool:
    """Return whether the server did not move at all where the trainer moved at most tokens."""
    moved = sum(a != b for a, b in zip(now.expected, last.expected, strict=True))
    return now.observed == last.observed and 2 * moved > len(now.expected)
