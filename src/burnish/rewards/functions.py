"""Import of user reward functions, from a module or a file."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from burnish.config.paths import expanded, is_file, path_problem
from burnish.errors import ConfigError, show
from burnish.rewards.rubric import RewardFunction

__all__ = ["python_function"]

_FORMS = "write 'module:name' for a module that can be imported, or 'rewards.py:name' for a file"


def python_function(
    *, function: str, options: Mapping[str, Any] | None = None, folder: Path | None = None
) -> RewardFunction:
    """Import a user's reward function.

    Args:
        function: "module:name" of an importable module, or "file.py:name". The file may import modules beside it.
        options: keyword arguments to bind.
        folder: folder of the run file, which the path is relative to; None for the working directory.

    Raises:
        ConfigError: it cannot be found, imported or called.
    """
    where = f"function = {show(function)}"
    source, colon, name = function.rpartition(":")
    of_file = source.endswith(".py")
    parts = name.split(".") + ([] if of_file else source.split("."))
    if not (colon and all(part.isidentifier() for part in parts)):
        raise ConfigError(f"{where}: {_FORMS}.")
    target: Any = _module_of_file(source, folder, where) if of_file else _module(source, folder, where)
    for part in name.split("."):
        target = _member(target, part, source, where)
    if not callable(target):
        raise ConfigError(f"{where} is {type(target).__name__}: name a function or another callable.")
    return functools.partial(target, **options) if options else target


def _module(name: str, folder: Path | None, where: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):  # a module that it imports
            raise _unusable(where, name, error) from error
        file = Path(*name.split(".")).with_suffix(".py")
        beside = is_file((folder or Path()) / file)
        fix = f"there is a file {file} beside the run file: write '{file}:NAME' for it" if beside else _FORMS
        raise ConfigError(f"{where} cannot be imported: no module named {error.name!r}; {fix}.") from error
    except (Exception, SystemExit) as error:  # a user module may raise anything
        raise _unusable(where, name, error) from error


def _module_of_file(path: str, folder: Path | None, where: str) -> ModuleType:
    if (problem := path_problem(path)) is not None:
        raise ConfigError(f"{where}: {problem}.")
    file = ((folder or Path()) / expanded(path)).resolve()
    if not is_file(file):
        raise ConfigError(f"{where}: there is no file {file}; paths are relative to the folder of the run file.")
    # Named by the stem alone, so that `rubric_identity` does not depend on where the file is.
    name, number = f"burnish_file_{file.stem}", 1
    while name in sys.modules:
        if getattr(sys.modules[name], "__file__", None) == str(file):
            return sys.modules[name]
        number += 1
        name = f"burnish_file_{file.stem}_{number}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # last, so that it shadows no other module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _unusable(where, path, error) from error
    return module


def _member(owner: Any, name: str, source: str, where: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError as error:
        held = getattr(owner, "__dict__", {})
        known = sorted(key for key, value in held.items() if callable(value) and not key.startswith("_"))
        close = difflib.get_close_matches(name, known, n=1)
        shown = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known[:20]) or 'no function'}."
        raise ConfigError(f"{where}: {source} has no {name!r}; {shown}") from error
    except (Exception, SystemExit) as error:  # modules may define __getattr__
        raise _unusable(where, source, error) from error


def _unusable(where: str, source: str, error: BaseException) -> ConfigError:
    """Describe an error raised during import, with the line of the user's code."""
    if isinstance(error, SyntaxError):
        line = f"line {error.lineno} of {error.filename}"
        return ConfigError(f"{where}: {type(error).__name__} in {line}: {error.msg}; correct it.")
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if not frame.filename.startswith("<frozen") and frame.filename != __file__]
    line = f" (line {users[-1].lineno} of {users[-1].filename})" if users else ""
    said = " ".join(str(error).split())[:500]
    return ConfigError(
        f"{where}: {source} cannot be imported: {type(error).__name__}: {said}{line}; correct it, or install what is "
        "missing."
    )
