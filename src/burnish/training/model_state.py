"""Leave a model after training as it was before, but for its weights, so that another trainer can take it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from typing import Any

from burnish.model.checkpointing import disable_checkpointing, is_checkpointed
from burnish.model.dropout import without_dropout
from burnish.model.masters import MasterWeights
from burnish.model.scoring import causal_lm

__all__ = ["restoring_model_state"]


@contextmanager
def restoring_model_state(model: Any, masters: Callable[[], MasterWeights | None], *, dropout: bool) -> Generator[None]:
    """Train a model inside; however that ends, restore its dropout and checkpointing and drop hooks and gradients.

    Args:
        model: the trained model, adapters included.
        masters: returns the optimizer that owns fp32 masters of its weights, if there is one by then.
        dropout: whether dropout stays on during training.
    """
    checkpointed = is_checkpointed(model)
    with nullcontext() if dropout else without_dropout(model):
        try:
            yield
        finally:
            if (owner := masters()) is not None:
                owner.release()
            model.zero_grad(set_to_none=True)
            if is_checkpointed(model) and not checkpointed:
                disable_checkpointing(causal_lm(model))
