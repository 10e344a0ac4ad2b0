"""Check the options of a kind, a function's keyword arguments, in a table of a run file."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from burnish.config.predicates import is_number
from burnish.errors import ConfigError, show

__all__ = ["allowed", "check_options", "check_type"]


def check_options(
    where: str,
    kind: str,
    factory: Callable[..., Any],
    options: Mapping[str, Any],
    *,
    hidden: Collection[str] = (),
    common: Collection[str] = (),
) -> None:
    """Check the names and types of options against a signature.

    Args:
        where: name of the table in messages.
        kind: name of the factory in messages.
        factory: takes the options as keyword arguments.
        options: name -> value.
        hidden: parameters that a file cannot set.
        common: other names that the table may have, for messages.

    Raises:
        ConfigError: an unknown or missing option, or a value of another type.
    """
    parameters = {name: p for name, p in inspect.signature(factory).parameters.items() if name not in hidden}
    for name, value in options.items():
        if name not in parameters:
            raise ConfigError(
                f"{where}.{name} = {show(value)} is not an option of kind {kind!r}: "
                f"{allowed(name, {*parameters, *common})}"
            )
        check_type(f"{where}.{name}", value, str(parameters[name].annotation))
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in options:
            raise ConfigError(f"{where}.{name} is missing: kind {kind!r} needs it.")


def allowed(name: str, names: Iterable[str]) -> str:
    """Write which names are allowed, the closest one first."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Use one of: {', '.join(names)}."


def check_type(where: str, value: Any, annotation: str) -> None:
    """Check a value against the annotation of a parameter, as source text; a file has no None and no functions.

    Raises:
        ConfigError: it is of another type.
    """
    hint = annotation.removesuffix(" | None").removesuffix(" | Callable[..., str]")
    is_list = isinstance(value, list | tuple)
    strings = is_list and all(isinstance(item, str) for item in value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    ok, wanted = {
        "str": (isinstance(value, str), "a string"),
        "bool": (isinstance(value, bool), "true or false"),
        "int": (isinstance(value, int) and not isinstance(value, bool), "an integer"),
        "float": (number, "a number"),
        "Sequence[str]": (strings, "a list of strings"),
        "Sequence[float]": (is_list and all(map(is_number, value)), "a list of numbers"),
        "Mapping[str, str]": (
            isinstance(value, Mapping) and all(isinstance(item, str) for item in value.values()),
            "a table of strings",
        ),
        "Mapping[str, Any]": (isinstance(value, Mapping), "a table"),
    }[hint]
    if not ok:
        raise ConfigError(f"{where} = {show(value)}: use {wanted}.")
