"""The records that every stage shares: a prompt and its completions.

Dimension letters, used as suffixes on tensors throughout the package:

======  =========================================================================
letter  meaning
======  =========================================================================
P       prompts (groups)
G       completions of one group
S       sequences: completions, counted over all groups of a batch
T       tokens of one packed row (prompt tokens once per group, then completions)
N       scored tokens: those with a log-probability that are in the loss
V       vocabulary
H       hidden size
======  =========================================================================

This module needs no torch: tensors appear in annotations only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import compress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from burnish.model.kept_prompt import KeptPrompt

__all__ = ["Completion", "Episode", "Group", "GroupSpan", "PackedBatch", "Score", "StopReason"]


class StopReason(StrEnum):
    """Why a completion ended."""

    EOS = "eos"
    """An end-of-sequence token was sampled; it is the last token of the completion."""
    STOP = "stop"
    """A stop string appeared in the text."""
    LENGTH = "length"
    """The token limit cut it."""
    SETTLED = "settled"
    """The engine stopped it, because no continuation could change its reward (`stop_settled`)."""
    BUDGET = "budget"
    """Its episode had used up its turns, tokens or time before the policy or the environment ended it."""


@dataclass(slots=True)
class Score:
    """A rubric's score of one completion.

    Attributes:
        total: weighted sum of the criteria, or None where one failed: the completion is then excluded from the loss.
        criteria: value of each criterion by name; None where it failed or abstained.
        errors: message of each failure by criterion name.
        answers: answer that each criterion read from the text, by criterion name; absent where it found none.
        extra: what reward functions logged of the completion, by column.
        terms: value of each criterion as it counts in the total, before the weight: 0 behind a closed gate, and
            normalised within the group where the criterion says so.
        turns: values by turn, of the criteria that judge turns; their sum is the criterion's value.
    """

    total: float | None
    criteria: dict[str, float | None] = field(default_factory=dict[str, "float | None"])
    errors: dict[str, str] = field(default_factory=dict[str, str])
    answers: dict[str, str] = field(default_factory=dict[str, str])
    extra: dict[str, Any] = field(default_factory=dict[str, Any])
    terms: dict[str, float | None] = field(default_factory=dict[str, "float | None"])
    turns: dict[str, list[float]] = field(default_factory=dict[str, list[float]])


@dataclass(slots=True)
class Episode:
    """What is known of a completion of several turns beside its tokens.

    Attributes:
        name: name of the environment.
        messages: the conversation after the prompt: turns of the assistant, and what the environment answered.
        turns: [start, end) tokens of the completion that the policy sampled, by turn; they are the ones in the loss.
        rewards: the environment's own reward of each turn; None where it gave none.
        reward: the environment's own reward of the whole episode; None if it gives none.
        num_calls: tool calls that the policy made.
        num_failed_calls: those that gave an error, which the policy has seen.
        error: why the environment failed, which excludes the completion; None if it did not.
        opening: tokens before the first turn where the environment has written the prompt itself; None for the data
            set's.
        fields: further columns for reward functions.
        environment: the live environment, for reward functions; None once they have run.
    """

    name: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    turns: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    rewards: list[float | None] = field(default_factory=list["float | None"])
    reward: float | None = None
    num_calls: int = 0
    num_failed_calls: int = 0
    error: str | None = None
    opening: list[int] | None = None
    fields: dict[str, Any] = field(default_factory=dict[str, Any])
    environment: Any = field(default=None, compare=False, repr=False)


@dataclass(slots=True)
class Completion:
    """One completion of a prompt.

    Attributes:
        token_ids: [C] tokens, including the end-of-sequence token where one was produced.
        loss_mask: [C] which tokens are scored; None means all.
        text: decoded text, special tokens included, without the tokens that end it and without the stop string.
        stop_reason: why sampling ended; None for completions from a data set.
        sampler_logprobs: [C] log-probability (nats) of each token under the distribution it was sampled from: after
            temperature, top-k, top-p and min-p.
        policy_logprobs: [C] log-probability (nats) under the model's distribution at the sampling temperature before
            any truncation: the quantity a trainer recomputes.
        score: rewards, once a rubric has seen the completion.
        episode: turns and messages, where there are several turns (`burnish.environments`); None for a single one.
        token: streams of a stage, by name, each [C] one number per token: `old_logprobs` (the policy before the first
            update on this completion), `ref_logprobs`, `kl`, `values`, `returns`, `advantages` ...
        sequence: streams of a stage, by name, each one number per completion: `advantages`, `reference` ...

    `burnish.model.packing.pack` turns every stream into a tensor of the packed row. A stream that a completion lacks is
    unknown there, and NaN in the row.
    """

    token_ids: list[int]
    loss_mask: list[bool] | None = None
    text: str = ""
    stop_reason: StopReason | None = None
    sampler_logprobs: list[float] | None = None
    policy_logprobs: list[float] | None = None
    score: Score | None = None
    episode: Episode | None = None
    token: dict[str, list[float]] = field(default_factory=dict[str, "list[float]"])
    sequence: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def reward(self) -> float | None:
        """Total of the score; None before scoring, and where a criterion failed."""
        return None if self.score is None else self.score.total

    @property
    def is_truncated(self) -> bool:
        """True where a limit has ended the completion: on its tokens, or on the turns or time of its episode."""
        return self.stop_reason in (StopReason.LENGTH, StopReason.BUDGET)

    @property
    def num_scored_tokens(self) -> int:
        """Number of tokens in the loss."""
        return len(self.token_ids) if self.loss_mask is None else sum(self.loss_mask)

    def scored(self, values: Sequence[float]) -> list[float]:
        """Select the values of the tokens in the loss."""
        return list(values if self.loss_mask is None else compress(values, self.loss_mask))

    def spread(self, values: Sequence[float]) -> list[float]:
        """Return values of the tokens in the loss as a stream, 0 elsewhere: the inverse of `scored`."""
        rest = iter(values)
        return [next(rest) if kept else 0.0 for kept in self.loss_mask or [True] * len(self.token_ids)]


@dataclass(slots=True)
class Group:
    """A prompt and its completions: the one shape of every stage.

    Attributes:
        prompt_ids: [prompt] tokens, may be empty (plain language modelling: the first token is then not scored).
        completions: 1 for SFT, 2 for a preference pair (chosen first), G for online learning.
        row: the data set's columns for this prompt (`prompt`, `answer`, ...), as rewards receive them.
        index: place of the prompt in its source: part of the key of every random number drawn for it.
        kept_prompt: the tokens before `prompt_ids`, where their keys and values are kept for several pieces of a group
            (`burnish.model.packing.split_by_tokens`); else None.
    """

    prompt_ids: list[int]
    completions: list[Completion]
    row: dict[str, Any] = field(default_factory=dict[str, Any])
    index: int = 0
    kept_prompt: KeptPrompt | None = field(default=None, compare=False, repr=False)

    @property
    def num_tokens(self) -> int:
        """Tokens the group occupies in a packed row: the prompt once, then every completion."""
        return len(self.prompt_ids) + sum(len(c.token_ids) for c in self.completions)


@dataclass(frozen=True, slots=True)
class GroupSpan:
    """Where one group lies in a packed row: `prompt` then each completion, as (start, length) in tokens.

    A prompt whose first k tokens are kept (`burnish.model.kept_prompt`) and not in the row starts at -k.
    """

    prompt: tuple[int, int]
    completions: tuple[tuple[int, int], ...]


@dataclass(slots=True)
class PackedBatch(Mapping[str, Any]):
    """Groups packed into one row of T tokens, each prompt once, with N scored tokens of S sequences.

    A Mapping (of its own field names), because transformers and accelerate index batches by name.

    Attributes:
        input_ids: [1, T] tokens of the row.
        position_ids: [1, T] position of each token in its own sequence; every completion starts at its prompt's length.
        spans: where the groups lie in the row: what prefix attention needs to know.
        score_index: [N] position in the row of the token that predicts each scored token (the last prompt token
            predicts the first token of every completion of its group, so positions repeat).
        target_ids: [N] the scored tokens.
        sequence_index: [N] the sequence (0 .. S-1) that each scored token belongs to, ascending.
        num_sequences: S.
        token: [N] fp32 tensors by name: the streams of the completions, and their `sampler_logprobs` and
            `policy_logprobs`; NaN where unknown.
        sequence: [S] fp32 tensors by name; NaN where unknown.
        kept_prompt: the prompt's tokens before those of the row, where they are kept; the row then holds one group.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    spans: tuple[GroupSpan, ...]
    score_index: torch.Tensor
    target_ids: torch.Tensor
    sequence_index: torch.Tensor
    num_sequences: int
    token: dict[str, torch.Tensor] = field(default_factory=dict[str, "torch.Tensor"])
    sequence: dict[str, torch.Tensor] = field(default_factory=dict[str, "torch.Tensor"])
    kept_prompt: KeptPrompt | None = field(default=None, repr=False)

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.input_ids.shape[1])

    @property
    def num_scored_tokens(self) -> int:
        """N."""
        return int(self.target_ids.shape[0])

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device; dtypes are kept (old log-probabilities must stay fp32)."""
        return PackedBatch(
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            spans=self.spans,
            score_index=self.score_index.to(device),
            target_ids=self.target_ids.to(device),
            sequence_index=self.sequence_index.to(device),
            num_sequences=self.num_sequences,
            token={name: tensor.to(device) for name, tensor in self.token.items()},
            sequence={name: tensor.to(device) for name, tensor in self.sequence.items()},
            kept_prompt=self.kept_prompt,
        )

    def __getitem__(self, name: str) -> Any:
        if name not in self.__slots__:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.__slots__)

    def __len__(self) -> int:
        return sum(1 for _ in self)
