"""Check values against the declared types and bounds of fields, with one-line messages that name the fix.

pydantic is imported where it is used, since that takes longer than all of `burnish --help`.
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
"""Stand-in for a value that a file cannot hold."""

_DEEPEST = 64
"""Maximum nesting of lists and tables in a value, which may contain itself."""


def check_fields(kind: Kind, mapping: Mapping[str, Any], where: str = "training") -> dict[str, Any]:
    """Check the table of a stage and return its values coerced to the types of the config.

    Args:
        kind: the stage.
        mapping: field -> value, as parsed from a file.
        where: name of the table in messages.

    Returns:
        Field -> value; `1` and `"1e-6"`, which YAML parses as text, become floats for a float field.

    Raises:
        ConfigError: an unknown name, a wrong type, a bad value, a contradiction, or an unsupported field.
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
        _refuse_unsupported(kind, given)
    except ConfigError as error:
        raise ConfigError(f"[{where}] {error}") from None
    values = check_mapping(infos, given, where)
    defaults = {name: copy.copy(info.default) for name, info in infos.items() if info.own}
    try:
        chosen = apply_algorithm(kind, defaults | values, values)
        fields = STAGES[kind].fields
        _refuse_contradictions(fields(**{item.name: chosen[item.name] for item in dataclasses.fields(fields)}))
    except ConfigError as error:
        raise ConfigError(f"[{where}] {error}") from None
    return values


def check_keywords(kind: Kind, values: Mapping[str, Any]) -> dict[str, Any]:
    """Check keyword arguments of a stage's config like the entries of a file.

    Values of plain types are coerced as in `check_fields`; other objects, such as enumerations, are left to the config.
    TRL's fields whose intent is met anyway are dropped.

    Raises:
        ConfigError: an unknown name, with the fix, or a bad value.
    """
    infos = known_fields(kind)
    checked: dict[str, Any] = {}
    for name, value in drop_met(kind, values).items():
        if name not in infos:
            raise ConfigError(f"{name} = {show(value)}: unknown field; {did_you_mean(name, infos)}.")
        held = plain(value)
        if held is not OPAQUE:
            checked[name] = validated(infos[name], held)
        elif _is_scalar(infos[name].hint):  # no object of another class can be meant
            raise ConfigError(f"{name} = {show(value)}: expected {infos[name].type}, got {type(value).__name__}.")
        else:
            checked[name] = value
    return checked


def check_config(config: CommonFields) -> None:
    """Check every field of a config, and every combination.

    Raises:
        ConfigError: a bad value, a contradiction, or an inherited field that the stage does not support.
    """
    values = vars(config)
    _refuse_unsupported(config.kind, values)
    for name, info in known_fields(config.kind).items():
        if info.bounded and name in values and (held := plain(values[name])) is not OPAQUE:
            validated(info, held)
    _refuse_contradictions(config)


def _refuse_unsupported(kind: Kind, values: Mapping[str, Any]) -> None:
    for name, reason in refused_fields(kind).items():
        value = values.get(name)
        # transformers replaces some unset fields by objects of its own when it resolves a config.
        is_plain = isinstance(value, bool | int | float | str | list | dict)
        if is_plain and value != known_fields(kind)[name].default:
            raise ConfigError(f"{name} = {show(value)}: {reason}.")


def _refuse_contradictions(config: CommonFields) -> None:
    for problem in config.contradictions():
        raise ConfigError(problem)


