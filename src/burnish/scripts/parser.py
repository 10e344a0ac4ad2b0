"""The command line of a training script: dataclasses, a configuration file, and TRL's names for fields."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, cast

from transformers import HfArgumentParser

from burnish.config import FieldInfo, Kind, elsewhere, known_fields
from burnish.config.compat import translated_names
from burnish.config.files import read_file
from burnish.config.validation import did_you_mean, fits
from burnish.errors import ConfigError, show
from burnish.progress import say
from burnish.trainers.parsing import word_reader

__all__ = ["TrlParser"]


class _Default:
    """A default value, told from the same value given by somebody."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __str__(self) -> str:
        return str(self.value)


class TrlParser(HfArgumentParser):
    """Fill dataclasses from a command line and a YAML or TOML file.

    `--config FILE` (`.yaml`, `.yml`, `.toml`) sets values that the command line overrides; its table `env` sets
    environment variables. A trainer's config is given only the fields that were set, and all of TRL's names for them:
    those that need nothing here are accepted, the others say what to do instead.

    Args:
        dataclass_types: one dataclass, or several.
        kwargs: of `transformers.HfArgumentParser`.

    Raises:
        ConfigError: a field named `config`; when parsing, an unknown name or a bad value.
    """

    def __init__(self, dataclass_types: Any = None, **kwargs: Any) -> None:
        # An abbreviation would be taken for a field that somebody meant, and a misspelled name is often one.
        super().__init__(dataclass_types, **{"allow_abbrev": False, **kwargs})
        for record in self.dataclass_types:
            if any(item.name == "config" for item in dataclasses.fields(cast("Any", record))):
                raise ConfigError(f"{_name(record)} has a field config: --config names the file; rename the field.")
            if (kind := getattr(record, "kind", None)) is not None:
                self._add_names(kind)
        for action in self._actions:
            if action.default is not argparse.SUPPRESS:
                action.default = _Default(action.default)

    def _add_names(self, kind: Kind) -> None:
        """Add TRL's fields that exist here by another name or not at all, and `--no_...` for whatever may be false."""
        known = known_fields(kind)
        for name in (*translated_names(kind), *elsewhere(kind)):
            if name not in known and f"--{name}" not in self._option_string_actions:
                self.add_argument(
                    f"--{name}", nargs="?", const=True, default=argparse.SUPPRESS, help=argparse.SUPPRESS,
                    type=word_reader(FieldInfo(name, Any)),
                )  # fmt: skip
        for name in (*known, *elsewhere(kind)):
            options = [f"--no_{name}", f"--no-{name.replace('_', '-')}"]
            may_be_false = name not in known or fits(known[name], False)
            if may_be_false and not any(option in self._option_string_actions for option in options):
                self.add_argument(
                    *dict.fromkeys(options), dest=name, action="store_false", default=argparse.SUPPRESS,
                    help=argparse.SUPPRESS,
                )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        """Raise what argparse has to say, without the usage of hundreds of fields."""
        raise ConfigError(f"{message}; --help lists what there is.")

    def parse_args_and_config(
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        """Parse a command line and the file that its `--config` names.

        Args:
            args: words; those of the process if None.
            return_remaining_strings: return what nothing knows, as a last element, instead of raising.
            fail_with_unknown_args: refuse names in the file that nothing knows; where false they are passed over, with
                a line that names them. Unknown words of the command line are always refused.
            separate_remaining_strings: return those of the file and those of the command line apart.

        Returns:
            An instance of each dataclass, then what is left, where asked for.

        Raises:
            ConfigError: an unreadable file, an unknown name, or a bad value.
        """
        words, path = _without_config(list(sys.argv[1:] if args is None else args))
        left = [] if path is None else self._read(path)
        if left and not return_remaining_strings:
            message = self._unknown(left, f"{path}")
            if fail_with_unknown_args:
                raise ConfigError(message)
            say(f"passed over: {message}")
        objects, rest = self._parse(words)
        if not return_remaining_strings:
            self._refuse(rest)
            return tuple(objects)
        return (*objects, left, rest) if separate_remaining_strings else (*objects, left + rest)

    def parse_args_into_dataclasses(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        look_for_args_file: bool = True,
        args_filename: str | None = None,
        args_file_flag: str | None = None,
    ) -> tuple[Any, ...]:
        """As in transformers, without files of words: `--config` of `parse_args_and_config` is the file here.

        Raises:
            ConfigError: an unknown word, a bad value, or a file of words.
        """
        if args_filename or args_file_flag:
            raise ConfigError("args_filename and args_file_flag: use parse_args_and_config, with --config FILE.")
        objects, rest = self._parse(list(sys.argv[1:] if args is None else args))
        if return_remaining_strings:
            return (*objects, rest)
        self._refuse(rest)
        return tuple(objects)

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """Set values that the command line overrides, in subcommands too; an argument that has one is not required.

        Args:
            kwargs: value by name.

        Returns:
            `--name` and value of each that nothing knows.
        """
        used: set[str] = set()
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):  # pyright: ignore[reportPrivateUsage]
                for subparser in cast("Any", action).choices.values():
                    left = subparser.set_defaults_with_config(**kwargs)
                    used.update(name for name in kwargs if f"--{name}" not in left)
            elif action.dest in kwargs:
                action.default, action.required = kwargs[action.dest], False
                used.add(action.dest)
        return [word for name, value in kwargs.items() if name not in used for word in (f"--{name}", str(value))]

    def _read(self, path: str) -> list[str]:
        document = read_file(path)
        variables = document.pop("env", {})
        if not isinstance(variables, Mapping):
            raise ConfigError(f"{path}: env = {show(variables)}: use a table of environment variables.")
        os.environ.update({name: str(value) for name, value in cast("Mapping[str, Any]", variables).items()})
        return self.set_defaults_with_config(**document)

    def _parse(self, words: list[str]) -> tuple[list[Any], list[str]]:
        namespace, rest = self.parse_known_args(words)
        values = vars(namespace)
        objects: list[Any] = []
        for record in cast("list[Any]", self.dataclass_types):
            names = {item.name for item in dataclasses.fields(record) if item.init}
            if (kind := getattr(record, "kind", None)) is not None:
                names |= {*translated_names(kind), *elsewhere(kind)}
            own = {name: values.pop(name) for name in names if name in values}
            objects.append(record(**{name: value for name, value in own.items() if not isinstance(value, _Default)}))
        if values:  # arguments that somebody added to the parser
            plain = {name: value.value if isinstance(value, _Default) else value for name, value in values.items()}
            objects.append(argparse.Namespace(**plain))
        return objects, rest

    def _refuse(self, rest: list[str]) -> None:
        if rest:
            raise ConfigError(self._unknown(rest, "the command line"))

    def _unknown(self, words: list[str], where: str) -> str:
        known = [action.dest for action in self._actions]
        named = [word for word in words if word.startswith("--")] or words[:1]
        return "; ".join(
            f"{word.partition('=')[0]}: unknown in {where}, {did_you_mean(word.lstrip('-').partition('=')[0], known)}"
            for word in named
        ) + "."  # fmt: skip


def _name(record: Any) -> str:
    return str(getattr(record, "__name__", record))


def _without_config(words: list[str]) -> tuple[list[str], str | None]:
    """The words without `--config FILE` or `--config=FILE`, and the file; the last one counts."""
    rest: list[str] = []
    path: str | None = None
    while words:
        word = words.pop(0)
        if word == "--config":
            if not words:
                raise ConfigError("--config: names no file; write --config FILE.")
            path = words.pop(0)
        elif word.startswith("--config="):
            path = word.removeprefix("--config=")
        else:
            rest.append(word)
    return rest, path
