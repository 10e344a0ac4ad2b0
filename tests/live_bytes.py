"""Count the bytes of live tensors while a piece of code runs."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Tracks every storage that an operation returns until it is freed.

    A storage that existed before the block is not counted; the backward pass is, on CPU, where it runs on the thread
    that entered the block.

    Attributes:
        live: bytes alive now.
        peak: most bytes alive at once.
        largest: bytes of the largest single storage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_place(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and _place(tensor) not in before:
                self._add(tensor)
        return out

    def _add(self, tensor: torch.Tensor) -> None:
        key = _place(tensor)
        if key in self._known:
            return
        # A tensor in oneDNN's own layout hides its storage, which has at least as many bytes as its numbers.
        storage = tensor if tensor.is_mkldnn else tensor.untyped_storage()
        size = tensor.numel() * tensor.element_size() if tensor.is_mkldnn else tensor.untyped_storage().nbytes()
        self._known.add(key)
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _place(tensor: torch.Tensor) -> int:
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage()._cdata
