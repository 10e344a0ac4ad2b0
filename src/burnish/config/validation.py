"""Check values against the types and bounds that fields declare, and say in a line what is wrong and what to do.

pydantic is imported where it is used: loading it takes longer than `burnish --help`.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import logging
import math
import operator
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cache
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args, get_origin

from annotated_types import Ge, Gt, Interval, MinLen

from burnish.config.algorithms import apply_algorithm
from burnish.config.compat import elsewhere, translate
from burnish.config.declare import FieldInfo, describe, union_members
from burnish.config.fields import CommonFields
from burnish.config.predicates import text_problem
from burnish.config.stages import STAGES, Kind, known_fields, met_fields, refused_fields, stages_with
from burnish.errors import ConfigError, show

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

__all__ = [
    "OPAQUE", "bounds", "check_config", "check_fields", "check_keywords", "check_mapping", "did_you_mean", "fits",
    "plain", "schema_of", "validated",
]  # fmt: skip

logger = logging.getLogger("burnish.config")

OPAQUE = object()
"""Stands for a value that a file cannot hold."""

_DEEPEST = 64
"""Levels of lists and tables in a value; one that contains itself has no end."""


def check_fields(kind: Kind, mapping: Mapping[str, Any], where: str = "training") -> dict[str, Any]:
    """Check a stage's table and return its values in the types that the config wants.

    Args:
        kind: the stage.
        mapping: field -> value, as parsed from a file.
        where: the table's name, for messages.

    Returns:
        The same fields, coerced (`1` to `1.0` for a float, and `"1e-6"`, which YAML reads as text).

    Raises:
        ConfigError: an unknown name, a wrong type, a bad value, a contradiction, or a field no trainer honours.
    """
    infos = known_fields(kind)
    try:
        given = drop_met(kind, mapping)
        for name in given:
            if name not in infos and (homes := stages_with(name)):
                raise ConfigError(
                    f"{name} = {show(given[name])}: not a field of {kind}, but of {', '.join(homes)}; remove it, or "
                    "run that stage."
                )
        _refuse(kind, given)
    except ConfigError as error:
        raise ConfigError(f"[{where}] {error}") from None
    values = check_mapping(infos, given, where)
    everything = {name: copy.copy(info.default) for name, info in infos.items() if info.own} | values
    try:
        chosen = apply_algorithm(kind, everything, values)
        fields = STAGES[kind].fields
        _refuse_contradictions(fields(**{item.name: chosen[item.name] for item in dataclasses.fields(fields)}))
    except ConfigError as error:
        raise ConfigError(f"[{where}] {error}") from None
    return values


def check_keywords(kind: Kind, values: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a stage's config, checked as a file's entries are.

    Values of plain types are coerced as in `check_fields`; what only Python can hold (enumerations, objects) is left to
    the config. TRL's fields that ask for what happens here anyway are dropped.

    Raises:
        ConfigError: an unknown name, with what to do instead, or a bad value.
    """
    infos = known_fields(kind)
    checked: dict[str, Any] = {}
    for name, value in drop_met(kind, values).items():
        if name not in infos:
            raise ConfigError(f"{name} = {show(value)}: unknown field; {did_you_mean(name, infos)}.")
        held = plain(value)
        if held is not OPAQUE:
            checked[name] = validated(infos[name], held)
        elif _is_scalar(infos[name].hint):
            raise ConfigError(f"{name} = {show(value)}: expected {infos[name].type}, got {type(value).__name__}.")
        else:
            checked[name] = value
    return checked


def check_config(config: CommonFields) -> None:
    """Check every field of a config, and every combination.

    Raises:
        ConfigError: a bad value, a contradiction, or an inherited field that the trainer cannot honour.
    """
    values = vars(config)
    _refuse(config.kind, values)
    for name, info in known_fields(config.kind).items():
        if info.bounded and name in values and (held := plain(values[name])) is not OPAQUE:
            validated(info, held)
    _refuse_contradictions(config)


