"""Configuration files and overrides as plain nested tables."""

from __future__ import annotations

import copy
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from burnish.config.paths import missing
from burnish.config.predicates import text_problem
from burnish.errors import ConfigError, show

__all__ = ["apply_overrides", "check_document", "parse_overrides", "parse_value", "read_file"]


_LARGEST_BYTES = 2**20
_MOST_ENTRIES = 10_000
_DEEPEST = 64
"""A run file is written by hand: beyond these bounds it is a mistake, or made to exhaust the memory."""

_PARSER_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, yaml.YAMLError)
"""What the parsers raise beside their own errors: integers of 5,000 digits, `!!int abc`, dates that do not exist."""


def read_file(path: str | Path) -> dict[str, Any]:
    """The tables of a .toml, .yaml or .yml file.

    Raises:
        ConfigError: no such file, another suffix, too large, a syntax error with its place, a key given twice, no
            tables, or values that no field takes.
    """
    path = Path(path)
    if path.suffix not in (".toml", ".yaml", ".yml"):
        raise ConfigError(f"{path}: a run is described by a .toml, .yaml or .yml file.")
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        there = f" ({missing(path)})" if isinstance(error, FileNotFoundError) else ""
        reason = getattr(error, "strerror", error)
        raise ConfigError(f"{path}: cannot be read ({reason}); check the path{there}.") from error
    if len(content) > _LARGEST_BYTES:
        raise ConfigError(f"{path}: {len(content):,} bytes; a run file has at most {_LARGEST_BYTES:,}. Rows belong to "
                          "the files that data.train and data.eval name.")  # fmt: skip
    try:
        text = content.decode("utf-8-sig")
        document: Any = tomllib.loads(text) if path.suffix == ".toml" else yaml.load(text, _CheckedLoader)
    except _PARSER_ERRORS as error:
        raise ConfigError(f"{path}: not valid {path.suffix[1:].upper()}: {_reason(error)}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: holds {type(document).__name__} where tables are expected, such as `model: name`.")
    check_document(document, str(path))
    return cast("dict[str, Any]", document)


def _reason(error: Exception) -> str:
    match error:
        case RecursionError():
            return f"nested deeper than {_DEEPEST} levels; flatten it."
        case UnicodeDecodeError():
            return f"not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8."
        case yaml.YAMLError() | tomllib.TOMLDecodeError():
            return str(error)
        case _:
            return f"a value cannot be read ({' '.join(str(error).split())}); correct it, or quote it as text."


def check_document(document: Mapping[Any, Any], where: str) -> None:
    """Refuse what no field takes: other keys than text, half characters, NUL, and more or deeper entries than sensible.

    Args:
        document: tables, as parsed.
        where: the file, for messages.

    Raises:
        ConfigError: naming the place.
    """
    rest: list[tuple[tuple[Any, ...], Any]] = [((), document)]
    count = 0
    while rest:
        place, value = rest.pop()
        count += 1
        if count > _MOST_ENTRIES or len(place) > _DEEPEST:
            raise ConfigError(
                f"{where}: more than {_MOST_ENTRIES:,} entries or {_DEEPEST} levels. Rows belong to the files that "
                "data.train and data.eval name."
            )
        if isinstance(value, dict):
            entries = cast("dict[Any, Any]", value)
            rest += [((*place, key), item) for key, item in entries.items()]
            _check_keys(entries, where, place)
        elif isinstance(value, list):
            rest += [((*place, i), item) for i, item in enumerate(cast("list[Any]", value))]
        elif isinstance(value, str) and (problem := text_problem(value)):
            raise ConfigError(f"{where}: {_joined(place)} = {show(value)}: {problem}.")


def _check_keys(table: Mapping[Any, Any], where: str, place: tuple[Any, ...]) -> None:
    for key in table:
        if not isinstance(key, str):
            raise ConfigError(f"{where}: {_joined((*place, key))}: a name is text; put {show(key)} in quotes.")
        if problem := text_problem(key):
            raise ConfigError(f"{where}: the name {show(key)}: {problem}.")


def _joined(place: tuple[Any, ...]) -> str:
    return ".".join(map(str, place))


class _CheckedLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice, as TOML does, and aliases that multiply or contain themselves."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _count_nodes(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _count_nodes(node: yaml.Node, known: dict[int, int], depth: int = 0) -> int:
    """The number of nodes below one with every alias written out; counted once per anchor, so in linear time."""
    if id(node) in known:
        return known[id(node)]
    if depth > _DEEPEST:
        raise yaml.MarkedYAMLError(None, None, f"nested deeper than {_DEEPEST} levels", node.start_mark)
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    count = 1 + sum(_count_nodes(child, known, depth + 1) for child in children)
    if count > _MOST_ENTRIES:
        problem = f"more than {_MOST_ENTRIES:,} entries with its aliases written out"
        raise yaml.MarkedYAMLError(None, None, problem, node.start_mark)
    known[id(node)] = count
    return count


def parse_value(text: str) -> Any:
    """An override's value: TOML or JSON where it parses as one (`1e-6`, `true`, `[1, 4]`, `null`), else the text."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # also integers of 5,000 digits
        parsed = {}
    # A line break could smuggle in more keys; dates are text to us.
    if list(parsed) == ["value"] and isinstance(parsed["value"], bool | int | float | str | list | dict):
        return parsed["value"]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def parse_overrides(words: Sequence[str]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Pairs of (path, value) from `--a.b=value` and `--a.b value`.

    Raises:
        ConfigError: a word that is no override, or one without a value.
    """
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        keys = tuple(name.split("."))
        if not word.startswith("--") or not all(keys) or len(keys) > _DEEPEST:
            raise ConfigError(f"{show(word)}: not understood; overrides look like --training.learning_rate=1e-6.")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{word}: has no value; write {word}=true, or another value.")
            text = rest.pop(0)
        yield keys, parse_value(text)


def apply_overrides(document: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """A copy of the document with each override set; missing tables are made, `null` removes an entry.

    Raises:
        ConfigError: a path through something that is no table, past the end of a list, or a value that no field takes.
    """
    result = copy.deepcopy(document)
    for keys, value in parse_overrides(words):
        place: Any = result
        for depth, key in enumerate(keys):
            where = "--" + ".".join(keys[: depth + 1])
            index = _index(place, key, where)
            if depth == len(keys) - 1:
                _set(place, index, value)
            elif isinstance(place, dict):
                place = cast("dict[str, Any]", place).setdefault(key, {})
            else:
                place = place[index]
    check_document(result, "the command line")
    return result


def _set(place: Any, index: Any, value: Any) -> None:
    if value is not None:
        place[index] = value
    elif isinstance(place, dict):
        cast("dict[str, Any]", place).pop(index, None)
    else:
        del place[index]


def _index(place: Any, key: str, where: str) -> Any:
    if isinstance(place, dict):
        return key
    if not isinstance(place, list):
        raise ConfigError(f"{where}: leads into {show(place)}, which is not a table; drop `.{key}`.")
    count = len(cast("list[Any]", place))
    if not key.isdecimal() or len(key) > 9 or int(key) >= count:
        raise ConfigError(f"{where}: a list of {count} is counted from 0 to {count - 1}.")
    return int(key)
