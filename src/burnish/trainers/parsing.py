"""Let `transformers.HfArgumentParser`, and with it any script's command line, fill the trainers' configs."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from burnish.config import FieldInfo, known_fields
from burnish.config.declare import describe, union_members
from burnish.config.files import parse_value
from burnish.config.validation import fits, validated

__all__ = ["given_fields", "make_parseable", "word_reader"]


def make_parseable(config: type[Any]) -> None:
    """Give a config class types that argparse can call, where its annotations are unions.

    `HfArgumentParser` takes a union's first member, or fails. It also writes into the `dataclasses.Field` objects,
    which a config shares with the classes that it inherits from, so with its field classes: the class gets its own.

    Args:
        config: a dataclass with a `kind`; changed in place.
    """
    infos = known_fields(config.kind)
    fields: dict[str, dataclasses.Field[Any]] = {
        name: copy.copy(item) for name, item in config.__dataclass_fields__.items()
    }
    hints: dict[str, Any] = dict(inspect.get_annotations(config))
    for name, info in infos.items():
        if not info.own:
            continue
        # argparse takes all of a field's metadata for its own.
        options: dict[str, Any] = {"help": info.help}
        members = [describe(member) for member in union_members(info.hint)]
        if info.type not in ("bool", "float", "int", "str") and not _takes_list(info):
            hints[name] = word_reader(info)
            options |= {"nargs": "?", "const": True} if "bool" in members else {}
        fields[name].metadata = MappingProxyType(options)
    config.__annotations__ = hints
    config.__dataclass_fields__ = fields


def word_reader(info: FieldInfo) -> type[Any]:
    """A class that argparse can call with a word of the command line; it returns what the word says, in a type of the
    field's annotation where one fits.

    A word that fits none stays as it is: the config refuses it by name.
    """
    members = [describe(member) for member in union_members(info.hint)]
    constants: dict[str, Any] = {}
    if {"bool", "Any"} & set(members):
        constants = {"true": True, "false": False}
    if "Any" in members or ("None" in members and "str" not in members):
        constants |= {"none": None, "null": None}

    def read(_: type[Any], word: str) -> Any:
        if word.lower() in constants:
            return constants[word.lower()]
        value = parse_value(word)
        fitting = (validated(info, reading) for reading in (value, word) if fits(info, reading))
        return next(fitting, word if "str" in members else value)

    return type(info.type, (), {"__new__": read})


def given_fields(config: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that somebody set.

    A parser passes every field: then those at their default count as not set, so that `algorithm` can set them, and so
    does None for a list, whose default `HfArgumentParser` loses.
    """
    fields = {item.name: item for item in dataclasses.fields(config) if item.init}
    # `dataclasses.replace` passes every field too, of a config where transformers has made words enumerations.
    if any(name not in values for name in fields) or type(values["lr_scheduler_type"]) is not str:
        return dict(values)
    infos = known_fields(config.kind)
    lists = {name for name in fields if name in infos and _takes_list(infos[name])}
    return {
        name: value
        for name, value in values.items()
        if name not in fields or not (_is_default(fields[name], value) or (value is None and name in lists))
    }


def _takes_list(info: FieldInfo) -> bool:
    return any(describe(member).startswith("list") for member in union_members(info.hint))


def _is_default(item: dataclasses.Field[Any], value: Any) -> bool:
    default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
    return type(value) is type(default) and value == default
