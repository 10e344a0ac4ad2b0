"""Check a given optimizer, and create the configured one over fp32 masters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from burnish.errors import ConfigError
from burnish.model.masters import MasterWeights

__all__ = ["check_optimizer", "masters_by_config"]


def check_optimizer(optimizer: torch.optim.Optimizer | None, model: torch.nn.Module) -> None:
    """Refuse an optimizer that lacks trained weights.

    Raises:
        ConfigError: with the name of a missing weight.
    """
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = [name for name, parameter in trained.items() if id(parameter) not in held]
    if missing:
        raise ConfigError(
            f"optimizers: {type(optimizer).__name__} holds {len(trained) - len(missing)} of the {len(trained)} tensors "
            f"that train ({missing[0]} is missing), so the others would not train. Create it from the parameters of "
            "the model that you pass, adapters included (peft.get_peft_model, and no peft_config here), freeze the "
            "weights that should not train, or set optim instead."
        )


def masters_by_config(
    trainer: Any,
    trained: Mapping[str, torch.nn.Parameter],
    decayed: Collection[str],
    exact: dict[torch.nn.Parameter, torch.Tensor],
) -> MasterWeights:
    """Create the configured optimizer over fp32 masters of the trained weights.

    Args:
        trainer: trainer whose arguments name the optimizer.
        trained: weights that require gradients, by name.
        decayed: names of the weights with weight decay.
        exact: fp32 values of weights that were rounded on loading.

    Raises:
        ConfigError: the optimizer selects or swaps parameters itself.
    """
    args = trainer.args
    cls, kwargs = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    # Schedule-free optimizers swap weights between training and evaluation by methods of those names.
    if not isinstance(cls, type) or {"params", "model", "optimizer_dict"} & set(kwargs) or hasattr(cls, "eval"):
        field = "optimizer_cls_and_kwargs" if trainer.optimizer_cls_and_kwargs else f"optim = {str(args.optim)!r}"
        raise ConfigError(
            f"{field}: {getattr(cls, '__name__', cls)} selects or swaps parameters itself and cannot "
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
