"""A head's log-probability and entropy by definition, and small operands."""

from __future__ import annotations

import torch
from torch import Tensor

from burnish.model.tiled_head import HeadSpec

NUM_TOKENS, HIDDEN, VOCAB, RANK = 7, 5, 23, 2
IDENTITY = HeadSpec()
TINY_TILE = 600  # bytes: several tiles both ways at the sizes above


def operands(seed: int = 0, requires_grad: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (NUM_TOKENS, HIDDEN), "weight": (VOCAB, HIDDEN), "bias": (VOCAB,), "u": (NUM_TOKENS, RANK)}
    shapes["b"] = (VOCAB, RANK)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)
        for name, shape in shapes.items()
    }


def targets(seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, (NUM_TOKENS,), generator=torch.Generator().manual_seed(seed))


def plain(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    temperature: float = 1.0,
    spec: HeadSpec = IDENTITY,
) -> tuple[Tensor, Tensor]:
    """The definition, with every logit in memory."""
    z = hidden @ weight.t()
    z = z if bias is None else z + bias
    z = z if low_rank is None else z + low_rank[0] @ low_rank[1].t()
    z = z * spec.scale
    z = z if spec.softcap is None else spec.softcap * torch.tanh(z / spec.softcap)
    logp = torch.log_softmax(z / temperature, -1)
    return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
