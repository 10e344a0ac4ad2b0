"""Count the bytes of live storages by component, on the device and on the host."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from burnish.model.offload import storage_key
from burnish.model.traced import is_on_host

__all__ = ["Ledger", "Peak"]


@dataclass(slots=True, eq=False)
class Peak:
    """The moment of most device bytes within a phase.

    Attributes:
        device: bytes by component at that moment.
        host: most bytes of host memory by component, at any moment.
    """

    device: dict[str, int] = field(default_factory=dict[str, int])
    host: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def device_bytes(self) -> int:
        """Sum over the components."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """Sum over the components."""
        return sum(self.host.values())


def _key(tensor: torch.Tensor) -> int:
    # A tensor in oneDNN's own layout hides its storage, which has at least as many bytes as its numbers.
    return id(tensor) if tensor.is_mkldnn else storage_key(tensor)


class Ledger(TorchDispatchMode):
    """Follow every storage from the operation that returns it until it is freed.

    The backward pass is counted too on a CPU, where it runs on the thread that entered the block; storages made before
    are counted from `own` on. Sizes are those that were asked for, without an allocator's rounding.
    """

    def __init__(self) -> None:
        super().__init__()
        self._component = "activations"
        self._live: dict[str, Counter[str]] = {"device": Counter(), "host": Counter()}
        self._known: set[int] = set()
        self._peaks: list[Peak] = []
        self.tied_shapes: set[torch.Size] = set()
        """Shapes of trained weights that the model uses twice."""

    def own(self, component: str, tensors: Iterable[torch.Tensor]) -> None:
        """Count storages that exist already, each once."""
        for tensor in tensors:
            self._add(tensor, component)

    @contextmanager
    def component(self, name: str) -> Generator[None]:
        """Count storages made inside under a name."""
        before, self._component = self._component, name
        try:
            yield
        finally:
            self._component = before

    @contextmanager
    def phase(self) -> Generator[Peak]:
        """Record the peak of a block, with what is alive at its beginning."""
        peak = Peak()
        self._peaks.append(peak)
        self._note()
        try:
            yield peak
        finally:
            self._peaks.remove(peak)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the storages that are new in its result."""
        if func is torch.ops.aten.add.Tensor and self._is_sum_of_gradients(*args[:2]):
            func = torch.ops.aten.add_.Tensor
        given = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and _key(tensor) not in given:
                self._add(tensor, self._component)
        return out

    def _is_sum_of_gradients(self, one: Any, other: Any) -> bool:
        """Return whether autograd adds two gradients of a tied weight, which it does in place where no mode is on."""
        in_backward = torch._C._current_graph_task_id() != -1  # pyright: ignore[reportPrivateUsage]
        return in_backward and all(getattr(given, "shape", None) in self.tied_shapes for given in (one, other))

    def _add(self, tensor: torch.Tensor, component: str) -> None:
        key = _key(tensor)
        if key in self._known:
            return
        place = "host" if is_on_host() else "device"
        storage = tensor if tensor.is_mkldnn else tensor.untyped_storage()
        size = tensor.numel() * tensor.element_size() if tensor.is_mkldnn else tensor.untyped_storage().nbytes()
        self._known.add(key)
        self._live[place][component] += size
        weakref.finalize(storage, self._remove, key, place, component, size)
        self._note()

    def _remove(self, key: int, place: str, component: str, size: int) -> None:
        self._known.discard(key)
        self._live[place][component] -= size

    def _note(self) -> None:
        device, host = self._live["device"], self._live["host"]
        total, on_host = device.total(), host.total()
        for peak in self._peaks:
            if total > peak.device_bytes:
                peak.device = {name: size for name, size in device.items() if size}
            if on_host > peak.host_bytes:
                peak.host = {name: size for name, size in host.items() if size}
