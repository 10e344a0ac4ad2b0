"""The values that the fields of `[peft]` may have: peft itself takes most of them and fails at the model, or never."""

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

_MODULES = "use a list of names of modules, or one regular expression"


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
    """The fields of `[peft]` whose values are bounded here; the others are as peft.LoraConfig annotates them."""

    r: Annotated[int, Interval(ge=1, le=2**16)] = own(
        8, "Rank of the adapters.", fix="use a rank of at least 1, such as 16"
    )
    lora_alpha: Count = own(
        8, "Scale of the adapters' output, divided by the rank.", fix="use a number above 0, such as twice r"
    )
    lora_dropout: BelowOne = own(0.0, "Dropout before the adapters, where the stage leaves dropout on.")
    task_type: Literal["CAUSAL_LM", "SEQ_CLS"] | None = own(None, "What the model is for. None: as the stage says.")
    target_modules: _Names | _Pattern | None = own(
        None, "Modules that get adapters: names, one regular expression, or all-linear.", fix=_MODULES
    )
    exclude_modules: _Names | _Pattern | None = own(None, "Modules that get none.", fix=_MODULES)
    modules_to_save: _Names | None = own(
        None, "Modules trained in full, such as embed_tokens.", fix="use a list of names of modules, or leave it out"
    )
    layers_to_transform: _Indices | Natural | None = own(
        None, "Layers that get adapters, counted from 0.", fix="use the numbers of layers, from 0, or leave it out"
    )
    layers_pattern: _Names | _Pattern | None = own(
        None, "Name of the list of layers, beside layers_to_transform.", fix=_MODULES
    )
    rank_pattern: dict[_Pattern, _Rank] | None = own(
        None, "Ranks by regular expression of modules.", fix="use regular expressions with ranks of at least 1"
    )
    alpha_pattern: dict[_Pattern, NonNegative] | None = own(
        None, "lora_alpha by regular expression of modules.", fix="use regular expressions with numbers"
    )
    trainable_token_indices: _Indices | dict[Text, _Indices] | None = own(
        None, "Tokens whose embeddings are trained.", fix="use a list of token ids, from 0, or one by module"
    )
    layer_replication: Annotated[list[Annotated[tuple[int, int], Meets(_range)]], MinLen(1)] | None = own(
        None, "Ranges of layers that a larger model is stacked from.", fix="use ranges, such as [[0, 4], [2, 5]]"
    )
    target_parameters: _Names | None = own(
        None, "Parameters that get adapters (experts of MoE).", fix="use a list of names of parameters, or leave it out"
    )
    qalora_group_size: Count = own(16, "Size of the groups of QA-LoRA.")


@cache
def known_lora_fields() -> dict[str, FieldInfo]:
    """The fields of peft.LoraConfig that a file can set, with their bounds. Loads neither peft nor torch."""
    return {name: declared(LoraFields).get(name, info) for name, info in lora_fields().items()}


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
