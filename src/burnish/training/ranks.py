"""Collectives over the processes that train together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object

from burnish.errors import BurnishError

__all__ = ["Ranks"]

T = TypeVar("T")


class Ranks:
    """The rank of this process and collectives over all ranks, which are the identity for a single one.

    Args:
        accelerator: an `accelerate.Accelerator`.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.index: int = accelerator.process_index
        self.count: int = accelerator.num_processes
        self.is_first = self.index == 0

    def sum(self, value: float) -> float:
        """Sum a number over all ranks."""
        if self.count == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self._accelerator.device)
        return float(cast(torch.Tensor, self._accelerator.reduce(tensor, reduction="sum"))[0])

    def max(self, value: float) -> float:
        """Return the maximum of a number over all ranks."""
        if self.count == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self._accelerator.device)
        return float(cast(torch.Tensor, self._accelerator.gather(tensor)).max())

    def gathered(self, rows: Sequence[T]) -> list[T]:
        """Concatenate the lists of all ranks, in the order of the ranks."""
        return list(cast("list[T]", gather_object(list(rows)) if self.count > 1 else rows))

    def agreed(self, work: Callable[[], T]) -> T:
        """Run `work` on the first rank; return its result or raise its error on every rank."""
        if self.count == 1:
            return work()
        answer: list[Any] = [None, None]
        if self.is_first:
            try:
                answer[0] = work()
            except BurnishError as error:
                answer[1] = error
        broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]
