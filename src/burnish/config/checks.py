"""Checks of what a file or an override says, before any config object exists: names, then types, then values."""

from __future__ import annotations

import ast
import copy
import difflib
import math
from collections.abc import Iterable, Mapping
from enum import Enum
from numbers import Number
from pathlib import Path
from typing import Any, cast

from burnish.config.algorithms import apply_algorithm
from burnish.config.compat import drop_elsewhere
from burnish.config.fields import known_fields, stages_with
from burnish.config.inherited import FieldInfo
from burnish.config.predicates import text_problem
from burnish.config.refused import Kind
from burnish.config.rules import check_values
from burnish.errors import ConfigError, show

__all__ = ["as_annotated", "check_fields", "check_keywords", "check_mapping", "did_you_mean", "members_of"]


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
    fields = known_fields(kind)
    try:
        own = drop_elsewhere(kind, fields, mapping)
    except ConfigError as error:
        raise ConfigError(f"[{where}] {error}") from None
    for name in own:
        if name not in fields and (homes := stages_with(name)):
            raise ConfigError(
                f"[{where}] {name} = {show(own[name])}: not a field of {kind}, but of {', '.join(homes)}; remove it, "
                "or run that stage."
            )
    values = check_mapping(fields, own, where)
    everything = {name: copy.copy(info.default) for name, info in fields.items()} | values
    try:
        check_values(kind, apply_algorithm(kind, everything, values))
    except ConfigError as error:
        raise ConfigError(f"[{where}] {error}") from None
    return values