def _refuse(kind: Kind, values: Mapping[str, Any]) -> None:
    """Refuse inherited fields that the trainer cannot honour.

    transformers replaces some unset fields by objects when it resolves a config; those were not set by anyone.
    """
    for name, reason in refused_fields(kind).items():
        value = values.get(name)
        set_by_someone = isinstance(value, bool | int | float | str | list | dict)
        if name in values and set_by_someone and value != known_fields(kind)[name].default:
            raise ConfigError(f"{name} = {show(value)}: {reason}.")


def _refuse_contradictions(config: CommonFields) -> None:
    for problem in config.contradictions():
        raise ConfigError(problem)


def check_mapping(infos: Mapping[str, FieldInfo], mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check the names and values of one table; return the values coerced.

    Raises:
        ConfigError: an unknown name, or a value that its field does not take.
    """
    values: dict[str, Any] = {}
    for name, value in mapping.items():
        if name not in infos:
            raise ConfigError(f"[{where}] {name} = {show(value)}: unknown field; {did_you_mean(name, infos)}.")
        values[name] = validated(infos[name], value, f"[{where}] ")
    return values


def drop_met(kind: Kind, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields by their names here, without those that ask for what happens here anyway.

    One line of the log names the fields of which the intent is met.

    Args:
        kind: the stage.
        values: fields as given.

    Raises:
        ConfigError: one that asks for something else, or one field by two names.
    """
    known = known_fields(kind)
    kept: dict[str, Any] = {}
    met: list[str] = []
    for name, value in translate(kind, values).items():
        there = elsewhere(kind).get(name)
        if name in known:
            if name in met_fields(kind) and fits(known[name], plain(value)):
                met += [name] if value != known[name].default else []
            else:  # what is not allowed is coerced and refused with the other fields
                kept[name] = value
        elif there is None:
            kept[name] = value
        elif not _is_neutral(value, there.neutral):
            if type(value) not in there.met or not _fits(value):
                raise ConfigError(f"{name} = {show(value)}: not a field of burnish; {there.fix}.")
            met.append(name)
    if met:
        logger.info("accepted, since it is done anyway or changes nothing: %s", ", ".join(sorted(met)))
    return kept


def _fits(value: Any) -> bool:
    """Whether an integer fits 64 bits: nonsense is refused, even where nothing would read it."""
    return not isinstance(value, int) or abs(value) < 2**63


def _is_neutral(value: Any, neutral: Any) -> bool:
    choices = neutral if isinstance(neutral, tuple) else (neutral,)
    return any(type(value) is type(one) and value == one for one in choices)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'did you mean ...' where a known name is close, else the known names."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name)[:100], names, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}"
    return f"known are {', '.join(names)}" if len(names) <= 20 else "no known field is close; `--help` lists them"


def plain(value: Any, depth: int = 0) -> Any:
    """The value as a file would give it: tuples as lists, paths as text, numpy's numbers as Python's."""
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if depth > _DEEPEST:
        return OPAQUE
    if isinstance(value, str | Path) and not isinstance(value, Enum):
        return str(value)
    item: Any = getattr(value, "item", None)
    if (isinstance(value, Number) or getattr(value, "shape", None) == ()) and callable(item):
        return item()
    if isinstance(value, list | tuple):
        items = [plain(item, depth + 1) for item in cast("list[Any]", value)]
        return OPAQUE if OPAQUE in items else items
    if type(value) is dict:
        parts = {key: plain(item, depth + 1) for key, item in cast("dict[Any, Any]", value).items()}
        return OPAQUE if OPAQUE in parts.values() else parts
    return OPAQUE


def validated(info: FieldInfo, value: Any, where: str = "") -> Any:
    """The value in a type of its field: as it is where it fits, else converted without loss.

    Args:
        info: the field.
        value: as a file gives it.
        where: what to write before the field's name in messages.

    Raises:
        ConfigError: another type, or out of bounds.
    """
    from pydantic import ValidationError

    what = f"{where}{info.name} = {show(value)}"
    if isinstance(value, str) and (problem := text_problem(value)) is not None:
        raise ConfigError(f"{what}: {problem}.")
    exact, converting = _adapters(info.hint)
    try:
        result = exact.validate_python(value)
    except ValidationError:
        try:
            result = converting.validate_python(value)
        except ValidationError as error:
            raise ConfigError(f"{what}: {_fix(info, value, error)}.") from None
    if isinstance(result, int) and abs(result) >= 2**63:
        raise ConfigError(f"{what}: that does not fit 64 bits; use a smaller integer.")
    return result


def fits(info: FieldInfo, value: Any) -> bool:
    """Tell whether a field takes a value."""
    try:
        validated(info, value)
    except ConfigError:
        return False
    return True


@cache
def _adapters(hint: Any) -> tuple[TypeAdapter[Any], TypeAdapter[Any]]:
    from pydantic import ConfigDict, TypeAdapter

    config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    return TypeAdapter(hint, config=config), TypeAdapter(_converting(hint), config=config)


def _converting(hint: Any) -> Any:
    """The type with the documented coercions: whole floats for integers, text of a number for floats."""
    from pydantic import BeforeValidator

    origin, args = get_origin(hint), get_args(hint)
    if hint is int:
        return Annotated[int, BeforeValidator(_whole)]
    if hint is float:
        return Annotated[float, BeforeValidator(_number)]
    if len(members := union_members(hint)) > 1:
        return functools.reduce(operator.or_, map(_converting, members))
    if origin is Annotated:
        return Annotated[(_converting(args[0]), *args[1:])]
    if origin in (list, dict, tuple) and args:
        inner = cast(Any, origin)[tuple(map(_converting, args))]
        return Annotated[inner, BeforeValidator(_as_tuple)] if origin is tuple else inner
    return hint


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _as_tuple(value: Any) -> Any:
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value


def _fix(info: FieldInfo, value: Any, error: ValidationError) -> str:
    """What to do about a value that does not validate."""
    problems = error.errors(include_url=False, include_input=False)
    for problem in problems:
        if problem["type"] == "fix":
            return str(problem.get("ctx", {})["fix"])
    kinds = {problem["type"] for problem in problems}
    if isinstance(value, float) and not math.isfinite(value) and "finite_number" in kinds:
        return "use a finite number"
    if all(kind.endswith("_type") or kind in ("is_instance_of", "finite_number") for kind in kinds):
        return f"expected {describe(info.hint)}, got {type(value).__name__}"
    return info.fix or bounds(info.hint)


def bounds(hint: Any) -> str:
    """Say which values a type with bounds takes: `use a number in (0, 1], or leave it out`."""
    members = [member for member in union_members(hint) if member is not type(None)]
    words = [str(word) for member in members if get_origin(member) is Literal for word in get_args(member)]
    if words:
        words += ["true", "false"] if bool in members else []
        said = f"use {', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else f"use {words[0]}"
    else:
        said = " or ".join(filter(None, map(_bound, members)))
        said = f"use {said}" if said else f"expected {describe(hint)}"
    return f"{said}, or leave it out" if type(None) in union_members(hint) else said


def schema_of(infos: Mapping[str, FieldInfo]) -> dict[str, Any]:
    """The JSON schema of a table with these fields."""
    properties = {
        name: {"description": info.help, **_adapters(info.hint)[0].json_schema()} for name, info in infos.items()
    }
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _bound(hint: Any) -> str:
    """The values between the bounds of one member of a union; nothing where it has none."""
    base, *constraints = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    noun = "an integer" if base is int else "a number"
    for constraint in constraints:
        match constraint:
            case MinLen() if base is str:
                return "a text that is not empty"
            case MinLen():
                return "a list that is not empty"
            case Ge(ge=bound) if base is int:
                return f"at least {bound}"
            case Ge(ge=bound):
                return f"a number of at least {bound}"
            case Gt(gt=bound):
                return f"{noun} above {bound}"
            case Interval(gt=None, ge=low, lt=high) if base is int and high is not None:
                return f"an integer of at least {low}, below {'2^32' if high == 2**32 else high}"
            case Interval(gt=above, ge=low, lt=below, le=high):
                left = f"[{low}" if above is None else f"({above}"
                return f"{noun} in {left}, {f'{high}]' if below is None else f'{below})'}"
            case _:
                pass
    return ""


def _is_scalar(hint: Any) -> bool:
    """Whether only text, numbers, true and false fit the type."""
    bases = [get_args(member)[0] if get_origin(member) is Annotated else member for member in union_members(hint)]
    return all(base in (bool, float, int, str, type(None)) or get_origin(base) is Literal for base in bases)
