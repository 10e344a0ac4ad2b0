"""Numbers: which dtype computes fast here, and bf16 weights with fp32 masters.

bf16 has 8 bits of mantissa: a step of learning rate 1e-6 on a weight of 0.02 is smaller than the gap between two bf16
numbers, so an optimizer that updates bf16 weights in place loses most of its steps. `MasterWeights` keeps an fp32 copy
of every trained weight, accumulates gradients in fp32 and rounds to bf16 once per step (1710.03740).

Masters alone are not enough: a checkpoint saved in bf16 starts every master in the middle of its rounding cell, so the
bf16 weights that the forward sees stand still until the masters have crossed half a gap, which takes dozens of steps at
the learning rates of RL. Masters that start there are spread over their cells first: the weights keep their exact
values, and from the first step on a fraction of them moves, by as much on average as the masters do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch

from burnish.errors import CheckFailed

__all__ = ["MasterWeights", "average_gradients", "fast_bf16"]

logger = logging.getLogger(__name__)


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware on this device, about 5x faster than fp32 on CPUs that have them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        read = cast("Callable[[], dict[str, Any]] | None", getattr(torch.cpu, "get_capabilities", None))
        if read is None:
            logger.warning(
                "torch %s does not say what this CPU can do: computing in fp32. bf16=True forces bf16.",
                torch.__version__,
            )
            return False
        capabilities = read()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
    return False


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Average gradients over the ranks, for parameters that no wrapper does it for; every rank must call it.

    Args:
        parameters: the same on every rank, in the same order; one without a gradient counts with zeros.
    """
    size = torch.distributed.get_world_size()
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= size


class MasterWeights(torch.optim.Optimizer):
    """An optimizer over fp32 masters of low-precision parameters.

    Gradients leave each parameter as soon as autograd has accumulated them there and are added to the master's fp32
    gradient; `step` updates the masters and rounds them into the parameters. Checkpoints hold the masters, so a resumed
    run continues from them and never from the rounded weights.

    Args:
        groups: parameter groups as torch.optim takes them, over the model's own parameters.
        factory: makes the inner optimizer from groups over the masters.
        masters: fp32 values by parameter, where they are known more exactly than the parameter holds them; taken over
            without a copy. A bf16 parameter whose master would equal it gets one spread over its rounding cells.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        factory: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        masters: dict[torch.nn.Parameter, torch.Tensor] | None = None,
    ) -> None:
        self._pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []
        self._hooks: list[Any] = []
        master_groups: list[dict[str, Any]] = []
        for group in groups:
            parameters = cast("list[torch.nn.Parameter]", list(group["params"]))
            own = [self._make_master(p, (masters or {}).get(p)) for p in parameters]
            master_groups.append({**group, "params": own})
        self.inner = factory([group for group in master_groups if group["params"]])
        # torch's base class is set up with the inner optimizer's groups: learning-rate schedulers write into them.
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state

    def _make_master(self, parameter: torch.nn.Parameter, exact: torch.Tensor | None) -> torch.nn.Parameter:
        if exact is None:
            # Copied even where it is fp32 already: a master that shared storage with its parameter would be one tensor.
            exact = parameter.detach().to(torch.float32, copy=True)
        exact = exact.to(device=parameter.device, dtype=torch.float32)
        if parameter.dtype == torch.bfloat16 and torch.equal(exact, parameter.detach().float()):
            _spread_over_rounding_cells(exact)
        master = torch.nn.Parameter(exact)
        self._pairs.append((parameter, master))

        def collect(p: torch.Tensor) -> None:
            assert p.grad is not None
            if master.grad is None:
                master.grad = p.grad.to(torch.float32)
            else:
                master.grad += p.grad
            p.grad = None

        self._hooks.append(parameter.register_post_accumulate_grad_hook(collect))
        return master

    @property
    def masters(self) -> list[torch.nn.Parameter]:
        """The fp32 parameters, with their accumulated gradients."""
        return [master for _, master in self._pairs]

    def all_reduce_gradients(self) -> None:
        """Average the fp32 gradients over the ranks; every rank must call it."""
        average_gradients(self.masters)

    def clip_gradients(self, max_norm: float) -> torch.Tensor:
        """Scale the accumulated gradients to at most `max_norm`; returns the norm before."""
        return torch.nn.utils.clip_grad_norm_(self.masters, max_norm)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the masters from their gradients and round them into the parameters."""
        loss = self.inner.step(closure)
        for parameter, master in self._pairs:
            parameter.copy_(master)
            master.grad = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of parameters and masters."""
        for parameter, master in self._pairs:
            parameter.grad = None
            master.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state and the masters."""
        return {**self.inner.state_dict(), "masters": [master.detach() for master in self.masters]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore inner state and masters, and round the masters into the parameters."""
        saved = cast("Sequence[torch.Tensor]", state_dict["masters"])
        if len(saved) != len(self._pairs):
            raise CheckFailed(
                f"the checkpoint holds {len(saved)} master weights and the model trains {len(self._pairs)}: resume "
                "with the configuration that wrote it."
            )
        self.inner.load_state_dict({key: value for key, value in state_dict.items() if key != "masters"})
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state
        for (parameter, master), value in zip(self._pairs, saved, strict=True):
            master.copy_(value)
            parameter.copy_(master)

    def close(self) -> None:
        """Let the parameters keep their own gradients again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


@torch.no_grad()
def _spread_over_rounding_cells(values: torch.Tensor) -> None:
    """Replace fp32 values that bf16 holds exactly by random ones that round to them; zeros stay.

    A bf16 number is an fp32 number whose low 16 bits are 0, and those within 2^15 units in the last place round to it,
    also across a power of two. The numbers are the same on every rank.
    """
    generator = torch.Generator(values.device).manual_seed(0)
    noise = torch.randint(-0x7FFF, 0x8000, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    noise *= (values != 0) & values.isfinite()
    values.view(torch.int32).add_(noise)
