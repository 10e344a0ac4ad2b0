"""Parse the command line and the configuration file of a training script, with TRL's names for fields."""

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
    """A default value, distinguishable from the same value given explicitly."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __str__(self) -> str:
        return str(self.value)


class TrlParser(HfArgumentParser):
    """Fill dataclasses from a command line and a YAML or TOML file.

    `--config FILE` (`.yaml`, `.yml`, `.toml`) sets values that the command line overrides; its table `env` sets
    environment variables. A trainer's config receives only the fields that were set. All of TRL's field names are
    known: a field whose intent is met anyway is accepted, any other raises an error with the fix.

    Args:
        dataclass_types: one dataclass, or several.
        kwargs: keyword arguments of `transformers.HfArgumentParser`.

    Raises:
        ConfigError: a field named `config`; when parsing, an unknown name or a bad value.
    """

    def __init__(self, dataclass_types: Any = None, **kwargs: Any) -> None:
        # A misspelled name is often an abbreviation of another field's.
        super().__init__(dataclass_types, **{"allow_abbrev": False, **kwargs})
        for record in self.dataclass_types:
            if any(item.name == "config" for item in dataclasses.fields(cast("Any", record))):
                name = getattr(record, "__name__", record)
                raise ConfigError(f"{name} has a field config, but --config names the file: rename the field.")
            if (kind := getattr(record, "kind", None)) is not None:
                self._add_names(kind)
        for action in self._actions:
            if action.default is not argparse.SUPPRESS:
                action.default = _Default(action.default)

    def _add_names(self, kind: Kind) -> None:
        """Add TRL's fields that have another name or no counterpart here, and `--no_...` for fields that take false."""
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
        """Raise argparse's message without its usage, which would list hundreds of fields."""
        raise ConfigError(f"{message}; --help lists the arguments.")

    def parse_args_and_config(
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        """Parse a command line and the file that its `--config` names.

        Args:
            args: command-line words; None means `sys.argv`.
            return_remaining_strings: return unknown words as a last element instead of raising.
            fail_with_unknown_args: raise on unknown names in the file; if false, they are ignored with a line that
                names them. Unknown words of the command line always raise.
            separate_remaining_strings: return the unknown words of the file and of the command line separately.

        Returns:
            An instance of each dataclass, then the unknown words if requested.

        Raises:
            ConfigError: an unreadable file, an unknown name, or a bad value.
        """
        words, path = _without_config(list(sys.argv[1:] if args is None else args))
        left = [] if path is None else self._read(path)
        if left and not return_remaining_strings:
            message = self._unknown(left, f"{path}")
            if fail_with_unknown_args:
                raise ConfigError(message)
            say(f"ignored: {message}")
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
        """Parse a command line as transformers does, but without argument files, which `--config` replaces.

        Raises:
            ConfigError: an unknown word, a bad value, or an argument file.
        """
        if args_filename or args_file_flag:
            raise ConfigError("args_filename and args_file_flag: use parse_args_and_config, with --config FILE.")
        objects, rest = self._parse(list(sys.argv[1:] if args is None else args))
        if return_remaining_strings:
            return (*objects, rest)
        self._refuse(rest)
        return tuple(objects)

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """Set defaults, in subcommands too, and make their arguments optional.

        Args:
            kwargs: name -> value.

        Returns:
            `--name` and value of each unknown name.
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
        if values:  # arguments added by the script itself
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


def _without_config(words: list[str]) -> tuple[list[str], str | None]:
    """Split `--config FILE` or `--config=FILE` from the other words; the last one counts."""
    rest: list[str] = []
    path: str | None = None
    while words:
        word = words.pop(0)
        if word == "--config":
            if not words:
                raise ConfigError("--config: without a file; write --config FILE.")
            path = words.pop(0)
        elif word.startswith("--config="):
            path = word.removeprefix("--config=")
        else:
            rest.append(word)
    return rest, path
