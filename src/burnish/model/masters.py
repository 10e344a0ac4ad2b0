"""bf16 weights with fp32 masters, in 4 bytes a weight.

bf16 has 8 bits of mantissa: a step of learning rate 1e-6 on a weight of 0.02 is smaller than the gap between two bf16
numbers, so an optimizer that updates bf16 weights in place loses most of its steps. `MasterWeights` keeps an fp32
master of every trained weight, accumulates gradients in fp32 and rounds to bf16 once per step (1710.03740).

A bf16 number is the upper half of an fp32 number, so a master costs 2 bytes beside its weight and not 4: the lower half
is kept, and the two are joined for the optimizer's step, a few parameters at a time. With 2 bytes for the gradient of a
step that has one backward (4 for more, which add up in fp32) and 8 for the two moments of Adam that is 14 bytes a
trained weight, where a full copy and fp32 gradients make 18.

Masters alone are not enough: a checkpoint saved in bf16 starts every master in the middle of its rounding cell, so the
bf16 weights that the forward sees stand still until the masters have crossed half a gap, which takes dozens of steps at
the learning rates of RL. Masters that start there are spread over their cells first: the weights keep their exact
values, and from the first step on a fraction of them moves, by as much on average as the masters do.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch.utils.hooks import RemovableHandle

from burnish.errors import CheckFailed

__all__ = ["MasterWeights", "average_gradients", "over_masters"]

logger = logging.getLogger(__name__)

_CHUNK = 2**22
"""Weights whose masters are joined at once, or one parameter if it has more: 32 MB with their fp32 gradients."""

_BLOCK = 2**24
"""Gradients in one block, at least, where there are so many: a block of 32 MiB goes back to the system when freed."""

_ONE_BY_ONE = ("torch.optim.", "transformers.optimization", "bitsandbytes.optim.", "torchao.")
"""Modules of optimizers that update every parameter by its own gradient and state alone."""


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Average gradients over the ranks, for parameters that no wrapper does it for; every rank must call it.

    Args:
        parameters: the same on every rank, in the same order; one without a gradient counts with zeros.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        _average(parameter.grad)


def _average(gradient: torch.Tensor) -> None:
    torch.distributed.all_reduce(gradient)
    gradient /= torch.distributed.get_world_size()


class _Gradients:
    """Gradients of neighbouring parameters, in one block from the first backward of a step to their update.

    The first gradient of a step is kept as it is, and more are added up in fp32. Tensors of their own would come to lie
    between the activations of a backward, outlive those, and leave holes that the next one does not fit into.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.size = 0
        self._places: list[tuple[int, torch.Size]] = []
        self._flat: torch.Tensor | None = None
        self._known: set[int] = set()

    def make_room(self, shape: torch.Size) -> int:
        """The number of one more parameter."""
        self._places.append((self.size, shape))
        self.size += shape.numel()
        return len(self._places) - 1

    def get(self, number: int) -> torch.Tensor | None:
        """A parameter's gradient so far."""
        return self._view(number) if number in self._known else None

    def add(self, number: int, gradient: torch.Tensor) -> None:
        """The gradient of one backward."""
        if self._flat is None:
            self._flat = torch.empty(self.size, dtype=self.dtype, device=self.device)
        if number not in self._known:
            self._known.add(number)
            self._view(number).copy_(gradient)
        else:
            self._flat = self._flat.to(torch.float32)
            self._view(number).add_(gradient)

    def average(self) -> None:
        """Average all over the ranks in fp32; a parameter without a gradient counts with zeros."""
        zeros = torch.zeros((), dtype=self.dtype, device=self.device)
        for number in set(range(len(self._places))) - self._known:
            self.add(number, zeros)
        assert self._flat is not None
        self._flat = self._flat.to(torch.float32)
        _average(self._flat)

    def forget(self, number: int) -> None:
        """Let go of one; the memory goes with the last."""
        self._known.discard(number)
        if not self._known:
            self._flat = None

    def _view(self, number: int) -> torch.Tensor:
        assert self._flat is not None
        start, shape = self._places[number]
        return self._flat[start : start + shape.numel()].view(shape)


