"""Optimizers of a run: one that is given covers what trains, one that is configured may hold fp32 masters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from burnish.errors import ConfigError
from burnish.model.masters import MasterWeights

__all__ = ["check_optimizer", "masters_by_config"]


def check_optimizer(optimizer: torch.optim.Optimizer | None, model: torch.nn.Module) -> None:
    """Refuse an optimizer that would leave trained weights where they are.

    Raises:
        ConfigError: naming a weight that it lacks.
    """
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = [name for name, parameter in trained.items() if id(parameter) not in held]
    if missing:
        raise ConfigError(
            f"optimizers: {type(optimizer).__name__} holds {len(trained) - len(missing)} of the {len(trained)} tensors "
            f"that train ({missing[0]} is missing), so the others would stay as they are. Make it over the parameters "
            "of the very model that you pass, with its adapters on it (peft.get_peft_model, and no peft_config here), "
            "freeze what is not to train, or name an optimizer by optim instead."
        )


def masters_by_config(
    trainer: Any,
    trained: Mapping[str, torch.nn.Parameter],
    decayed: Collection[str],
    exact: dict[torch.nn.Parameter, torch.Tensor],
) -> MasterWeights:
    """The configured optimizer over fp32 masters of the trained weights.

    Args:
        trainer: whose arguments name the optimizer.
        trained: weights that require gradients, by name.
        decayed: names of those that weight decay applies to.
        exact: values of weights that were rounded when they were loaded.

    Raises:
        ConfigError: an optimizer that picks or swaps parameters itself.
    """
    args = trainer.args
    cls, kwargs = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    # Schedule-free optimizers swap weights between training and evaluation by methods of those names.
    if not isinstance(cls, type) or {"params", "model", "optimizer_dict"} & set(kwargs) or hasattr(cls, "eval"):
        field = "optimizer_cls_and_kwargs" if trainer.optimizer_cls_and_kwargs else f"optim = {str(args.optim)!r}"
        raise ConfigError(
            f"{field}: {getattr(cls, '__name__', cls)} picks or swaps parameters itself and cannot "
            "run over fp32 masters. Use an AdamW, Adafactor or SGD variant, or bf16=False."
        )
    groups = [
        {
            "params": [parameter for name, parameter in trained.items() if (name in decayed) == decay],
            "weight_decay": args.weight_decay * decay,
        }
        for decay in (True, False)
    ]
    return MasterWeights(groups, lambda own: cls(own, **kwargs), exact)
