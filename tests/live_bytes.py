"""Count the bytes of live tensors while a piece of code runs."""

from __future__ import annotations

import torch

from burnish.training.ledger import Ledger


class LiveBytes(Ledger):
    """A ledger that is read at any time.

    A storage that existed before the block is not counted.

    Attributes:
        peak: most bytes alive at once.
        largest: bytes of the largest single storage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.largest = 0

    @property
    def live(self) -> int:
        """Bytes alive now."""
        return sum(sizes.total() for sizes in self._live.values())

    def _add(self, tensor: torch.Tensor, component: str) -> None:
        before = self.live
        super()._add(tensor, component)
        self.largest = max(self.largest, self.live - before)

    def _note(self) -> None:
        super()._note()
        self.peak = max(self.peak, self.live)
