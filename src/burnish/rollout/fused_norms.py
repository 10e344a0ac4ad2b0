"""RMS norms of a decode forward as one operator each, in bf16 on a CPU.

A norm of transformers' is seven operators, a quarter of those of a layer, and with few rows the operators' own overhead
is all that it costs.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from burnish.rollout.cpu_kernels import CPUKernels, cpu_kernels

__all__ = ["epsilon_of", "fused_norms"]

_EPSILONS = ("variance_epsilon", "eps")
"""Names that modules give to their epsilon."""


@contextmanager
def fused_norms(model: nn.Module) -> Generator[None]:
    """Run RMS norms by the kernel, wherever it computes what the module does; autograd must be off.

    Args:
        model: its norms get another `forward`, restored on exit.
    """
    modules = [module for module in model.modules() if _may_be_fused(module)]
    # Not compiled for a model that has no use for it, such as one on a GPU.
    kernels = cpu_kernels() if modules else None
    norms = [] if kernels is None else [_Norm(module, kernels) for module in modules]
    agree = {kind: norm.agrees() for kind, norm in {type(norm.module): norm for norm in norms}.items()}
    fused = [norm for norm in norms if agree[type(norm.module)]]
    try:
        for norm in fused:
            norm.module.__dict__["forward"] = norm
        yield
    finally:
        for norm in fused:
            norm.module.__dict__.pop("forward", None)


def epsilon_of(module: nn.Module) -> float:
    """Return the epsilon of a norm, or 0 where it is not known."""
    return next((getattr(module, name) for name in _EPSILONS if hasattr(module, name)), 0.0)


def _may_be_fused(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and "forward" not in module.__dict__
        and isinstance(weight, Tensor)
        and not isinstance(weight, FakeTensor)
        and weight.dim() == 1
        and weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and getattr(module, "bias", None) is None
    )


class _Norm:
    """The kernel in a module's place.

    Args:
        module: an RMS norm, of whatever class.
        kernels: the compiled kernels.
    """

    def __init__(self, module: Any, kernels: CPUKernels) -> None:
        self.module, self._kernels, self._forward = module, kernels, module.forward
        self._epsilon = epsilon_of(module)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the norm's output."""
        # A traced forward is fused by the compiler; some models keep their residual stream in fp32.
        if isinstance(hidden, FakeTensor) or hidden.dtype != torch.bfloat16:
            return self._forward(hidden)
        return self._kernels.rms_norm(hidden, self.module.weight, self._epsilon)

    def agrees(self) -> bool:
        """Return whether the kernel computes what the module does, within bf16's rounding: classes differ."""
        generator = torch.Generator().manual_seed(0)
        hidden = 0.1 * torch.randn(4, len(self.module.weight), generator=generator)
        hidden[0] *= 0.01  # where the epsilon matters
        hidden = hidden.to(torch.bfloat16)
        return torch.allclose(self(hidden).float(), self._forward(hidden).float(), rtol=2**-6, atol=1e-6)