def check_mapping(infos: Mapping[str, FieldInfo], mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check the names and values of a table, and return the values coerced.

    Raises:
        ConfigError: an unknown name, or a bad value.
    """
    values: dict[str, Any] = {}
    for name, value in mapping.items():
        if name not in infos:
            raise ConfigError(f"[{where}] {name} = {show(value)}: unknown field; {did_you_mean(name, infos)}.")
        values[name] = validated(infos[name], value, f"[{where}] ")
    return values


def drop_met(kind: Kind, values: Mapping[str, Any]) -> dict[str, Any]:
    """Translate TRL's names, and drop fields whose intent is met anyway, with one log line that names them.

    Args:
        kind: the stage.
        values: field -> value, as given.

    Raises:
        ConfigError: a field without a counterpart and with an effect, or a field given by two names.
    """
    known = known_fields(kind)
    kept: dict[str, Any] = {}
    met: list[str] = []
    for name, value in translate(kind, values).items():
        there = elsewhere(kind).get(name)
        if name in known:
            if name in met_fields(kind) and fits(known[name], plain(value)):
                met += [name] if value != known[name].default else []
            else:  # bad values are refused later, like those of other fields
                kept[name] = value
        elif there is None:
            kept[name] = value
        elif not any(type(value) is type(one) and value == one for one in there.neutral):
            overflows = isinstance(value, int) and abs(value) >= 2**63
            if type(value) not in there.met or overflows:
                raise ConfigError(f"{name} = {show(value)}: not a field of burnish; {there.fix}.")
            met.append(name)
    if met:
        logger.info("accepted, as it is done anyway or has no effect: %s", ", ".join(sorted(met)))
    return kept


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest close names, or list the known ones."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name)[:100], names, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}"
    return f"known are {', '.join(names)}" if len(names) <= 20 else "no known field is close; `--help` lists them"


def plain(value: Any, depth: int = 0) -> Any:
    """Convert a value to the types of a file: tuples to lists, paths to text, numpy numbers to Python's."""
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
    """Return a value in the type of its field, unchanged if valid, else converted without loss.

    Args:
        info: the field.
        value: value in a type of files.
        where: prefix of the field's name in messages.

    Raises:
        ConfigError: a wrong type, or a value out of bounds.
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
        raise ConfigError(f"{what}: it does not fit 64 bits; use a smaller integer.")
    return result


def fits(info: FieldInfo, value: Any) -> bool:
    """Return True if a field takes a value."""
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
    """Add the documented coercions to a type: whole floats to integers, text of a number to floats."""
    from pydantic import BeforeValidator

    origin, args = get_origin(hint), get_args(hint)

    def whole(value: Any) -> Any:
        return int(value) if isinstance(value, float) and value.is_integer() else value

    def number(value: Any) -> Any:
        try:
            return float(value) if isinstance(value, str) else value
        except ValueError:
            return value

    if hint is int:
        return Annotated[int, BeforeValidator(whole)]
    if hint is float:
        return Annotated[float, BeforeValidator(number)]
    if len(members := union_members(hint)) > 1:
        return functools.reduce(operator.or_, map(_converting, members))
    if origin is Annotated:
        return Annotated[(_converting(args[0]), *args[1:])]
    if origin in (list, dict, tuple) and args:
        inner = cast(Any, origin)[tuple(map(_converting, args))]
        as_tuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
        return Annotated[inner, as_tuple] if origin is tuple else inner
    return hint


def _fix(info: FieldInfo, value: Any, error: ValidationError) -> str:
    """Return the fix for an invalid value."""
    problems = error.errors(include_url=False, include_input=False)
    for problem in problems:
        if problem["type"] == "fix":
            return str(problem.get("ctx", {})["fix"])
    kinds = {problem["type"] for problem in problems}
    if isinstance(value, float) and not math.isfinite(value) and "finite_number" in kinds:
        return "use a finite number"
    if isinstance(value, str):
        kinds.discard("finite_number")  # "nan", which is text and not a number
    if all(kind.endswith("_type") or kind == "is_instance_of" for kind in kinds):
        return f"expected {describe(info.hint)}, got {type(value).__name__}"
    return info.fix or bounds(info.hint)


def bounds(hint: Any) -> str:
    """Describe the values of a type with bounds as a fix: `use a number in (0, 1], or leave it out`."""
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
    """Build the JSON schema of a table with these fields."""
    properties = {
        name: {"description": info.help, **_adapters(info.hint)[0].json_schema()} for name, info in infos.items()
    }
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _bound(hint: Any) -> str:
    """Describe the bounds of one member of a union; empty if it has none."""
    base, *constraints = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    noun = "an integer" if base is int else "a number"
    for constraint in constraints:
        match constraint:
            case MinLen() if base is str:
                return "a non-empty text"
            case MinLen():
                return "a non-empty list"
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
    """Return True if a type only takes text, numbers, true and false."""
    bases = [get_args(member)[0] if get_origin(member) is Annotated else member for member in union_members(hint)]
    return all(base in (bool, float, int, str, type(None)) or get_origin(base) is Literal for base in bases)
