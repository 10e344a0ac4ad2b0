"""reasoning-gym's scorers for worker processes, with every evaluation of text replaced by a parser."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Mapping
from typing import Any, cast

from burnish.rewards.formulas import read_integer, read_literal, stop_sympy_evaluating

__all__ = ["EVALUATORS", "prepare_gym"]

EVALUATORS: Mapping[str, Callable[[str], Any]] = {
    "algorithmic.binary_matrix": read_literal,
    "algorithmic.number_sorting": read_literal,
    "algorithmic.spiral_matrix": read_literal,
    "algorithmic.string_insertion": read_literal,
    "arithmetic.bitwise_arithmetic": read_integer,
    "games.n_queens": read_literal,
}
"""Replacement of `eval` in each reasoning_gym module whose scorer evaluates an answer or an entry."""

# These compare boards of tuples, which JSON turns into lists: their gold answers would score 0.05.
_TUPLE_TASKS = frozenset({"arc_agi", "rearc"})


@functools.cache
def _dataset(task: str, config: str) -> Any:
    stop_sympy_evaluating()
    # Imported by name, since the package ships no types.
    importlib.import_module("reasoning_gym")
    for name, evaluator in EVALUATORS.items():
        module: Any = importlib.import_module(f"reasoning_gym.{name}")
        module.eval = evaluator  # a module global shadows the builtin
    factory: Any = importlib.import_module("reasoning_gym.factory")
    return factory.create_dataset(task, **json.loads(config))


def prepare_gym(task: str, config: str, entry: str, answer: str) -> Callable[[], float]:
    """Set up a task and return the call of its scorer."""
    dataset = _dataset(task, config)
    parsed: dict[str, Any] = json.loads(entry)
    if task in _TUPLE_TASKS:
        parsed = _tuples(parsed)
    return lambda: float(dataset.score_answer(answer, parsed))


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in cast("dict[str, Any]", value).items()}
    return tuple(_tuples(item) for item in cast("list[Any]", value)) if isinstance(value, list) else value