def check_keywords(kind: Kind, values: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a stage's config, checked as a file's entries are.

    Values of plain types are coerced as in `check_fields`; what only Python can hold (enumerations, objects) is left to
    the config. TRL's fields that ask for what happens here anyway are dropped.

    Raises:
        ConfigError: an unknown name, with what to do instead, or a value of another type than the field's.
    """
    fields = known_fields(kind)
    checked: dict[str, Any] = {}
    for name, value in drop_elsewhere(kind, fields, values).items():
        if name not in fields:
            raise ConfigError(f"{name} = {show(value)}: unknown field; {did_you_mean(name, fields)}.")
        plain = _plain(value)
        if plain is not _OPAQUE:
            checked[name] = _coerced(fields[name], plain, f"{name} = {show(value)}")
        elif _is_scalar(fields[name]):
            raise ConfigError(f"{name} = {show(value)}: expected {fields[name].type}, got {type(value).__name__}.")
        else:
            checked[name] = value
    return checked


_OPAQUE = object()
"""Stands for a value that a file cannot hold."""

_DEEPEST = 64
"""Levels of lists and tables in a value; one that contains itself has no end."""


def _plain(value: Any, depth: int = 0) -> Any:
    """The value as a file would give it: tuples as lists, paths as text, numpy's numbers as Python's."""
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if depth > _DEEPEST:
        return _OPAQUE
    if isinstance(value, str) and not isinstance(value, Enum):
        return str(value)
    if isinstance(value, Path):
        return str(value)
    item: Any = getattr(value, "item", None)
    if (isinstance(value, Number) or getattr(value, "shape", None) == ()) and callable(item):
        return item()
    if isinstance(value, list | tuple):
        items = [_plain(item, depth + 1) for item in cast("list[Any]", value)]
        return _OPAQUE if _OPAQUE in items else items
    if type(value) is dict:
        parts = {key: _plain(item, depth + 1) for key, item in cast("dict[Any, Any]", value).items()}
        return _OPAQUE if _OPAQUE in parts.values() else parts
    return _OPAQUE


def _coerced(info: FieldInfo, value: Any, what: str) -> Any:
    try:
        coerced = _coerce(ast.parse(info.type, mode="eval").body, value)
    except _MismatchError:
        raise ConfigError(f"{what}: expected {info.type}, got {type(value).__name__}.") from None
    if isinstance(coerced, int) and abs(coerced) >= 2**63:
        raise ConfigError(f"{what}: that does not fit 64 bits; use a smaller integer.")
    if isinstance(coerced, float) and not math.isfinite(coerced) and not (coerced > 0 and info.name == "max_grad_norm"):
        raise ConfigError(f"{what}: use a finite number.")
    if isinstance(coerced, str) and (problem := text_problem(coerced)) is not None:
        raise ConfigError(f"{what}: {problem}.")
    return coerced


def _is_scalar(info: FieldInfo) -> bool:
    """Whether only text, numbers, true and false fit the field."""
    return all(
        isinstance(option, ast.Constant)
        or (isinstance(option, ast.Name) and option.id in ("bool", "float", "int", "str"))
        for option in _options(ast.parse(info.type, mode="eval").body)
    )


def check_mapping(fields: Mapping[str, FieldInfo], mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check names and types of one table against `fields`; return the values coerced.

    Raises:
        ConfigError: an unknown name, or a value of another type than the field's annotation.
    """
    values: dict[str, Any] = {}
    for name, value in mapping.items():
        if name not in fields:
            raise ConfigError(f"[{where}] {name} = {show(value)}: unknown field; {did_you_mean(name, fields)}.")
        values[name] = _coerced(fields[name], value, f"[{where}] {name} = {show(value)}")
    return values


def members_of(info: FieldInfo) -> list[str]:
    """The members of a field's annotation, as source text: `["str", "None"]` for `str | None`."""
    return [ast.unparse(option) for option in _options(ast.parse(info.type, mode="eval").body)]


def as_annotated(info: FieldInfo, readings: Iterable[Any], *, otherwise: Any) -> Any:
    """The first of several readings of a word that fits a field's annotation, in a type of it."""
    annotation = ast.parse(info.type, mode="eval").body
    for reading in readings:
        try:
            return _coerce(annotation, reading)
        except _MismatchError:
            continue
    return otherwise


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'did you mean ...' where a known name is close, else the known names."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name)[:100], names, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}"
    return f"known are {', '.join(names)}" if len(names) <= 20 else "no known field is close; `--help` lists them"


class _MismatchError(Exception):
    """The value does not fit the annotation."""


def _coerce(annotation: ast.expr, value: Any) -> Any:
    """The value in a type of the annotation: as it is where one fits, else converted without loss."""
    options = list(_options(annotation))
    for convert in (_fit, _convert):
        for option in options:
            try:
                return convert(option, value)
            except _MismatchError:
                continue
    raise _MismatchError


def _options(annotation: ast.expr) -> Iterable[ast.expr]:
    """The members of a union, however it is spelled."""
    match annotation:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            yield from (*_options(left), *_options(right))
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            yield from (*_options(inner), ast.Constant(None))
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=members)):
            for member in members:
                yield from _options(member)
        case _:
            yield annotation


def _fit(option: ast.expr, value: Any) -> Any:
    match option:
        case ast.Name(id="Any"):
            return value
        case ast.Constant(value=None) if value is None:
            return value
        case ast.Name(id="str" | "int" | "float" | "bool" | "dict" | "list" as name) if type(value).__name__ == name:
            return value
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            members = choices.elts if isinstance(choices, ast.Tuple) else [choices]
            allowed = [member.value for member in members if isinstance(member, ast.Constant)]
            if any(type(one) is type(value) and one == value for one in allowed):
                return value
        case ast.Subscript(value=ast.Name(id="list"), slice=inner) if isinstance(value, list):
            return [_coerce(inner, item) for item in value]
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=members)) if isinstance(value, list):
            if len(value) == len(members):
                return tuple(_coerce(member, item) for member, item in zip(members, value, strict=True))
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[key, inner])) if isinstance(value, dict):
            return {_coerce(key, one): _coerce(inner, item) for one, item in value.items()}
        case _:
            pass
    raise _MismatchError


def _convert(option: ast.expr, value: Any) -> Any:
    match option:
        case ast.Name(id="float") if isinstance(value, int) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                raise _MismatchError from None
        case ast.Name(id="float") if isinstance(value, str):
            try:
                number = float(value)
            except ValueError:
                raise _MismatchError from None
            if math.isfinite(number):
                return number
        case ast.Name(id="int") if isinstance(value, float) and value.is_integer():
            return int(value)
        case _:
            pass
    raise _MismatchError
