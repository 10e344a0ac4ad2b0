"""Held-out data sets: one or several by name, the metrics of each, and what a run may be steered by."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, cast

from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import EarlyStoppingCallback

from burnish.errors import ConfigError, DataError
from burnish.types import Group

__all__ = ["check_best_metric", "encode_sets", "named_sets", "own_set", "sets_of_rows"]

_OF_EVERY_EVALUATION = frozenset({"runtime", "samples_per_second", "steps_per_second", "num_tokens"})
"""Metrics that transformers and the base trainer add."""


def encode_sets(dataset: Any, encode: Callable[[Any, str], list[Group]]) -> list[Group] | dict[str, list[Group]] | None:
    """Groups of an `eval_dataset`: of one data set, or of each in a dictionary of data sets by name.

    Raises:
        DataError: a dictionary without any set, or a set without a row.
    """
    if dataset is None:
        return None
    if (sets := sets_of_rows(dataset)) is None:
        return encode(dataset, "eval_dataset")
    if not sets:
        raise DataError("eval_dataset = {}: pass held-out rows by name, such as {'math': rows}, or None.")
    return {str(name): encode(rows, f"eval_dataset[{name!r}]") for name, rows in sets.items()}


def sets_of_rows(dataset: Any) -> Mapping[Any, Any] | None:
    """The mapping itself where it holds data sets by name, rather than a source specification or columns."""
    if not isinstance(dataset, Mapping):
        return None
    sets = cast("Mapping[Any, Any]", dataset)
    of_a_source = {"mix", "path", "source"} & set(map(str, sets))
    return sets if not of_a_source and all(map(_holds_rows, sets.values())) else None


def _holds_rows(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(row, Mapping | Group) for row in cast("list[Any]", value)[:1])
    return isinstance(value, Iterable) and not isinstance(value, str | bytes)


def named_sets(dataset: Any, prefix: str = "eval") -> dict[str, list[Group]]:
    """Encoded data sets by the prefix of their metrics: `eval`, or `eval_NAME` for each of several."""
    if dataset is None:
        return {}
    if isinstance(dataset, Mapping):
        return {f"{prefix}_{name}": groups for name, groups in cast("Mapping[str, list[Group]]", dataset).items()}
    return {prefix: cast("list[Group]", dataset)}


def own_set(dataset: Any, given: Any) -> list[Group] | None:
    """The trainer's own data set that `given` means (None, a name, or the set itself); None for other rows.

    Raises:
        DataError: there is nothing to evaluate on, or no set of that name.
    """
    sets = named_sets(dataset)
    if given is None:
        if "eval" not in sets:
            raise DataError("eval_dataset = None: pass held-out rows to the trainer or to evaluate().")
        return sets["eval"]
    if isinstance(given, str):
        if f"eval_{given}" not in sets:
            names = ", ".join(repr(name.removeprefix("eval_")) for name in sets if name != "eval") or "none"
            raise DataError(f"eval_dataset = {given!r}: no held-out set of that name; the trainer has {names}.")
        return sets[f"eval_{given}"]
    return next((groups for groups in sets.values() if groups is given), None)


def check_best_metric(trainer: Any, names: Collection[str] | None) -> None:
    """Refuse a `metric_for_best_model` that no evaluation yields, before the first step.

    Args:
        trainer: about to train.
        names: metrics of one evaluation without their prefix; None where a user's function adds others.

    Raises:
        ConfigError: naming the metrics that there are.
    """
    args = trainer.args
    wanted = args.metric_for_best_model
    steers = (
        args.load_best_model_at_end
        or str(getattr(args.save_strategy, "value", args.save_strategy)) == "best"
        or isinstance(trainer.lr_scheduler, ReduceLROnPlateau)
        or str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)) == "reduce_lr_on_plateau"
        or any(isinstance(callback, EarlyStoppingCallback) for callback in trainer.callback_handler.callbacks)
    )
    if wanted is None or not steers or names is None or trainer.eval_dataset is None:
        return
    prefixes = [prefix.removeprefix("eval").lstrip("_") for prefix in named_sets(trainer.eval_dataset)]
    known = [f"{prefix}_{name}" if prefix else name for prefix in prefixes for name in (*names, *_OF_EVERY_EVALUATION)]
    if wanted.removeprefix("eval_") not in known:
        shown = ", ".join(f"eval_{name}" for name in known if not name.endswith(tuple(_OF_EVERY_EVALUATION)))
        raise ConfigError(
            f"metric_for_best_model = {wanted!r}: no evaluation of this run yields it; use one of {shown}."
        )
