"""What values the fields of `[peft]` may have: peft itself takes most of them and fails at the model, or never."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from burnish.config.checks import check_mapping
from burnish.config.inherited import lora_fields
from burnish.config.predicates import Rule, above, count, is_number, is_text, list_of, one_of, optional
from burnish.errors import ConfigError, show

__all__ = ["check_lora"]


def check_lora(table: Mapping[str, Any], where: str = "peft") -> dict[str, Any]:
    """Check the fields of a `LoraConfig` and return them in the types that it wants. Loads neither peft nor torch.

    Args:
        table: field -> value, as parsed from a file.
        where: the table's name, for messages.

    Raises:
        ConfigError: an unknown name, a wrong type, a bad value or a contradiction.
    """
    values = check_mapping(lora_fields(), table, where)
    for name, holds, fix in _RULES:
        if name in values and not holds(values[name]):
            raise ConfigError(f"[{where}] {name} = {show(values[name])}: {fix}.")
    if values.get("layers_pattern") and values.get("layers_to_transform") is None:
        raise ConfigError(f"[{where}] layers_pattern without layers_to_transform: set both, or remove it.")
    return values


def _is_pattern(value: Any) -> bool:
    if not is_text(value):
        return False
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _are_modules(value: Any) -> bool:
    return _is_pattern(value) if isinstance(value, str) else list_of(is_text)(value)


def _by_pattern(value: Any, lowest: float) -> bool:
    return isinstance(value, dict) and all(
        _is_pattern(key) and is_number(item) and item >= lowest for key, item in cast("dict[Any, Any]", value).items()
    )


def _are_indices(value: Any) -> bool:
    if isinstance(value, dict):
        return all(is_text(key) and _are_indices(item) for key, item in cast("dict[Any, Any]", value).items())
    return list_of(count(0))(value)


def _are_ranges(value: Any) -> bool:
    return list_of(lambda pair: 0 <= pair[0] < pair[1])(value)


_MODULES = "use a list of names of modules, or one regular expression"

_RULES: tuple[Rule, ...] = (
    ("r", lambda value: count(1)(value) and value <= 2**16, "use a rank of at least 1, such as 16"),
    ("lora_alpha", above(0), "use a number above 0, such as twice r"),
    ("lora_dropout", lambda value: is_number(value) and 0 <= value < 1, "use a number in [0, 1)"),
    ("task_type", optional(one_of("CAUSAL_LM", "SEQ_CLS")), "use CAUSAL_LM or SEQ_CLS, or leave it out"),
    ("target_modules", optional(_are_modules), _MODULES),
    ("exclude_modules", optional(_are_modules), _MODULES),
    ("layers_pattern", optional(_are_modules), _MODULES),
    ("modules_to_save", optional(list_of(is_text)), "use a list of names of modules, or leave it out"),
    ("target_parameters", optional(list_of(is_text)), "use a list of names of parameters, or leave it out"),
    (
        "layers_to_transform",
        optional(lambda value: count(0)(value) or list_of(count(0))(value)),
        "use the numbers of layers, from 0, or leave it out",
    ),
    ("rank_pattern", optional(lambda value: _by_pattern(value, 1)), "use regular expressions with ranks of at least 1"),
    ("alpha_pattern", optional(lambda value: _by_pattern(value, 0)), "use regular expressions with numbers"),
    ("trainable_token_indices", optional(_are_indices), "use a list of token ids, from 0, or one by module"),
    ("layer_replication", optional(_are_ranges), "use ranges of layers, such as [[0, 4], [2, 5]]"),
    ("qalora_group_size", count(1), "use at least 1"),
)
