"""Environments of the package verifiers, loaded once in a process, and the rows that they bring along."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import signal
from collections.abc import Mapping
from typing import Any

from packaging.version import Version

from burnish.data.formats import messages_of
from burnish.errors import ConfigError, show

__all__ = ["load_verifiers", "release_signals", "require_verifiers", "verifiers_rows"]

_OLDEST, _NEWEST = Version("0.1.14"), Version("0.2")
_INSTALL = "pip install 'burnish[verifiers]'"
_loaded: dict[tuple[str, str], Any] = {}


def require_verifiers() -> None:
    """Check the installed version, without an import.

    Raises:
        ConfigError: verifiers is not installed, or not of the line whose environments play turn by turn.
    """
    try:
        version = importlib.metadata.version("verifiers")
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(f"verifiers needs the package verifiers: {_INSTALL}.") from error
    if not _OLDEST <= Version(version) < _NEWEST:
        raise ConfigError(
            f"verifiers {version} is installed: burnish plays {_OLDEST} and later of the line 0.1, whose environments "
            f"can be played turn by turn; {_INSTALL}."
        )


def load_verifiers(env_id: str, options: Mapping[str, Any]) -> Any:
    """Load an environment, or return the one that was loaded with the same options.

    Args:
        env_id: name of the environment, whose module `verifiers.load_environment` imports.
        options: arguments of its `load_environment`.

    Raises:
        ConfigError: verifiers or the environment is not installed, or refuses the options.
    """
    require_verifiers()
    key = (env_id, json.dumps(dict(options), sort_keys=True, default=repr))
    if key not in _loaded:
        verifiers: Any = importlib.import_module("verifiers")
        try:
            _loaded[key] = verifiers.load_environment(env_id, **options)
        except Exception as error:
            said = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"env_id = {env_id!r} with options = {show(dict(options))}: verifiers cannot load it "
                f"({type(error).__name__}: {said}); install its package, and look at the options."
            ) from error
        finally:
            release_signals()
    return _loaded[key]


def release_signals() -> None:
    """Undo the signal handlers that every environment of verifiers installs, so that a run can save when preempted."""
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if getattr(signal.getsignal(number), "__module__", None) == "verifiers.envs.environment":
            signal.signal(number, default)


def verifiers_rows(spec: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    """Return the rows of an environment's data set.

    Args:
        spec: `env_id`, and optionally `options` and `split`, "train" or "eval".
        field: name of the source in messages.

    Raises:
        ConfigError: the environment cannot be loaded, or has no such data set.
    """
    split = spec.get("split", "train")
    try:
        environment = load_verifiers(spec["env_id"], spec.get("options", {}))
        # get_eval_dataset() would silently return the training rows where there are no others.
        found = environment.build_dataset() if split == "train" else environment.build_eval_dataset()
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from error
    if found is None:
        other = "eval" if split == "train" else "train"
        raise ConfigError(
            f'{field}.split = {split!r}: the environment {spec["env_id"]!r} has no such rows; use "{other}".'
        )
    rows: list[dict[str, Any]] = found.to_list()
    return [
        {**row, "prompt": messages_of(row["prompt"])} if isinstance(row.get("prompt"), list) else row for row in rows
    ]
