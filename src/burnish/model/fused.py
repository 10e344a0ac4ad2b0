"""Which modules of a model the elementwise kernels can stand in for: norms and gates, told by what they compute."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]

from burnish.kernels import elementwise

__all__ = ["epsilon_of", "is_silu", "norm_epsilon"]

_EPSILONS = ("variance_epsilon", "eps")
"""Names that modules give to their epsilon."""


def epsilon_of(module: nn.Module) -> float:
    """Return the epsilon of a norm, or 0 where it is not known."""
    return next((getattr(module, name) for name in _EPSILONS if hasattr(module, name)), 0.0)


def norm_epsilon(module: nn.Module) -> float | None:
    """Return the epsilon with which `elementwise.rms_norm` computes what a norm does, or None where it does not.

    The class is tried with weights of its own, in bf16 and on a CPU, whatever the module's are.
    """
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    if len(module._parameters) + len(module._buffers) != 1:  # pyright: ignore[reportPrivateUsage]
        return None
    epsilon = epsilon_of(module)
    if (type(module), epsilon) not in _agreeing:
        _agreeing[type(module), epsilon] = _agrees(module, epsilon)
    return epsilon if _agreeing[type(module), epsilon] else None


_agreeing: dict[tuple[type[nn.Module], float], bool] = {}


@torch.no_grad()
def _agrees(module: nn.Module, epsilon: float) -> bool:
    """Return whether kernel and class agree within bf16's rounding: classes differ in what they do to the weight."""
    with _disable_current_modes():
        generator = torch.Generator().manual_seed(0)
        hidden = 0.1 * torch.randn(4, 64, generator=generator)
        hidden[0] *= 0.01  # where the epsilon matters
        hidden, weight = (x.to(torch.bfloat16) for x in (hidden, torch.randn(64, generator=generator)))
        if not elementwise.fuses(hidden, weight):
            return False
        tried: Any = copy.copy(module)
        tried._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
        try:
            expected = type(module).forward(tried, hidden)
        except (RuntimeError, TypeError, AttributeError, ValueError):  # it needs more than its weight
            return False
        found = elementwise.rms_norm(hidden, weight, epsilon)
        return torch.allclose(found.float(), expected.float(), rtol=2**-6, atol=1e-6)


@cache
def _is_silu(kind: type[nn.Module]) -> bool:
    with _disable_current_modes(), torch.no_grad():
        x = torch.linspace(-9, 9, 64)
        try:
            return torch.equal(kind()(x), nn.functional.silu(x))
        except (RuntimeError, TypeError):  # it has arguments
            return False


def is_silu(activation: nn.Module) -> bool:
    """Return whether an activation is x sigmoid(x)."""
    return _is_silu(type(activation))
