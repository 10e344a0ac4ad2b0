"""An input embedding in host memory: its rows are looked up there, and only they go to the device."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from burnish.errors import ConfigError
from burnish.model.scoring import causal_lm
from burnish.model.traced import on_host

__all__ = ["check_embedding_on_host", "keep_embedding_on_host"]


def keep_embedding_on_host(model: nn.Module) -> None:
    """Keep the input embedding of a model in host memory, V * H numbers, also when the model moves to a device.

    Each forward reads token ids on the host, which waits for what the device still computes.

    Args:
        model: changed in place; its embedding is frozen and not tied to the head.

    Raises:
        ConfigError: the embedding trains, is the head's weight too, carries adapters, or scales its rows.
    """
    check_embedding_on_host(model)
    embedding: Any = causal_lm(model).get_input_embeddings()
    # Outside the parameters, `to` does not move it; the state dict still has it.
    weight = embedding.weight.detach().to("cpu")
    del embedding.weight
    if torch.cuda.is_available():
        weight = weight.pin_memory()
    embedding.__dict__["weight"] = weight
    embedding.register_state_dict_post_hook(_add_weight)
    embedding.forward = MethodType(_forward, embedding)


def check_embedding_on_host(model: nn.Module) -> None:
    """Refuse a model whose input embedding cannot stay in host memory; it may be one without values.

    Raises:
        ConfigError: see `keep_embedding_on_host`.
    """
    lm = causal_lm(model)
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()  # a classifier has no such head
    reason = None
    if type(embedding) is not nn.Embedding:
        reason = f"its input embedding is a {type(embedding).__name__}"
    elif head is not None and embedding.weight is head.weight:
        reason = "its input embedding is the head's weight too"
    elif embedding.weight.requires_grad:
        reason = "its input embedding trains"
    if reason is not None:
        raise ConfigError(
            f"embedding_offloading = True: {type(lm).__name__} cannot keep it on the host, because {reason}; remove "
            "embedding_offloading, or train adapters on an untied model."
        )


def _add_weight(embedding: Any, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    state[f"{prefix}weight"] = embedding.weight


def _forward(self: Any, token_ids: Tensor) -> Tensor:
    with on_host():
        rows = type(self).forward(self, token_ids.to("cpu"))
    return rows.to(token_ids.device, non_blocking=True, copy=is_fake(rows))
