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

from burnish.kernels.elementwise import fuses, rms_norm
from burnish.model.fused import norm_epsilon

__all__ = ["fused_norms"]


@contextmanager
def fused_norms(model: nn.Module) -> Generator[None]:
    """Run RMS norms by the kernel, wherever it computes what the module does; autograd must be off.

    Args:
        model: its norms get another `forward`, restored on exit.
    """
    # Nothing is compiled for a model that has no use for it, such as one on a GPU.
    norms: list[Any] = [module for module in model.modules() if _may_be_fused(module)]
    found = [(norm, norm_epsilon(norm)) for norm in norms]
    fused = [_Norm(norm, epsilon) for norm, epsilon in found if epsilon is not None and fuses(norm.weight)]
    try:
        for norm in fused:
            norm.module.__dict__["forward"] = norm
        yield
    finally:
        for norm in fused:
            norm.module.__dict__.pop("forward", None)


def _may_be_fused(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return (
        "forward" not in module.__dict__
        and isinstance(weight, Tensor)
        and not isinstance(weight, FakeTensor)
        and weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
    )


class _Norm:
    """The kernel in a module's place.

    Args:
        module: an RMS norm, of whatever class.
        epsilon: the kernel's.
    """

    def __init__(self, module: Any, epsilon: float) -> None:
        self.module, self._epsilon, self._forward = module, epsilon, module.forward

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the norm's output."""
        # A traced forward is fused by the compiler; some models keep their residual stream in fp32.
        if isinstance(hidden, FakeTensor) or hidden.dtype != torch.bfloat16:
            return self._forward(hidden)
        return rms_norm(hidden, self.module.weight, self._epsilon)
