"""Low-precision weights with fp32 master weights.

bf16 has 8 bits of mantissa: an update of 1e-6 to a weight of 0.02 is smaller than the gap between two bf16 numbers, so
an optimizer that updates bf16 weights in place loses most of its updates. `MasterWeights` keeps an fp32 master of every
trained weight, accumulates gradients in fp32 and rounds to bf16 once per step (1710.03740).

A bf16 number is the upper half of an fp32 number, so a master needs only 2 bytes beside its weight: the lower half is
stored, and both are joined for the optimizer step, a few parameters at a time. With 2 bytes for the gradient (4 where
several backward passes accumulate in fp32) and 8 for Adam's two moments, that is 14 bytes per trained weight, against
18 with a full fp32 copy and fp32 gradients.

A checkpoint saved in bf16 would start every master at the centre of its rounding cell, and the bf16 weights of the
forward would not change until masters have moved half a gap, which takes dozens of steps at RL learning rates. Such
masters are therefore dithered within their cells: the weights keep their exact values, and from the first step a
fraction of them moves, on average by as much as the masters do.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch.utils.hooks import RemovableHandle

from burnish.errors import CheckFailed
from burnish.kernels.adamw import step_adamw
from burnish.model.huge_pages import on_huge_pages
from burnish.model.traced import device_type

__all__ = ["MasterWeights", "average_gradients", "over_masters"]

logger = logging.getLogger(__name__)

_CHUNK = 2**22
"""Most weights whose masters are joined at once (or one larger parameter): 32 MB with their fp32 gradients."""

_BLOCK = 2**24
"""Target size of a gradient block, in elements: the allocator returns blocks of 32 MiB to the system when freed."""

_ONE_BY_ONE = ("torch.optim.", "transformers.optimization", "bitsandbytes.optim.", "torchao.")
"""Modules of optimizers whose update of a parameter uses only its own gradient and state."""


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Average gradients over the ranks, for parameters outside any data-parallel wrapper; every rank must call it.

    Args:
        parameters: the same on every rank, in the same order; a missing gradient counts as zeros.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        _average(parameter.grad)


def _average(gradient: torch.Tensor) -> None:
    torch.distributed.all_reduce(gradient)
    gradient /= torch.distributed.get_world_size()


class _Gradients:
    """Gradients of neighbouring parameters, in one block from a step's first backward pass to their update.

    The first gradient of a step keeps its dtype; further ones accumulate in fp32. Separate tensors would be allocated
    between the activations of a backward pass, outlive them, and fragment memory.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.size = 0
        self._slots: list[tuple[int, torch.Size]] = []
        self._flat: torch.Tensor | None = None
        self._known: set[int] = set()

    def reserve(self, shape: torch.Size) -> int:
        """Reserve a slot for a parameter; return its number."""
        self._slots.append((self.size, shape))
        self.size += shape.numel()
        return len(self._slots) - 1

    def get(self, number: int) -> torch.Tensor | None:
        """Return a parameter's accumulated gradient, or None."""
        return self._view(number) if number in self._known else None

    def add(self, number: int, gradient: torch.Tensor) -> None:
        """Accumulate the gradient of one backward pass."""
        if self._flat is None:
            self._flat = on_huge_pages(torch.empty(self.size, dtype=self.dtype, device=self.device))
        if number not in self._known:
            self._known.add(number)
            self._view(number).copy_(gradient)
        else:
            self._widen()
            self._view(number).add_(gradient)

    def average(self) -> None:
        """Average all gradients over the ranks in fp32; a missing one counts as zeros."""
        zeros = torch.zeros((), dtype=self.dtype, device=self.device)
        for number in set(range(len(self._slots))) - self._known:
            self.add(number, zeros)
        _average(self._widen())

    def _widen(self) -> torch.Tensor:
        assert self._flat is not None
        if self._flat.dtype != torch.float32:
            wide = on_huge_pages(torch.empty_like(self._flat, dtype=torch.float32))
            self._flat = wide.copy_(self._flat)
        return self._flat

    def forget(self, number: int) -> None:
        """Drop a gradient; the block is freed with the last."""
        self._known.discard(number)
        if not self._known:
            self._flat = None

    def _view(self, number: int) -> torch.Tensor:
        assert self._flat is not None
        start, shape = self._slots[number]
        return self._flat[start : start + shape.numel()].view(shape)


