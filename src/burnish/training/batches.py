"""Micro-batches of one optimizer step, as parts that each fit the token budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from burnish.types import Group, PackedBatch

__all__ = ["MicroBatch", "collate", "scored_tokens"]


@dataclass(slots=True)
class MicroBatch(Mapping[str, Any]):
    """One of the n batches of an optimizer step, as parts that each fit the token budget."""

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
    """Leave a batch as the list of its groups: packing happens once per optimizer step."""
    return groups


def scored_tokens(group: Group) -> int:
    """Tokens of a group that enter the loss; without a prompt nothing predicts the first token."""
    total = 0
    for completion in group.completions:
        total += completion.num_scored_tokens
        if not group.prompt_ids and (completion.loss_mask is None or completion.loss_mask[0]):
            total -= 1
    return total
