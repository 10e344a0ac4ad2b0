"""Hand a model over to the next trainer: after training only its weights differ, however training ended."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from burnish.model.dropout import without_dropout
from burnish.model.masters import MasterWeights
from burnish.model.scoring import causal_lm

__all__ = ["handed_over"]


@contextmanager
def handed_over(model: Any, masters: Callable[[], MasterWeights | None], *, dropout: bool) -> Generator[None]:
    """Train a model inside; afterwards it has its own dropout, no hooks, no gradients and its own checkpointing.

    Args:
        model: what is trained, adapters included.
        masters: the optimizer that owns fp32 masters of its weights, if there is one by then.
        dropout: whether dropout stays on meanwhile.
    """
    checkpointing = _checkpoints(model)
    with nullcontext() if dropout else without_dropout(model):
        try:
            yield
        finally:
            if (owner := masters()) is not None:
                owner.release()
            model.zero_grad(set_to_none=True)
            if _checkpoints(model) and not checkpointing:
                _stop_checkpointing(causal_lm(model))


def _checkpoints(model: torch.nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())


def _stop_checkpointing(lm: Any) -> None:
    # transformers 5.17 knows the second name only.
    (getattr(lm, "activation_checkpointing_disable", None) or lm.gradient_checkpointing_disable)()
