"""Parse configuration files and overrides into plain nested tables."""

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
"""Limits that no run file written by hand exceeds, against mistakes and files made to exhaust memory."""

_ROWS = "Put rows into the files that data.train and data.eval name."

_PARSER_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, yaml.YAMLError)
"""Errors of the parsers, also on integers of 5,000 digits, `!!int abc` and dates that do not exist."""


def read_file(path: str | Path) -> dict[str, Any]:
    """Read the tables of a .toml, .yaml or .yml file.

    Raises:
        ConfigError: a missing or too large file, another suffix, a syntax error with its position, a duplicate key, a
            document without tables, or a value that no field takes.
    """
    path = Path(path)
    if path.suffix not in (".toml", ".yaml", ".yml"):
        raise ConfigError(f"{path}: not a run file; use a .toml, .yaml or .yml file.")
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        hint = f" ({missing(path)})" if isinstance(error, FileNotFoundError) else ""
        reason = getattr(error, "strerror", error)
        raise ConfigError(f"{path}: cannot be read ({reason}); check the path{hint}.") from error
    if len(content) > _LARGEST_BYTES:
        raise ConfigError(f"{path}: {len(content):,} bytes; a run file has at most {_LARGEST_BYTES:,}. {_ROWS}")
    try:
        text = content.decode("utf-8-sig")
        document: Any = tomllib.loads(text) if path.suffix == ".toml" else yaml.load(text, _CheckedLoader)
    except _PARSER_ERRORS as error:
        raise ConfigError(f"{path}: not valid {path.suffix[1:].upper()}: {_reason(error)}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: contains {type(document).__name__} instead of tables, such as `model: name`.")
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
            return f"a value cannot be parsed ({' '.join(str(error).split())}); correct it, or quote it as text."


def check_document(document: Mapping[Any, Any], where: str) -> None:
    """Refuse keys that are not text, lone surrogates, NUL, and more entries or levels than a run file needs.

    Args:
        document: tables, as parsed.
        where: name of the file in messages.

    Raises:
        ConfigError: a bad entry; the message names it.
    """
    rest: list[tuple[str, int, Any]] = [("", 0, document)]
    count = 0
    while rest:
        name, depth, value = rest.pop()
        count += 1
        if count > _MOST_ENTRIES or depth > _DEEPEST:
            raise ConfigError(f"{where}: more than {_MOST_ENTRIES:,} entries or {_DEEPEST} levels. {_ROWS}")
        prefix = f"{name}." if name else ""
        if isinstance(value, dict):
            for key, item in cast("dict[Any, Any]", value).items():
                if not isinstance(key, str):
                    raise ConfigError(f"{where}: {prefix}{key}: names are text; put {show(key)} in quotes.")
                if problem := text_problem(key):
                    raise ConfigError(f"{where}: the name {show(key)}: {problem}.")
                rest.append((prefix + key, depth + 1, item))
        elif isinstance(value, list):
            rest += [(f"{prefix}{i}", depth + 1, item) for i, item in enumerate(cast("list[Any]", value))]
        elif isinstance(value, str) and (problem := text_problem(value)):
            raise ConfigError(f"{where}: {name} = {show(value)}: {problem}.")


class _CheckedLoader(yaml.SafeLoader):
    """A SafeLoader that refuses duplicate keys, as TOML does, and aliases that multiply or contain themselves."""

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


def _count_nodes(node: yaml.Node, known: dict[yaml.Node, int], depth: int = 0) -> int:
    """Count the nodes below one with all aliases expanded, in linear time by counting each anchor once."""
    if node in known:
        return known[node]
    if depth > _DEEPEST:
        raise yaml.MarkedYAMLError(None, None, f"nested deeper than {_DEEPEST} levels", node.start_mark)
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    count = 1 + sum(_count_nodes(child, known, depth + 1) for child in children)
    if count > _MOST_ENTRIES:
        problem = f"more than {_MOST_ENTRIES:,} entries with its aliases expanded"
        raise yaml.MarkedYAMLError(None, None, problem, node.start_mark)
    known[node] = count
    return count


def parse_value(text: str) -> Any:
    """Parse an override's value as TOML or JSON (`1e-6`, `true`, `[1, 4]`, `null`); anything else is text."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # also integers of 5,000 digits
        parsed = {}
    # A line break could add more keys; dates are treated as text.
    if list(parsed) == ["value"] and isinstance(parsed["value"], bool | int | float | str | list | dict):
        return parsed["value"]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def parse_overrides(words: Sequence[str]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (keys, value) for each `--a.b=value` or `--a.b value`.

    Raises:
        ConfigError: a word that is not an override, or one without a value.
    """
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        keys = tuple(name.split("."))
        if not word.startswith("--") or not all(keys) or len(keys) > _DEEPEST:
            raise ConfigError(f"{show(word)}: not an override; write one like --training.learning_rate=1e-6.")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{word}: no value; write {word}=true, or another value.")
            text = rest.pop(0)
        yield keys, parse_value(text)


def apply_overrides(document: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Apply overrides to a copy of the document; missing tables are created, and `null` removes an entry.

    Raises:
        ConfigError: keys that lead through a value that is not a table or past the end of a list, or a value that no
            field takes.
    """
    result = copy.deepcopy(document)
    for keys, value in parse_overrides(words):
        table: Any = result
        for depth, key in enumerate(keys):
            index = _index(table, key, "--" + ".".join(keys[: depth + 1]))
            if depth < len(keys) - 1:
                table = table.setdefault(index, {}) if isinstance(table, dict) else table[index]
            elif value is not None:
                table[index] = value
            elif isinstance(table, list) or index in table:
                del table[index]
    check_document(result, "the command line")
    return result


def _index(table: Any, key: str, where: str) -> Any:
    if isinstance(table, dict):
        return key
    if not isinstance(table, list):
        raise ConfigError(f"{where}: leads into {show(table)}, which is not a table; drop `.{key}`.")
    count = len(cast("list[Any]", table))
    if not key.isdecimal() or len(key) > 9 or int(key) >= count:
        raise ConfigError(f"{where}: the list has {count} entries; use an index from 0 to {count - 1}.")
    return int(key)
