"""Bounds of the fields of `[peft]`: peft accepts most bad values and fails later, or never."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

from annotated_types import Ge, Interval, MinLen

from burnish.config.declare import BelowOne, Count, FieldInfo, Meets, Natural, NonNegative, Text, declared, own
from burnish.config.sources import lora_fields
from burnish.config.validation import check_mapping
from burnish.errors import ConfigError

__all__ = ["check_lora", "known_lora_fields"]

_MODULES = "use a list of module names, or one regular expression"


def _pattern(text: str) -> str | None:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return _MODULES
    return None


def _range(pair: tuple[int, int]) -> str | None:
    return None if 0 <= pair[0] < pair[1] else "use ranges of layers, such as [[0, 4], [2, 5]]"


_Pattern = Annotated[str, MinLen(1), Meets(_pattern)]
_Names = Annotated[list[Text], MinLen(1)]
_Indices = Annotated[list[Natural], MinLen(1)]
_Rank = Annotated[float, Ge(1)]


@dataclass
class LoraFields:
    """Fields of `[peft]` with bounds; the others have the types of peft.LoraConfig."""

    r: Annotated[int, Interval(ge=1, le=2**16)] = own(
        8, "Rank of the adapters.", fix="use a rank of at least 1, such as 16"
    )
    lora_alpha: Count = own(
        8, "Scale of the adapters' output, divided by the rank.", fix="use a number above 0, such as twice r"
    )
    lora_dropout: BelowOne = own(0.0, "Dropout before the adapters, unless the stage disables dropout.")
    task_type: Literal["CAUSAL_LM", "SEQ_CLS"] | None = own(None, "Task of the model. None: set by the stage.")
    target_modules: _Names | _Pattern | None = own(
        None, "Modules that get adapters: names, one regular expression, or all-linear.", fix=_MODULES
    )
    exclude_modules: _Names | _Pattern | None = own(None, "Modules excluded from target_modules.", fix=_MODULES)
    modules_to_save: _Names | None = own(
        None, "Modules trained in full, such as embed_tokens.", fix="use a list of module names, or leave it out"
    )
    layers_to_transform: _Indices | Natural | None = own(
        None, "Indices of the layers that get adapters.", fix="use indices of layers, from 0, or leave it out"
    )
    layers_pattern: _Names | _Pattern | None = own(
        None, "Name of the module list that layers_to_transform indexes.", fix=_MODULES
    )
    rank_pattern: dict[_Pattern, _Rank] | None = own(
        None, "Regular expression of modules -> rank.", fix="use regular expressions with ranks of at least 1"
    )
    alpha_pattern: dict[_Pattern, NonNegative] | None = own(
        None, "Regular expression of modules -> lora_alpha.", fix="use regular expressions with numbers"
    )
    trainable_token_indices: _Indices | dict[Text, _Indices] | None = own(
        None, "Ids of tokens whose embeddings are trained.", fix="use a list of token ids, from 0, or one per module"
    )
    layer_replication: Annotated[list[Annotated[tuple[int, int], Meets(_range)]], MinLen(1)] | None = own(
        None, "Ranges of layers to stack into a larger model.", fix="use ranges, such as [[0, 4], [2, 5]]"
    )
    target_parameters: _Names | None = own(
        None, "Parameters that get adapters, such as MoE experts.", fix="use a list of parameter names, or leave it out"
    )
    qalora_group_size: Count = own(16, "Group size of QA-LoRA.")


@cache
def known_lora_fields() -> dict[str, FieldInfo]:
    """Return the fields of peft.LoraConfig that a file can set, with bounds. Loads neither peft nor torch."""
    return {name: declared(LoraFields).get(name, info) for name, info in lora_fields().items()}


def check_lora(table: Mapping[str, Any], where: str = "peft") -> dict[str, Any]:
    """Check the fields of a `LoraConfig` and return them coerced to its types. Loads neither peft nor torch.

    Args:
        table: field -> value, as parsed from a file.
        where: name of the table in messages.

    Raises:
        ConfigError: an unknown name, a wrong type, a bad value or a contradiction.
    """
    values = check_mapping(known_lora_fields(), table, where)
    if values.get("layers_pattern") and values.get("layers_to_transform") is None:
        raise ConfigError(f"[{where}] layers_pattern without layers_to_transform: set both, or remove it.")
    return values
