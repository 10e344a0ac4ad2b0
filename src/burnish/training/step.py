"""One optimizer step: its groups, denominator, micro-batches and loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from burnish.training.learning_signal import Assessment
from burnish.types import Group, PackedBatch

__all__ = ["Loss", "MicroBatch", "Selected", "Step", "collate", "read_groups", "scored_tokens", "with_streams"]


@dataclass(frozen=True, slots=True)
class Step:
    """The data of one optimizer step; stages that need more subclass it.

    Attributes:
        groups: this rank's groups with a gradient, with their streams.
        count: terms of the loss (tokens, sequences, pairs ...) over all ranks, including those without a gradient; 0
            where nothing is in the loss.
        is_on_policy: whether the weights are still those that the groups were sampled with.
        assessment: learning signal of the samples; None to assess the loss instead.
    """

    groups: list[Group]
    count: float
    is_on_policy: bool = False
    assessment: Assessment | None = None

    @property
    def denominator(self) -> float:
        """Divisor of the sum of the loss's terms."""
        return max(self.count, 1.0)


class Selected(NamedTuple):
    """Values of which a mean takes only some; a selection by index would make the host wait for their number.

    Attributes:
        values: [N] values.
        chosen: [N] whether the mean takes each.
    """

    values: torch.Tensor
    chosen: torch.Tensor


@dataclass(frozen=True, slots=True)
class Loss:
    """The contribution of a packed part to a step's loss, with its metrics.

    Attributes:
        value: scalar with a gradient; the parts sum to the loss.
        means: values by name, [N] per token or [P] per pair; the log shows their mean over the step.
        sums: contributions by name; the log shows their sum over the step.
        watched: contribution to another loss, which is checked for divergence instead.
    """

    value: torch.Tensor
    means: Mapping[str, torch.Tensor | Selected] = field(default_factory=dict[str, "torch.Tensor | Selected"])
    sums: Mapping[str, float | torch.Tensor] = field(default_factory=dict[str, "float | torch.Tensor"])
    watched: torch.Tensor | None = None


@dataclass(slots=True)
class MicroBatch(Mapping[str, Any]):
    """One of the n batches of an optimizer step, as parts that each fit the token budget.

    A Mapping, because transformers looks for `input_ids`.
    """

    step: Step
    parts: list[PackedBatch]

    def __getitem__(self, name: str) -> Any:
        if name != "input_ids":
            raise KeyError(name)
        return torch.cat([part.input_ids for part in self.parts], dim=1)

    def __iter__(self) -> Iterator[str]:
        return iter(("input_ids",))

    def __len__(self) -> int:
        return 1


def collate(groups: list[Group]) -> list[Group]:
    """Return the list of groups unchanged, as packing happens once per optimizer step."""
    return groups


def read_groups(batches: Iterator[list[Group]], num_batches: int) -> list[Group] | None:
    """Read the groups of one optimizer step from a dataloader; None at its end."""
    found: list[Group] = []
    for _ in range(num_batches):
        found += next(batches, [])
    return found or None


def scored_tokens(group: Group) -> int:
    """Count the tokens of a group in the loss; without a prompt the first token is not predicted."""
    total = 0
    for completion in group.completions:
        total += completion.num_scored_tokens
        if not group.prompt_ids and (completion.loss_mask is None or completion.loss_mask[0]):
            total -= 1
    return total


def with_streams(groups: Sequence[Group], **streams: Sequence[Sequence[float]]) -> list[Group]:
    """Copy groups with further per-completion streams by name."""
    copies: list[Group] = []
    for number, group in enumerate(groups):
        completions = [
            dataclasses.replace(c, sequence={**c.sequence, **{name: rows[number][i] for name, rows in streams.items()}})
            for i, c in enumerate(group.completions)
        ]
        copies.append(dataclasses.replace(group, completions=completions))
    return copies
