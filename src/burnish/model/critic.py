"""The models that critics are: sequence classifiers with one label, whose score at a place is the value of that state.

A critic is a second model, or, where the policy is a frozen base with adapters, a second set of modules around the same
base weights: its decoder holds the policy's own tensors, and only its adapters and its score are new. So the two models
have separate modes, adapters and gradients, nothing has to be switched, and the policy is saved and resumed as if there
were no critic.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from burnish.errors import ModelError
from burnish.model.adapters import Exact, add_adapters
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
"""Values of `init_lora_weights` that do not rewrite the weights under the adapter."""


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
    """A critic that is a model of its own, prepared for `reward_scores`.

    Args:
        model: name, folder, .gguf file, package, or a model in memory, which is copied: it may be the policy, or the
            reward model that gives the rewards. A classifier with one label keeps its score, a causal language model
            gets a new one.
        bf16: compute in bf16; the score itself stays fp32.
        seed: of a new score and of adapters.
        pad_token_id: written into the configuration, for transformers to read scores of padded rows by.
        init_kwargs: passed to `from_pretrained`.
        peft_config: train these adapters and the score, on a frozen base of the critic's own.
        dropout: keep the dropout of model and adapters.

    Returns:
        The model, and fp32 values by parameter for those rounded here.

    Raises:
        ModelError: no such model, more than one label, an architecture without a sequence classifier, or adapters of
            another task.
    """
    if not isinstance(model, str | Path):
        if not is_reward_model(model):
            _refuse_adapters(model)
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
    """A critic on the frozen base of a policy with adapters, prepared for `reward_scores`.

    Its base parameters are the policy's, not copies; adapters and score are its own.

    Args:
        policy: a peft model; it is left as it is.
        seed: of the new score and adapters.
        pad_token_id: as in `load_value_model`.
        peft_config: the critic's adapters; None: of the policy's kind and size, newly drawn.
        dropout: as in `load_value_model`.

    Raises:
        ModelError: the policy has no adapters, trains weights of its base, or the critic's adapters would rewrite
            them.
    """
    fix = "Pass a value_model of its own."
    configs = cast("dict[str, Any] | None", getattr(policy, "peft_config", None))
    if configs is None or not callable(getattr(policy, "unload", None)):
        raise ModelError(f"policy = {type(policy).__name__}: it has no adapters on a base that could be shared. {fix}")
    config = _like(configs[policy.active_adapters[0]]) if peft_config is None else classifier_adapters(peft_config)
    start = getattr(config, "init_lora_weights", True)
    if start not in _LEAVES_BASE_ALONE:
        raise ModelError(
            f"init_lora_weights = {start!r}: it rewrites the base weights, which are the policy's too. Use True, "
            "'gaussian' or 'orthogonal' for the critic."
        )
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*policy.parameters(), *policy.buffers())}
    # A copy of the modules alone: deepcopy takes every tensor in `shared` for copied already.
    base = copy.deepcopy(policy, shared).unload()
    made = to_reward_model(base, seed=seed)
    trained = [name for name, p in getattr(made, made.base_model_prefix).named_parameters() if p.requires_grad]
    if trained:
        raise ModelError(
            f"policy: it trains {trained[0]} (and {len(trained) - 1} more) of its base, so the critic's base would "
            f"move with it. Use adapters without trained biases and without modules_to_save. {fix}"
        )
    model, exact = add_adapters(made, config, seed=seed)
    return _prepared(model, exact, pad_token_id, dropout=dropout)


def _like(policy_config: Any) -> Any:
    """Adapters of the policy's kind and size for a classifier, with the usual start."""
    config = copy.deepcopy(policy_config)
    config.task_type = None
    config.inference_mode = False
    for name, value in (("modules_to_save", None), ("trainable_token_indices", None), ("init_lora_weights", True)):
        if hasattr(config, name):
            setattr(config, name, value)
    return classifier_adapters(config)


def _refuse_adapters(model: Any) -> None:
    if hasattr(model, "peft_config"):
        raise ModelError(
            f"value_model = {type(model).__name__}: it has adapters already. Pass the model without them, or none for "
            "a critic on the policy's base."
        )


def _widen_score(classifier: Any, exact: Exact) -> None:
    """Let the score compute in fp32: bf16 knows a value of 1 to 0.004, as much as one token's advantage may be."""
    for parameter in classifier.score.parameters():
        value = exact.pop(parameter, parameter.data)
        parameter.data = value.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))
    classifier.score.register_forward_pre_hook(_to_own_dtype)


def _to_own_dtype(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (inputs[0].to(next(module.parameters()).dtype), *inputs[1:])


def _prepared(model: Any, exact: Exact, pad_token_id: int | None, *, dropout: bool) -> Any:
    _widen_score(causal_lm(model), exact)
    causal_lm(model).config.get_text_config().pad_token_id = pad_token_id
    if not dropout:
        disable_dropout(model)
    prepare_for_rewards(model)
    return model.eval()
