"""Kinds of environments by name, and the factories of run files. Imports no torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from burnish.config.options import allowed, check_options
from burnish.environments.gym import gym_environment
from burnish.environments.mcp import mcp_environment
from burnish.environments.openenv import openenv_environment
from burnish.environments.textarena import textarena_environment
from burnish.environments.tool_sets import ToolSet
from burnish.environments.tools import Tool
from burnish.environments.verifiers import verifiers_environment
from burnish.errors import ConfigError, show
from burnish.rewards.functions import python_function

__all__ = ["ENVIRONMENTS", "NOT_IN_FILES", "environments_from_config", "python_environment", "tools_environment"]


def tools_environment(*, tools: Sequence[str], folder: Path | None = None) -> Callable[[], ToolSet]:
    """Offer typed Python functions as tools.

    Args:
        tools: "module:name" or "file.py:name" of each.
        folder: folder of the run file, which paths are relative to.

    Raises:
        ConfigError: a function that cannot be found, or cannot be a tool.
    """
    if not tools:
        raise ConfigError('tools = []: name at least one function, such as "tools.py:add".')
    found = [Tool.of(_imported("tools", name, None, folder)) for name in tools]
    if repeated := [tool.name for i, tool in enumerate(found) if tool.name in [other.name for other in found[:i]]]:
        raise ConfigError(f"tools: two are named {repeated[0]!r}: rename one function.")
    return lambda: ToolSet(found)


def python_environment(
    *, factory: str, options: Mapping[str, Any] | None = None, folder: Path | None = None
) -> Callable[[], Any]:
    """Make environments of your own: a class or function that returns an `Environment`, or an object of TRL's protocol.

    Args:
        factory: "module:name" or "file.py:name".
        options: keyword arguments to call it with.
        folder: folder of the run file, which the path is relative to.

    Raises:
        ConfigError: it cannot be found, imported or called.
    """
    return _imported("factory", factory, options, folder)


def _imported(field: str, name: str, options: Mapping[str, Any] | None, folder: Path | None) -> Callable[..., Any]:
    try:
        return python_function(function=name, options=options, folder=folder)
    except ConfigError as error:
        raise ConfigError(str(error).replace("function = ", f"{field} = ", 1)) from error


ENVIRONMENTS: dict[str, Callable[..., Callable[[], Any]]] = {
    "gym": gym_environment,
    "mcp": mcp_environment,
    "openenv": openenv_environment,
    "python": python_environment,
    "textarena": textarena_environment,
    "tools": tools_environment,
    "verifiers": verifiers_environment,
}
"""`kind` in run files -> function that makes the factory of an episode's environment."""

NOT_IN_FILES = frozenset({"folder"})
"""Parameters that a file does not set."""


def environments_from_config(
    tables: Mapping[str, Any] | Sequence[Mapping[str, Any]], *, folder: Path | None = None
) -> Callable[[], Any] | dict[str, Callable[[], Any]]:
    """Build the `environment_factory` of `[environment]`, or of several `[[environment]]`.

    Args:
        tables: one table with `kind` (a name in :data:`ENVIRONMENTS`) and the options of that kind; or a list of such
            tables, each also with a `name`, by which the column `environment` of the rows chooses.
        folder: folder of the run file.

    Raises:
        ConfigError: an unknown kind or option, or a missing or bad value; names it and the allowed values.
    """
    if isinstance(tables, Mapping):
        return _factory("environment", tables, folder)
    made: dict[str, Callable[[], Any]] = {}
    for i, table in enumerate(tables):
        where, options = f"environment[{i}]", dict(table)
        name = options.pop("name", None)
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(
                f"{where}.name = {show(name)}: use the name that the column environment of its rows holds; a single "
                "environment for all rows is a table [environment] without a name."
            )
        if name in made:
            raise ConfigError(f"{where}.name = {name!r}: an earlier one has this name; use another.")
        made[name] = _factory(where, options, folder)
    if not made:
        raise ConfigError("environment = []: add an [[environment]], or remove it.")
    return made


def _factory(where: str, table: Mapping[str, Any], folder: Path | None) -> Callable[[], Any]:
    options = dict(table)
    kind = options.pop("kind", None)
    if not isinstance(kind, str) or kind not in ENVIRONMENTS:
        raise ConfigError(f"{where}.kind = {show(kind)}: {allowed(str(kind)[:100], ENVIRONMENTS)}")
    make = ENVIRONMENTS[kind]
    check_options(where, kind, make, options, hidden=NOT_IN_FILES, common=("kind",))
    if "folder" in inspect.signature(make).parameters:
        options["folder"] = folder
    try:
        return make(**options)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