class _Master:
    """The fp32 value and the gradient of one parameter.

    Args:
        parameter: the model's parameter.
        exact: its exact fp32 value, if known.
        gradients: block that stores its gradient.
    """

    def __init__(self, parameter: torch.nn.Parameter, exact: torch.Tensor | None, gradients: _Gradients) -> None:
        self.parameter = parameter
        self._gradients, self._number = gradients, gradients.reserve(parameter.shape)
        self.rest: torch.Tensor | None = None
        """Complement of the parameter: int16 lower halves for bf16, None for fp32, else the fp32 value."""
        if exact is not None:
            exact = exact.to(device=parameter.device, dtype=torch.float32)
        if parameter.dtype == torch.bfloat16:
            self.rest = _lower_halves(parameter.detach(), exact)
        elif parameter.dtype != torch.float32:
            self.rest = parameter.detach().float() if exact is None else exact
        # The inner optimizer's parameter; it holds the master's value only during `step`.
        self.handle = torch.nn.Parameter(torch.zeros((), device=parameter.device).expand(parameter.shape))
        self._empty = self.handle.data
        self._hook: RemovableHandle | None = None
        self.attach()

    def attach(self) -> None:
        """Collect every gradient of the parameter, releasing another optimizer's master of it."""
        if self._hook is not None:
            return
        hooks = cast("dict[int, Any] | None", getattr(self.parameter, "_post_accumulate_grad_hooks", None))
        for hook in list((hooks or {}).values()):
            if isinstance(owner := getattr(hook, "__self__", None), _Master):
                owner.release()
        if self.rest is not None and self.rest.dtype != torch.int16:
            # bf16 lower halves complement any weights; a full master is reset where the weights have changed meanwhile.
            moved = self.rest.to(self.parameter.dtype) != self.parameter.detach()
            self.rest = torch.where(moved, self.parameter.detach().float(), self.rest)
        self._hook = self.parameter.register_post_accumulate_grad_hook(self._collect)

    def release(self) -> None:
        """Stop collecting gradients and drop the accumulated one."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            self.forget_gradient()

    def _collect(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self._gradients.add(self._number, parameter.grad)
        parameter.grad = None

    @property
    def gradient(self) -> torch.Tensor | None:
        """Gradient accumulated since the last step."""
        return self._gradients.get(self._number)

    def forget_gradient(self) -> None:
        """Drop the gradient."""
        self.parameter.grad = None
        self._gradients.forget(self._number)

    def value(self) -> torch.Tensor:
        """Return the fp32 master: the parameter itself where that is fp32."""
        weights = self.parameter.detach()
        if self.rest is None:
            return weights
        if self.rest.dtype != torch.int16:
            return self.rest
        return weights.float().view(torch.int32).add_(self.rest).view(torch.float32)

    def store(self, value: torch.Tensor) -> None:
        """Round a master into the parameter and keep the rest; overwrites `value`."""
        if self.rest is None or self.rest.dtype != torch.int16:
            for kept in (self.rest, self.parameter.data):
                if kept is not None and kept.data_ptr() != value.data_ptr():
                    kept.copy_(value)
            return
        # Rounding the bits of some NaN up would turn them into numbers.
        bits = value.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=-math.inf).view(torch.int32)
        self.rest.copy_(bits)  # the lower 16 bits, signed: a negative rest belongs to a number rounded up
        self.parameter.data.view(torch.int16).copy_(bits.add_(0x8000).bitwise_right_shift_(16))

    def begin_step(self, scale: torch.Tensor) -> None:
        """Give the handle the master and its gradient, if any, in fp32."""
        self.handle.data = self.value()
        if (gradient := self.gradient) is not None:
            self.handle.grad = gradient.to(torch.float32)
            self.handle.grad.mul_(scale.to(self.handle.grad.device))

    def end_step(self) -> None:
        """Store the updated master."""
        value, self.handle.data, self.handle.grad = self.handle.data, self._empty, None
        self.forget_gradient()
        self.store(value)

    def sum_of_bits(self) -> int:
        """Compute a checksum that ties a saved rest to the parameter's weights."""
        return int(self.parameter.detach().view(torch.int16).sum(dtype=torch.int64))

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint of the weights lacks."""
        if self.rest is None or self.rest.dtype != torch.int16:
            return {"rest": self.rest}
        return {"rest": self.rest, "sum_of_bits": self.sum_of_bits()}

    def load(self, state: dict[str, Any]) -> None:
        """Restore a saved rest."""
        rest, saved = cast("torch.Tensor | None", state["rest"]), state.get("sum_of_bits")
        given = None if rest is None else (rest.dtype, rest.shape)
        expected = None if self.rest is None else (self.rest.dtype, self.rest.shape)
        if given != expected or (saved is not None and saved != self.sum_of_bits()):
            raise CheckFailed(
                "the checkpoint's master weights do not belong to the weights that the model holds: its files are of "
                "different steps, or it was written with another model or dtype. Resume from a complete checkpoint, "
                "with the configuration that wrote it."
            )
        if self.rest is not None and rest is not None:
            self.rest.copy_(rest)
            if self.rest.dtype != torch.int16:
                self.parameter.data.copy_(self.rest)


class MasterWeights(torch.optim.Optimizer):
    """Optimizer over fp32 masters of low-precision parameters.

    Gradients are moved out of each parameter as soon as autograd has accumulated them; `step` joins weights and rests
    to masters, updates these and rounds them into the parameters. Checkpoints hold the rests, so a resumed run
    continues from the masters and not from rounded weights.

    Optimizers of torch, transformers, bitsandbytes and torchao update a few parameters at a time. Any other may use
    several at once, so all masters are joined for its step (4 bytes per weight, and 4 for gradients).

    Args:
        groups: parameter groups as for torch.optim, over the model's parameters.
        factory: makes the inner optimizer from groups over the masters.
        masters: exact fp32 values by parameter, where known. A bf16 parameter without one, or equal to it, gets a
            dithered master.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        factory: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        masters: dict[torch.nn.Parameter, torch.Tensor] | None = None,
    ) -> None:
        self._masters: dict[torch.nn.Parameter, _Master] = {}
        """Masters by handle."""
        self._blocks: list[_Gradients] = []
        self._scale = torch.ones(())
        master_groups: list[dict[str, Any]] = []
        for group in groups:
            handles: list[torch.nn.Parameter] = []
            for parameter in cast("Iterable[torch.nn.Parameter]", group["params"]):
                master = _Master(parameter, (masters or {}).get(parameter), self._block(parameter))
                self._masters[master.handle] = master
                handles.append(master.handle)
            master_groups.append({**group, "params": handles})
        self.inner = factory([group for group in master_groups if group["params"]])
        # The base class shares the inner optimizer's groups, which learning-rate schedulers modify.
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state

    def _block(self, parameter: torch.nn.Parameter) -> _Gradients:
        """Return the gradient block for the next parameter."""
        last = self._blocks[-1] if self._blocks else None
        if last is None or last.size >= _BLOCK or (last.dtype, last.device) != (parameter.dtype, parameter.device):
            self._blocks.append(_Gradients(parameter.dtype, parameter.device))
        return self._blocks[-1]

    def attach(self) -> None:
        """Resume collecting gradients after `release`."""
        for master in self._masters.values():
            master.attach()

    def release(self) -> None:
        """Leave the parameters to other optimizers until `attach`, dropping gradients of an unfinished step."""
        for master in self._masters.values():
            master.release()

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """Parameters that it updates."""
        return [master.parameter for master in self._masters.values()]

    @property
    def masters(self) -> list[torch.Tensor]:
        """fp32 values of `trained`."""
        return [master.value() for master in self._masters.values()]

    @property
    def rests(self) -> list[torch.Tensor]:
        """Tensors that masters store in addition to the weights."""
        return [master.rest for master in self._masters.values() if master.rest is not None]

    @property
    def gradients(self) -> list[torch.Tensor]:
        """Gradients accumulated since the last step, before clipping."""
        return [master.gradient for master in self._masters.values() if master.gradient is not None]

    def all_reduce_gradients(self) -> None:
        """Average the gradients over the ranks in fp32; every rank must call it."""
        for block in self._blocks:
            block.average()

    def clip_gradients(self, max_norm: float) -> torch.Tensor:
        """Clip the next step's gradients to a total norm of `max_norm`; return the norm before clipping."""
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in self.gradients]
        norm = torch.stack([n.to(norms[0].device) for n in norms]).norm() if norms else torch.zeros(())
        self._scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the masters from their gradients and round them into the parameters."""
        if closure is not None:
            raise ValueError("closure: optimizers that re-evaluate the loss cannot run over masters; use one without.")
        for group in self.param_groups:
            for handle in group["params"]:
                self._step_in_one_pass(handle, group)
        for groups in self._chunks():
            chosen = [self._masters[handle] for group in groups for handle in group["params"]]
            for master in chosen:
                master.begin_step(self._scale)
            self.inner.param_groups = groups
            self.inner.step()
            self.inner.param_groups = self.param_groups
            for master in chosen:
                master.end_step()
        self._scale = torch.ones(())
        return None

    def _step_in_one_pass(self, handle: torch.nn.Parameter, group: dict[str, Any]) -> None:
        """Update a master and drop its gradient, where a kernel does what the inner optimizer would."""
        master = self._masters[handle]
        rest, gradient = master.rest, master.gradient
        if type(self.inner) is not torch.optim.AdamW or rest is None or gradient is None or device_type(rest) != "cpu":
            return
        state = self.inner.state.get(handle, {})
        if step_adamw(master.parameter.data, rest, gradient, state=state, group=group, scale=self._scale):
            master.forget_gradient()

    def _chunks(self) -> Iterator[list[dict[str, Any]]]:
        """Yield groups of the parameters to update at once: all where the optimizer may use several together."""
        if not f"{type(self.inner).__module__}.".startswith(_ONE_BY_ONE):
            yield self.param_groups
            return
        for group in self.param_groups:
            chunk: list[torch.nn.Parameter] = []
            # In reverse, so that the embedding, often by far the largest, comes when other gradients are freed.
            for handle in reversed(group["params"]):
                if self._masters[handle].gradient is None:
                    continue
                if chunk and sum(other.numel() for other in chunk) + handle.numel() > _CHUNK:
                    yield [{**group, "params": chunk}]
                    chunk = []
                chunk.append(handle)
            if chunk:
                yield [{**group, "params": chunk}]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of parameters and masters."""
        for master in self._masters.values():
            master.forget_gradient()

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state and the masters' rests."""
        return {**self.inner.state_dict(), "masters": [master.state() for master in self._masters.values()]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore inner state and masters; the parameters must hold the weights saved with them.

        Raises:
            CheckFailed: the state belongs to another model or other weights.
        """
        saved = cast("Sequence[dict[str, Any]]", state_dict["masters"])
        if len(saved) != len(self._masters):
            raise CheckFailed(
                f"the checkpoint holds {len(saved)} master weights and the model trains {len(self._masters)}: resume "
                "with the configuration that wrote it."
            )
        for master, state in zip(self._masters.values(), saved, strict=True):
            master.load(state)
        self.inner.load_state_dict({key: value for key, value in state_dict.items() if key != "masters"})
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state


def over_masters(
    optimizer: torch.optim.Optimizer, masters: dict[torch.nn.Parameter, torch.Tensor] | None = None
) -> torch.optim.Optimizer:
    """Make an optimizer over low-precision parameters update fp32 masters of them instead.

    Args:
        optimizer: its groups hold the masters afterwards, so that its scheduler keeps working.
        masters: see `MasterWeights`.

    Returns:
        The `MasterWeights`; or the optimizer itself, with a warning, where it has already stepped, swaps weights in
        `train` and `eval`, or comes from a package not known to update every parameter independently.
    """
    known = f"{type(optimizer).__module__}.".startswith(_ONE_BY_ONE) and not hasattr(optimizer, "eval")
    if not known or optimizer.state:
        logger.warning(
            "optimizers: %s updates 16-bit weights in place, and updates smaller than their rounding are lost. Pass a "
            "torch.optim optimizer that has not stepped yet, which gets fp32 masters, or train in fp32 (bf16=False).",
            type(optimizer).__name__,
        )
        return optimizer

    def over(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        existing = [group for group in optimizer.param_groups if group["params"]]
        for target, group in zip(existing, groups, strict=True):
            target["params"] = group["params"]
        return optimizer

    return MasterWeights([dict(group) for group in optimizer.param_groups], over, masters)


def _lower_halves(weights: torch.Tensor, exact: torch.Tensor | None) -> torch.Tensor:
    """Return int16 offsets that, added to the fp32 bits of bf16 weights, give the bits of their masters.

    Masters are the exact values where these are known and round to the weights; else they are random values, the same
    on every rank, that round to the weights. Zeros stay zero.
    """
    if exact is not None:
        rests = exact.contiguous().view(torch.int32) - weights.float().view(torch.int32)
        # An offset of 2^15, a tie rounded down to even, exceeds int16; the value just below it is stored.
        if rests.any() and rests.min() >= -0x8000 and rests.max() <= 0x8000:
            return rests.clamp_(max=0x7FFF).to(torch.int16)
    generator = torch.Generator(weights.device).manual_seed(0)
    noise = torch.randint(-0x7FFF, 0x8000, weights.shape, generator=generator, device=weights.device, dtype=torch.int16)
    return noise.mul_((weights != 0) & weights.isfinite())
