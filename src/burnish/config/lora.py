"""The values that the fields of `[peft]` may have: peft itself takes most of them and fails at the model, or never."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

from annotated_types import Interval, MinLen

from burnish.config.declare import Count, FieldInfo, Meets, Natural, NonNegative, Text
from burnish.config.sources import lora_fields
from burnish.config.validation import check_mapping
from burnish.errors import ConfigError

__all__ = ["check_lora", "known_lora_fields"]

_MODULES = "use a list of names of modules, or one regular expression"


def _pattern(text: str) -> str | None:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return _MODULES
    return None


def _range(pair: tuple[int, int]) -> str | None:
    return None if 0 <= pair[0] < pair[1] else "use ranges of layers, such as [[0, 4], [2, 5]]"


Pattern = Annotated[str, MinLen(1), Meets(_pattern)]
Names = Annotated[list[Text], MinLen(1)]
Indices = Annotated[list[Natural], MinLen(1)]

_BOUNDS: dict[str, tuple[Any, str]] = {
    "r": (Annotated[int, Interval(ge=1, le=2**16)], "use a rank of at least 1, such as 16"),
    "lora_alpha": (Annotated[int, Interval(ge=1)], "use a number above 0, such as twice r"),
    "lora_dropout": (Annotated[float, Interval(ge=0, lt=1)], ""),
    "task_type": (Literal["CAUSAL_LM", "SEQ_CLS"] | None, ""),
    "target_modules": (Names | Pattern | None, _MODULES),
    "exclude_modules": (Names | Pattern | None, _MODULES),
    "layers_pattern": (Names | Pattern | None, _MODULES),
    "modules_to_save": (Names | None, "use a list of names of modules, or leave it out"),
    "target_parameters": (Names | None, "use a list of names of parameters, or leave it out"),
    "layers_to_transform": (Indices | Natural | None, "use the numbers of layers, from 0, or leave it out"),
    "rank_pattern": (
        dict[Pattern, Annotated[float, Interval(ge=1)]] | None,
        "use regular expressions with ranks of at least 1",
    ),
    "alpha_pattern": (dict[Pattern, NonNegative] | None, "use regular expressions with numbers"),
    "trainable_token_indices": (
        Indices | dict[Text, Indices] | None,
        "use a list of token ids, from 0, or one by module",
    ),
    "layer_replication": (
        Annotated[list[Annotated[tuple[int, int], Meets(_range)]], MinLen(1)] | None,
        "use ranges of layers, such as [[0, 4], [2, 5]]",
    ),
    "qalora_group_size": (Count, ""),
}
"""Field -> its type with bounds, and how to correct a value out of bounds where the bounds do not say it."""


@cache
def known_lora_fields() -> dict[str, FieldInfo]:
    """The fields of peft.LoraConfig that a file can set, with their bounds. Loads neither peft nor torch."""
    found = dict(lora_fields())
    for name, (hint, fix) in _BOUNDS.items():
        found[name] = dataclasses.replace(found[name], hint=hint, fix=fix)
    return found


def check_lora(table: Mapping[str, Any], where: str = "peft") -> dict[str, Any]:
    """Check the fields of a `LoraConfig` and return them in the types that it wants. Loads neither peft nor torch.

    Args:
        table: field -> value, as parsed from a file.
        where: the table's name, for messages.

    Raises:
        ConfigError: an unknown name, a wrong type, a bad value or a contradiction.
    """
    values = check_mapping(known_lora_fields(), table, where)
    if values.get("layers_pattern") and values.get("layers_to_transform") is None:
        raise ConfigError(f"[{where}] layers_pattern without layers_to_transform: set both, or remove it.")
    return values
