"""Checks of peft configurations: adapter types that cannot be trained here, and names that the model lacks."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any, cast

from burnish.errors import ConfigError

__all__ = ["OUTSIDE_WEIGHTS", "check_fit", "refuse_outside_weights"]

logger = logging.getLogger(__name__)

OUTSIDE_WEIGHTS = frozenset(
    (
        "ADAPTION_PROMPT",
        "CARTRIDGE",
        "CPT",
        "MULTITASK_PROMPT_TUNING",
        "P_TUNING",
        "PREFIX_TUNING",
        "PROMPT_TUNING",
        "XLORA",
    )
)
"""Adapter types with virtual tokens, keys or gates outside the weights of the model's layers."""


def refuse_outside_weights(peft_type: Any, name: str) -> None:
    """Refuse adapters that packed rows and shared prompts do not support.

    Args:
        peft_type: peft's name, or a member of its enumeration.
        name: begins the message.

    Raises:
        ConfigError: prompt, prefix or p-tuning, and similar adapters.
    """
    kind = str(getattr(peft_type, "value", peft_type)).upper()
    if kind in OUTSIDE_WEIGHTS:
        raise ConfigError(
            f"{name}: adapters of type {kind} add virtual tokens, keys or gates outside the model's layers, which "
            "packed rows and rollouts do not support. Use LoraConfig, or another adapter of weights."
        )


def check_fit(config: Any, model: Any) -> None:
    """Refuse names and indices that do not exist in this model, which peft ignores.

    Args:
        config: a peft configuration.
        model: the model to be adapted.

    Raises:
        ConfigError: a field names something that the model lacks.
    """
    modules = [name for name, _ in model.named_modules() if name]
    parameters = [name for name, _ in model.named_parameters()]
    for field, names in (("modules_to_save", modules), ("target_parameters", parameters)):
        if missing := _unmatched(getattr(config, field, None), names):
            raise ConfigError(f"peft_config.{field} = {missing[0]!r}: {_nothing(model, names)}.")
    for field in ("rank_pattern", "alpha_pattern"):
        for key in cast("dict[str, Any]", getattr(config, field, None) or {}):
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in (*modules, *parameters)):
                raise ConfigError(f"peft_config.{field} = {key!r}: {_nothing(model, modules)}.")
    for field in ("target_modules", "exclude_modules"):
        if missing := _unmatched(getattr(config, field, None), modules):
            logger.warning("peft_config.%s = %r: %s; the others are used.", field, missing[0], _nothing(model, modules))
    text = model.config.get_text_config()
    depth = getattr(text, "num_hidden_layers", None)
    layers = getattr(config, "layers_to_transform", None)
    for layer in [layers] if isinstance(layers, int) else list(layers or ()):
        if isinstance(depth, int) and not 0 <= layer < depth:
            raise ConfigError(
                f"peft_config.layers_to_transform = {layer}: {type(model).__name__} has the layers 0 to {depth - 1}."
            )
    tokens = getattr(config, "trainable_token_indices", None)
    size = int(model.get_input_embeddings().weight.shape[0])
    listed = cast("dict[str, list[int]]", tokens) if isinstance(tokens, dict) else {"": tokens or []}
    for token in (token for values in listed.values() for token in values):
        if not 0 <= token < size:
            raise ConfigError(
                f"peft_config.trainable_token_indices = {token}: {type(model).__name__} has the tokens 0 to {size - 1}."
            )


def _unmatched(wanted: Any, names: Iterable[str]) -> list[str]:
    """Return the listed names that no module or parameter ends with; a string is a pattern, which peft checks."""
    if not isinstance(wanted, list | tuple | set):
        return []
    known = list(names)
    listed = cast("Iterable[Any]", wanted)
    return sorted(str(w) for w in listed if not any(name == w or name.endswith(f".{w}") for name in known))


def _nothing(model: Any, names: Iterable[str]) -> str:
    last = sorted({name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()})
    return f"{type(model).__name__} has nothing of that name; it has {', '.join(last)}"
