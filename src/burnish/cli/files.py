"""Configuration files and overrides as plain nested tables."""

from __future__ import annotations

import copy
import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from burnish.errors import ConfigError

__all__ = ["apply_overrides", "parse_overrides", "parse_value", "read_file"]


def read_file(path: str | Path) -> dict[str, Any]:
    """The tables of a .toml, .yaml or .yml file.

    Raises:
        ConfigError: no such file, another suffix, a syntax error with its place, a key given twice, or no tables.
    """
    path = Path(path)
    if path.suffix not in (".toml", ".yaml", ".yml"):
        raise ConfigError(f"{path}: a run is described by a .toml, .yaml or .yml file.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); check the path.") from error
    try:
        document: Any = tomllib.loads(text) if path.suffix == ".toml" else yaml.load(text, _UniqueKeyLoader)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not valid {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: holds {type(document).__name__} where tables are expected, such as `model: name`.")
    return cast("dict[str, Any]", document)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys in silence; this refuses them, as TOML does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_value(text: str) -> Any:
    """An override's value: TOML or JSON where it parses as one (`1e-6`, `true`, `[1, 4]`, `null`), else the text."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    # A line break could smuggle in more keys; dates are text to us.
    if list(parsed) == ["value"] and isinstance(parsed["value"], bool | int | float | str | list | dict):
        return parsed["value"]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
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
        if not word.startswith("--") or not all(keys):
            raise ConfigError(f"{word!r}: not understood; overrides look like --training.learning_rate=1e-6.")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{word}: has no value; write {word}=true, or another value.")
            text = rest.pop(0)
        yield keys, parse_value(text)


def apply_overrides(document: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """A copy of the document with each override set; missing tables are made, `null` removes an entry.

    Raises:
        ConfigError: a path through something that is no table, or past the end of a list.
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
        raise ConfigError(f"{where}: leads into {place!r}, which is not a table; drop `.{key}`.")
    count = len(cast("list[Any]", place))
    if not key.isdecimal() or int(key) >= count:
        raise ConfigError(f"{where}: a list of {count} is counted from 0 to {count - 1}.")
    return int(key)