class _Master:
    """The fp32 value and the gradient of one parameter.

    Args:
        parameter: of the model.
        exact: its value in fp32, where that is known more exactly than the parameter holds it.
        gradients: where its gradient is kept.
    """

    def __init__(self, parameter: torch.nn.Parameter, exact: torch.Tensor | None, gradients: _Gradients) -> None:
        self.parameter = parameter
        self._gradients, self._number = gradients, gradients.make_room(parameter.shape)
        self.rest: torch.Tensor | None = None
        """What the parameter lacks: the lower halves beside bf16 (int16), nothing beside fp32, else the fp32 value."""
        if exact is not None:
            exact = exact.to(device=parameter.device, dtype=torch.float32)
        if parameter.dtype == torch.bfloat16:
            self.rest = _lower_halves(parameter.detach(), exact)
        elif parameter.dtype != torch.float32:
            self.rest = parameter.detach().float() if exact is None else exact
        # What the inner optimizer knows the master by; it has the master's value during `step` only.
        self.handle = torch.nn.Parameter(torch.zeros((), device=parameter.device).expand(parameter.shape))
        self._empty = self.handle.data
        self._hook: RemovableHandle | None = None
        self.attach()

    def attach(self) -> None:
        """Take every gradient that reaches the parameter; another optimizer's master of it is released."""
        if self._hook is not None:
            return
        hooks = cast("dict[int, Any] | None", getattr(self.parameter, "_post_accumulate_grad_hooks", None))
        for hook in list((hooks or {}).values()):
            if isinstance(owner := getattr(hook, "__self__", None), _Master):
                owner.release()
        if self.rest is not None and self.rest.dtype != torch.int16:
            # The lower halves of bf16 fit any weights; a whole master is dropped if the weights have moved meanwhile.
            moved = self.rest.to(self.parameter.dtype) != self.parameter.detach()
            self.rest = torch.where(moved, self.parameter.detach().float(), self.rest)
        self._hook = self.parameter.register_post_accumulate_grad_hook(self._collect)

    def release(self) -> None:
        """Leave the parameter to others, without a gradient."""
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
        """Of the backward passes since the last step."""
        return self._gradients.get(self._number)

    def forget_gradient(self) -> None:
        """Let go of it."""
        self.parameter.grad = None
        self._gradients.forget(self._number)

    def value(self) -> torch.Tensor:
        """The master: an fp32 tensor, which is the parameter's own where that is fp32."""
        weights = self.parameter.detach()
        if self.rest is None:
            return weights
        if self.rest.dtype != torch.int16:
            return self.rest
        return weights.float().view(torch.int32).add_(self.rest).view(torch.float32)

    def store(self, value: torch.Tensor) -> None:
        """Round a master into the parameter and keep the rest; `value` is used up."""
        if self.rest is None or self.rest.dtype != torch.int16:
            for kept in (self.rest, self.parameter.data):
                if kept is not None and kept.data_ptr() != value.data_ptr():
                    kept.copy_(value)
            return
        # Adding to the bits of some NaN would make numbers of them.
        bits = value.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=-math.inf).view(torch.int32)
        self.rest.copy_(bits)  # the lower 16 bits, from -2^15: a negative rest belongs to a number rounded up
        self.parameter.data.view(torch.int16).copy_(bits.add_(0x8000).bitwise_right_shift_(16))

    def begin_step(self, scale: float) -> None:
        """Give the handle the master and its gradient, if any, in fp32."""
        self.handle.data = self.value()
        if (gradient := self.gradient) is not None:
            self.handle.grad = gradient.to(torch.float32)
            self.handle.grad.mul_(scale)

    def end_step(self) -> None:
        """Keep what the optimizer made of it."""
        value, self.handle.data, self.handle.grad = self.handle.data, self._empty, None
        self.forget_gradient()
        self.store(value)

    def sum_of_bits(self) -> int:
        """A number that tells whether a saved rest belongs to the weights that the parameter holds."""
        return int(self.parameter.detach().view(torch.int16).sum(dtype=torch.int64))

    def state(self) -> dict[str, Any]:
        """What a checkpoint of the weights lacks."""
        if self.rest is None or self.rest.dtype != torch.int16:
            return {"rest": self.rest}
        return {"rest": self.rest, "sum_of_bits": self.sum_of_bits()}

    def load(self, state: dict[str, Any]) -> None:
        """Continue with a saved rest."""
        rest, saved = cast("torch.Tensor | None", state["rest"]), state.get("sum_of_bits")
        kind = None if rest is None else (rest.dtype, rest.shape)
        own = None if self.rest is None else (self.rest.dtype, self.rest.shape)
        if kind != own or (saved is not None and saved != self.sum_of_bits()):
            raise CheckFailed(
                "the checkpoint's master weights are the rest of other weights than the model holds: its files are of "
                "different steps, or it was written with another model or dtype. Resume from a whole checkpoint, with "
                "the configuration that wrote it."
            )
        if self.rest is not None and rest is not None:
            self.rest.copy_(rest)
            if self.rest.dtype != torch.int16:
                self.parameter.data.copy_(self.rest)


