"""Critics: sequence classifiers with one label, whose score at a token is the value of that state.

A critic is a separate model or, where the policy is a frozen base with adapters, a second set of modules around the
same base weights with its own adapters and score layer. Policy and critic then have separate modes, adapters and
gradients without switching, and the policy is saved and resumed as if there were no critic.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from burnish.errors import ModelError
from burnish.model.adapters import Exact, add_adapters, copy_modules
from burnish.model.classifier import (
    classifier_adapters,
    is_reward_model,
    load_reward_model,
    prepare_for_rewards,
    to_reward_model,
)
from burnish.model.dropout import disable_dropout
from burnish.model.quantization import is_quantized
from burnish.model.scoring import causal_lm

__all__ = ["load_value_model", "share_base"]

_LEAVES_BASE_ALONE = (True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that do not modify the base weights."""


def load_value_model(
    model: str | Path | PreTrainedModel,
    *,
    bf16: bool,
    seed: int,
    pad_token_id: int | None,
    init_kwargs: Mapping[str, Any] | None = None,
    peft_config: Any = None,
    dropout: bool = False,
) -> tuple[Any, Exact]:
    """Load a separate critic, prepared for `reward_scores`.

    Args:
        model: name, folder, .gguf file, package, or a model in memory, which is copied: it may be the policy or the
            reward model. A classifier with one label keeps its score layer, a causal language model gets a new one.
        bf16: compute in bf16; the score layer stays fp32.
        seed: seed of a new score layer and of adapters.
        pad_token_id: written into the configuration, where transformers needs it to score padded rows.
        init_kwargs: passed to `from_pretrained`.
        peft_config: train these adapters and the score layer on the critic's frozen base.
        dropout: keep the dropout of model and adapters.

    Returns:
        The model, and exact fp32 values of the parameters that were rounded.

    Raises:
        ModelError: the model is not found or has more than one label, its architecture has no sequence classifier, or
            the adapters are for another task.
    """
    if not isinstance(model, str | Path):
        if hasattr(model, "peft_config") and not is_reward_model(model):
            raise ModelError(
                f"value_model = {type(model).__name__}: it already has adapters. Pass the model without them, or omit "
                "value_model for a critic on the policy's base."
            )
        model = copy.deepcopy(model)
    loaded, exact = load_reward_model(model, bf16=bf16, seed=seed, init_kwargs=init_kwargs)
    if peft_config is None and is_quantized(causal_lm(loaded)) and not hasattr(loaded, "peft_config"):
        raise ModelError("value_peft_config = None: quantised weights cannot be trained; pass adapters for the critic.")
    if peft_config is not None:
        loaded, exact = add_adapters(loaded, classifier_adapters(peft_config), seed=seed)
    return _prepared(loaded, exact, pad_token_id, dropout=dropout), exact


def share_base(
    policy: Any, *, seed: int, pad_token_id: int | None, peft_config: Any = None, dropout: bool = False
) -> Any:
    """Build a critic on the frozen base of a policy with adapters, prepared for `reward_scores`.

    Its base parameters are the policy's, not copies; adapters and score layer are new.

    Args:
        policy: a peft model; not changed.
        seed: seed of the new score layer and adapters.
        pad_token_id: as in `load_value_model`.
        peft_config: the critic's adapters; None draws new ones of the policy's type and size.
        dropout: as in `load_value_model`.

    Raises:
        ModelError: the policy has no adapters or trains weights of its base, or the critic's adapters would modify
            the base.
    """
    fix = "Pass a separate value_model."
    configs = cast("dict[str, Any] | None", getattr(policy, "peft_config", None))
    if configs is None or not callable(getattr(policy, "unload", None)):
        raise ModelError(f"policy = {type(policy).__name__}: it has no adapters on a base that could be shared. {fix}")
    if peft_config is None:
        peft_config = copy.deepcopy(configs[policy.active_adapters[0]])
        peft_config.task_type, peft_config.inference_mode = None, False
        for name, value in (("modules_to_save", None), ("trainable_token_indices", None), ("init_lora_weights", True)):
            if hasattr(peft_config, name):
                setattr(peft_config, name, value)
    config = classifier_adapters(peft_config)
    start = getattr(config, "init_lora_weights", True)
    if start not in _LEAVES_BASE_ALONE:
        raise ModelError(
            f"init_lora_weights = {start!r}: it modifies the base weights, which are the policy's too. Use True, "
            "'gaussian' or 'orthogonal' for the critic."
        )
    base = copy_modules(policy).unload()
    made = to_reward_model(base, seed=seed)
    trained = [name for name, p in getattr(made, made.base_model_prefix).named_parameters() if p.requires_grad]
    if trained:
        raise ModelError(
            f"policy: it trains {trained[0]} (and {len(trained) - 1} more) of its base, so the critic's base would "
            f"move with it. Use adapters without trained biases and without modules_to_save. {fix}"
        )
    model, exact = add_adapters(made, config, seed=seed)
    return _prepared(model, exact, pad_token_id, dropout=dropout)


def _prepared(model: Any, exact: Exact, pad_token_id: int | None, *, dropout: bool) -> Any:
    classifier = causal_lm(model)
    # The score layer computes in fp32: bf16 resolves a value of 1 to 0.004, as much as one token's advantage may be.
    for parameter in classifier.score.parameters():
        value = exact.pop(parameter, parameter.data)
        parameter.data = value.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))

    def widen(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0].to(next(module.parameters()).dtype), *inputs[1:])

    classifier.score.register_forward_pre_hook(widen)
    classifier.config.get_text_config().pad_token_id = pad_token_id
    if not dropout:
        disable_dropout(model)
    prepare_for_rewards(model)
    return model.eval()
