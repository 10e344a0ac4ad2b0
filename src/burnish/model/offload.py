"""Activation offloading: what autograd saves moves to host memory, and comes back for the backward pass.

Under gradient checkpointing a layer saves its input only, L * T * H numbers in all; offloaded, the device holds two of
them at a time. Copies run on streams of their own beside the computation: a layer's input leaves while the next layers
run, and comes back while a later layer's backward pass does. Values are copied, so results are the same to the bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from burnish.model.traced import device_type, on_host

__all__ = ["Saved", "as_saved", "offloading", "restore", "saver", "storage_key"]

_MIN_BYTES = 2**20
"""Smaller tensors stay: a copy costs more than they hold."""
_IN_FLIGHT = 2
"""Tensors that may be on their way to the host at once; each is alive on the device until its copy has ended."""

Saved = Tensor | Callable[[], Tensor]
"""What autograd keeps: a tensor, or a function that brings it back."""


def storage_key(tensor: Tensor) -> int:
    """Return a number that tensors of one storage share while it lives; fake tensors have no address."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def as_saved(tensor: Tensor) -> Tensor:
    """Return what a hook saves for a tensor that stays: without its history.

    A node of autograd that holds the tensor's history through a hook may hold itself, and then it is never freed.
    """
    return tensor.detach()


def restore(saved: Saved) -> Tensor:
    """Return the tensor that was saved."""
    return saved if isinstance(saved, Tensor) else saved()


@dataclass(slots=True, eq=False)
class _Parked:
    """A tensor in host memory.

    Attributes:
        host: its values.
        device: where it comes from.
        before: the one saved before it, which the backward pass is likely to need next.
        done: end of the copy to the host.
        coming: the copy on the device, once begun, and its end.
        is_used: it has been asked for, and is not fetched ahead again.
    """

    host: Tensor
    device: torch.device
    before: _Parked | None
    done: Any = None
    coming: tuple[Tensor, Any] | None = None
    is_used: bool = False


class _Mover:
    """Copies between host memory and a device; on a CPU, which has no other memory, plain ones."""

    def copy_out(self, tensor: Tensor, before: _Parked | None) -> _Parked:
        """Begin a copy to the host."""
        with on_host():
            return _Parked(tensor.to("cpu", copy=True), tensor.device, before)

    def begin_back(self, parked: _Parked) -> None:
        """Begin a copy to the device."""
        parked.coming = (parked.host.to(parked.device, copy=True), None)

    def wait(self, parked: _Parked) -> Tensor:
        """Return the copy on the device, for use on the current stream."""
        assert parked.coming is not None
        return parked.coming[0]


class _StreamMover(_Mover):
    """Copies through pinned memory on two streams of their own."""

    def __init__(self, device: torch.device) -> None:
        self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._leaving: deque[tuple[Tensor, Any]] = deque()

    def copy_out(self, tensor: Tensor, before: _Parked | None) -> _Parked:
        self._settle(_IN_FLIGHT - 1)
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._out.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._out):
            host.copy_(tensor, non_blocking=True)
            done = self._out.record_event()
        self._leaving.append((tensor, done))
        return _Parked(host, tensor.device, before, done)

    def _settle(self, most: int) -> None:
        """Let go of device tensors until at most so many are left on their way."""
        while len(self._leaving) > most:
            tensor, done = self._leaving.popleft()
            # Its memory goes back to the current stream, which must not write to it before the copy has ended.
            torch.cuda.current_stream(tensor.device).wait_event(done)

    def begin_back(self, parked: _Parked) -> None:
        self._settle(0)
        # Allocated on the current stream, on which what held this memory before may still run.
        arrived = torch.empty_like(parked.host, device=parked.device, pin_memory=False)
        arrived.record_stream(self._back)  # it may be freed without having been used
        self._back.wait_stream(torch.cuda.current_stream(parked.device))
        self._back.wait_event(parked.done)
        with torch.cuda.stream(self._back):
            arrived.copy_(parked.host, non_blocking=True)
            parked.coming = (arrived, self._back.record_event())

    def wait(self, parked: _Parked) -> Tensor:
        assert parked.coming is not None
        tensor, arrived = parked.coming
        torch.cuda.current_stream(parked.device).wait_event(arrived)
        return tensor


@dataclass(slots=True)
class _Offload:
    """Tensors of one forward pass that went to the host.

    Attributes:
        movers: one for each device.
        kept: storages of parameters and buffers, which live on the device anyway.
        copies: copy on a CPU too, where that saves nothing.
        last: the tensor saved last.
    """

    kept: frozenset[int]
    copies: bool
    movers: dict[torch.device, _Mover] = field(default_factory=dict[torch.device, _Mover])
    last: _Parked | None = None

    def save(self, tensor: Tensor) -> Saved:
        is_host = device_type(tensor) == "cpu"
        is_small = tensor.nbytes < _MIN_BYTES or not tensor.is_floating_point()
        if is_small or (is_host and not self.copies) or storage_key(tensor) in self.kept:
            return as_saved(tensor)
        if tensor.device not in self.movers:
            self.movers[tensor.device] = _StreamMover(tensor.device) if tensor.is_cuda else _Mover()
        mover = self.movers[tensor.device]
        parked = self.last = mover.copy_out(tensor.detach(), self.last)

        def bring_back() -> Tensor:
            if parked.coming is None:
                mover.begin_back(parked)
            found = mover.wait(parked)
            # Autograd may ask again, if the graph is retained; the device keeps nothing for that.
            parked.coming, parked.is_used = None, True
            following = parked.before
            if following is not None and following.coming is None and not following.is_used:
                self.movers[following.device].begin_back(following)
            return found

        return bring_back


_offload: ContextVar[_Offload | None] = ContextVar("burnish_offload", default=None)


@contextmanager
def offloading(model: nn.Module, *, copies_on_cpu: bool = False) -> Generator[None]:
    """Offload what forwards inside save for their backward pass, which may come later.

    Tensors below 1 MiB, integers, parameters and buffers stay. On a CPU, nothing is copied unless asked.

    Args:
        model: its parameters and buffers stay where they are.
        copies_on_cpu: copy there too, as tests do.
    """
    kept = frozenset(storage_key(t) for t in (*model.parameters(), *model.buffers()))
    offload = _Offload(kept, copies_on_cpu)
    token = _offload.set(offload)
    try:
        yield
    finally:
        _offload.reset(token)
        # It holds all before it, and a graph that holds this object may outlive others: that of a kept prompt does.
        offload.last = None


def saver() -> Callable[[Tensor], Saved] | None:
    """Return the function that offloads a tensor inside `offloading`, else None."""
    offload = _offload.get()
    return None if offload is None else offload.save