class MasterWeights(torch.optim.Optimizer):
    """An optimizer over fp32 masters of low-precision parameters.

    Gradients leave each parameter as soon as autograd has accumulated them there; `step` joins weights and rests to the
    masters, updates those and rounds them into the parameters. A checkpoint holds the rests, so a run that is resumed
    with the weights beside it continues from the masters and never from rounded weights.

    Optimizers of torch, transformers, bitsandbytes and torchao update a few parameters at a time; of any other the
    masters are all joined for its step (4 bytes a weight, and 4 for the gradients), since it may look across them.

    Args:
        groups: parameter groups as torch.optim takes them, over the model's own parameters.
        factory: makes the inner optimizer from groups over the masters.
        masters: fp32 values by parameter, where they are known more exactly than the parameter holds them. A bf16
            parameter whose master would equal it gets one spread over its rounding cells.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        factory: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        masters: dict[torch.nn.Parameter, torch.Tensor] | None = None,
    ) -> None:
        self._masters: dict[torch.nn.Parameter, _Master] = {}
        """By handle."""
        self._blocks: list[_Gradients] = []
        self._scale = 1.0
        master_groups: list[dict[str, Any]] = []
        for group in groups:
            handles: list[torch.nn.Parameter] = []
            for parameter in cast("Iterable[torch.nn.Parameter]", group["params"]):
                master = _Master(parameter, (masters or {}).get(parameter), self._block(parameter))
                self._masters[master.handle] = master
                handles.append(master.handle)
            master_groups.append({**group, "params": handles})
        self.inner = factory([group for group in master_groups if group["params"]])
        # torch's base class is set up with the inner optimizer's groups: learning-rate schedulers write into them.
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state

    def _block(self, parameter: torch.nn.Parameter) -> _Gradients:
        """Where the next parameter's gradient goes."""
        last = self._blocks[-1] if self._blocks else None
        if last is None or last.size >= _BLOCK or (last.dtype, last.device) != (parameter.dtype, parameter.device):
            self._blocks.append(_Gradients(parameter.dtype, parameter.device))
        return self._blocks[-1]

    def attach(self) -> None:
        """Collect the gradients of the parameters, as from the start; see `release`."""
        for master in self._masters.values():
            master.attach()

    def release(self) -> None:
        """Leave the parameters to other optimizers, until `attach`; gradients of an unfinished step are dropped."""
        for master in self._masters.values():
            master.release()

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """The parameters that it updates."""
        return [master.parameter for master in self._masters.values()]

    @property
    def masters(self) -> list[torch.Tensor]:
        """The fp32 values of `trained`, joined."""
        return [master.value() for master in self._masters.values()]

    @property
    def rests(self) -> list[torch.Tensor]:
        """The tensors that masters take beside the weights."""
        return [master.rest for master in self._masters.values() if master.rest is not None]

    @property
    def gradients(self) -> list[torch.Tensor]:
        """What the backward passes since the last step have left, before `clip_gradients` scales it."""
        return [master.gradient for master in self._masters.values() if master.gradient is not None]

    def all_reduce_gradients(self) -> None:
        """Average the gradients over the ranks in fp32; every rank must call it."""
        for block in self._blocks:
            block.average()

    def clip_gradients(self, max_norm: float) -> torch.Tensor:
        """Scale the next step's gradients to at most `max_norm`; returns the norm before."""
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in self.gradients]
        norm = torch.stack([n.to(norms[0].device) for n in norms]).norm() if norms else torch.zeros(())
        self._scale = float((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the masters from their gradients and round them into the parameters."""
        if closure is not None:
            raise ValueError("closure: optimizers that evaluate the loss themselves cannot run over masters.")
        for groups in self._chunks():
            chosen = [self._masters[handle] for group in groups for handle in group["params"]]
            for master in chosen:
                master.begin_step(self._scale)
            self.inner.param_groups = groups
            self.inner.step()
            self.inner.param_groups = self.param_groups
            for master in chosen:
                master.end_step()
        self._scale = 1.0
        return None

    def _chunks(self) -> Iterator[list[dict[str, Any]]]:
        """Groups of the parameters to update at once: all, where the optimizer may look across them."""
        if not f"{type(self.inner).__module__}.".startswith(_ONE_BY_ONE):
            yield self.param_groups
            return
        for group in self.param_groups:
            chunk: list[torch.nn.Parameter] = []
            # From the last to the first: the embedding, often the largest by far, when other gradients are gone.
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
        """Forget the gradients of parameters and masters."""
        for master in self._masters.values():
            master.forget_gradient()

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state and what the masters have beside the weights."""
        return {**self.inner.state_dict(), "masters": [master.state() for master in self._masters.values()]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore inner state and masters; the parameters must hold the weights that were saved with them.

        Raises:
            CheckFailed: the state is of another model, or of other weights.
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
    """Let an optimizer that was made over low-precision parameters update fp32 masters of them instead.

    Args:
        optimizer: its groups hold the masters afterwards, so that a scheduler over it stays in force.
        masters: as `MasterWeights` takes them.

    Returns:
        The `MasterWeights`; or the optimizer itself, with a warning, where it has stepped already, swaps weights by
        `train` and `eval`, or comes from a package that is not known to update every parameter by itself.
    """
    known = f"{type(optimizer).__module__}.".startswith(_ONE_BY_ONE) and not hasattr(optimizer, "eval")
    if not known or optimizer.state:
        logger.warning(
            "optimizers: %s updates 16-bit weights in place, and steps smaller than their rounding are lost. Pass one "
            "of torch.optim that has not stepped yet, which gets fp32 masters, or train in fp32 (bf16=False).",
            type(optimizer).__name__,
        )
        return optimizer

    def over(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        for own, group in zip([own for own in optimizer.param_groups if own["params"]], groups, strict=True):
            own["params"] = group["params"]
        return optimizer

    return MasterWeights([dict(group) for group in optimizer.param_groups], over, masters)


def _lower_halves(weights: torch.Tensor, exact: torch.Tensor | None) -> torch.Tensor:
    """The int16 numbers that, added to the bits of bf16 weights in fp32, give the bits of their exact values.

    Weights without exact values get random ones that round to the weights, zeros keep theirs, and so do weights that
    have been set to something else since they were rounded. The numbers are the same on every rank.
    """
    if exact is not None:
        rests = exact.contiguous().view(torch.int32) - weights.float().view(torch.int32)
        # 2^15 is a number in the middle of two that was rounded down to even; the next one below is as near.
        if rests.any() and rests.min() >= -0x8000 and rests.max() <= 0x8000:
            return rests.clamp_(max=0x7FFF).to(torch.int16)
    generator = torch.Generator(weights.device).manual_seed(0)
    noise = torch.randint(-0x7FFF, 0x8000, weights.shape, generator=generator, device=weights.device, dtype=torch.int16)
    return noise.mul_((weights != 0) & weights.isfinite())
