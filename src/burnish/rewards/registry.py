"""Criterion kinds by name, and construction of rubrics from run files."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from burnish.config.options import allowed, check_options, check_type
from burnish.config.predicates import is_number
from burnish.errors import ConfigError, show
from burnish.rewards.catalogue import get_repetition_penalty_reward
from burnish.rewards.episodes import EnvironmentReward, valid_tool_calls
from burnish.rewards.formats import format_tags
from burnish.rewards.functions import python_function
from burnish.rewards.instructions import instructions_followed
from burnish.rewards.judge import llm_judge
from burnish.rewards.languages import language_is
from burnish.rewards.programs import code_answer, sql_answer
from burnish.rewards.rubric import Criterion, RewardFunction, Rubric
from burnish.rewards.texts import (
    diversity,
    json_answer,
    length_between,
    multiple_choice,
    quotes_prompt,
    regex_match,
    relative_length,
)
from burnish.rewards.verifiers import (
    exact_answer,
    gym_answer,
    math_answer,
    numeric_answer,
    soft_overlong,
)

__all__ = ["CRITERIA", "rubric_from_config"]


CRITERIA: dict[str, Callable[..., RewardFunction]] = {
    "choice": multiple_choice,
    "citation": quotes_prompt,
    "code": code_answer,
    "diversity": diversity,
    "environment": EnvironmentReward,
    "exact": exact_answer,
    "format": format_tags,
    "gym": gym_answer,
    "instructions": instructions_followed,
    "judge": llm_judge,
    "json": json_answer,
    "language": language_is,
    "length": length_between,
    "math": math_answer,
    "numeric": numeric_answer,
    "python": python_function,
    "regex": regex_match,
    "relative_length": relative_length,
    "repetition": get_repetition_penalty_reward,
    "soft_overlong": soft_overlong,
    "sql": sql_answer,
    "tool_calls": valid_tool_calls,
}
"""`kind` in run files -> factory of the reward function."""

_COMPARING = frozenset({"diversity", "relative_length"})
"""Kinds that compare the completions of a prompt."""
_NOT_IN_FILES = frozenset({"folder", "pool", "sandbox"})
_SWITCHES = frozenset({"isolate", "memoize", "overlap", "per_group"})
_COMMON = _SWITCHES | {"normalize", "requires", "schedule"}
"""Fields of any criterion, beside those that the registry checks itself."""

_LARGEST_WEIGHT = 1e100


def rubric_from_config(entries: Sequence[Mapping[str, Any]], *, folder: Path | None = None) -> Rubric:
    """Build a rubric from a list of tables such as `{kind = "math", weight = 2.0, timeout_seconds = 3}`.

    Args:
        entries: each with `kind` (a name in :data:`CRITERIA`), and optionally `name` (default: the kind, or the name of
            the function), `weight` (default 1), the other fields of :class:`Criterion` and options of that kind.
        folder: folder of the run file, which paths of files with functions are relative to; None for the working
            directory.

    Raises:
        ConfigError: an unknown kind or option, or a missing or bad value; names it and the allowed values.
    """
    return Rubric([_criterion(i, entry, folder) for i, entry in enumerate(entries)])


def _criterion(i: int, entry: Mapping[str, Any], folder: Path | None) -> Criterion:
    options = dict(entry)
    where = f"rubric[{i}]"  # the name of the list in files
    kind = options.pop("kind", None)
    if not isinstance(kind, str) or kind not in CRITERIA:
        raise ConfigError(f"{where}.kind = {show(kind)}: {allowed(str(kind)[:100], CRITERIA)}")
    name = options.pop("name", kind)
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(f"{where}.name = {show(name)}: use a non-empty string.")
    if kind == "python" and "name" not in entry:
        name = str(options.get("function", kind)).rpartition(":")[2]
    common: dict[str, Any] = {"weight": options.pop("weight", 1.0)}
    common |= {key: options.pop(key) for key in _COMMON if key in options}
    if kind in _COMPARING:
        common.setdefault("per_group", True)
    if not is_number(common["weight"]) or abs(common["weight"]) > _LARGEST_WEIGHT:
        raise ConfigError(f"{where}.weight = {show(common['weight'])}: use a finite number.")
    common["weight"] = float(common["weight"])
    if "timeout_seconds" not in inspect.signature(CRITERIA[kind]).parameters:  # graders have a limit per completion
        common["timeout_seconds"] = options.pop("timeout_seconds", None)
        if common["timeout_seconds"] is not None:
            check_type(f"{where}.timeout_seconds", common["timeout_seconds"], "float")
    for key in _SWITCHES & common.keys():
        check_type(f"{where}.{key}", common[key], "bool")
    factory = CRITERIA[kind]
    common_names = {*_COMMON, "kind", "name", "timeout_seconds", "weight"}
    check_options(where, kind, factory, options, hidden=_NOT_IN_FILES, common=common_names)
    if "folder" in inspect.signature(factory).parameters:
        options["folder"] = folder
    try:
        return Criterion(name, factory(**options), **common)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
