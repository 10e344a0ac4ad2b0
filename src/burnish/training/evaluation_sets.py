"""Evaluation sets, one or several by name, and the metric that a run tracks on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import EarlyStoppingCallback

from burnish.errors import ConfigError, DataError
from burnish.types import Group

__all__ = [
    "TIMINGS",
    "check_tracked_metric",
    "check_tracked_metric_name",
    "encode_sets",
    "evaluation_set",
    "named_row_sets",
    "named_sets",
]

TIMINGS = ("runtime", "samples_per_second", "steps_per_second")
"""Metrics that transformers adds to every evaluation."""


def encode_sets(dataset: Any, encode: Callable[[Any, str], list[Group]]) -> list[Group] | dict[str, list[Group]] | None:
    """Encode an `eval_dataset`: one data set, or each of a dictionary of data sets by name.

    Raises:
        DataError: an empty dictionary, or an empty set.
    """
    if dataset is None:
        return None
    if (sets := named_row_sets(dataset)) is None:
        return encode(dataset, "eval_dataset")
    if not sets:
        raise DataError("eval_dataset = {}: pass held-out rows by name, such as {'math': rows}, or None.")
    return {str(name): encode(rows, f"eval_dataset[{name!r}]") for name, rows in sets.items()}


def named_row_sets(dataset: Any) -> Mapping[Any, Any] | None:
    """Return a mapping of data sets by name as it is; None for rows, columns or a source specification."""
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
    """Key encoded data sets by the prefix of their metrics: `eval`, or `eval_NAME` for each of several."""
    if dataset is None:
        return {}
    if isinstance(dataset, Mapping):
        return {f"{prefix}_{name}": groups for name, groups in cast("Mapping[str, list[Group]]", dataset).items()}
    return {prefix: cast("list[Group]", dataset)}


def evaluation_set(dataset: Any, given: Any) -> list[Group] | None:
    """Find the trainer's evaluation set by None (the only one), its name, or itself; return None for other rows.

    Raises:
        DataError: there is no evaluation set, or none of that name.
    """
    sets = named_sets(dataset)
    if given is None:
        if "eval" not in sets:
            raise DataError("eval_dataset = None: pass held-out rows to the trainer or to evaluate().")
        return sets["eval"]
    if isinstance(given, str):
        if f"eval_{given}" not in sets:
            names = ", ".join(repr(name.removeprefix("eval_")) for name in sets if name != "eval") or "none"
            raise DataError(f"eval_dataset = {given!r}: not an evaluation set of this trainer, which has {names}.")
        return sets[f"eval_{given}"]
    return next((groups for groups in sets.values() if groups is given), None)


def check_tracked_metric_name(trainer: Any) -> None:
    """Refuse a `metric_for_best_model` that no evaluation returns, or to track one without evaluations.

    Raises:
        ConfigError: with the known metrics, or the missing field.
    """
    args = trainer.args
    wanted = args.metric_for_best_model
    if (tracker := _tracker(trainer)) is None or trainer.eval_dataset is None:
        return
    if wanted is None:
        raise ConfigError(f"{tracker} with metric_for_best_model = None: name the metric to track, such as 'loss'.")
    sets = named_sets(trainer.eval_dataset)
    names = {prefix: trainer.stage.evaluation_names(groups) for prefix, groups in sets.items()}
    if any(found is None for found in names.values()):
        return
    known = [f"{prefix}_{name}" for prefix, found in names.items() for name in (*found, *TIMINGS)]
    if _full_name(wanted) not in known:
        shown = ", ".join(name for name in known if not name.endswith(TIMINGS))
        raise ConfigError(
            f"metric_for_best_model = {wanted!r}: no evaluation of this run returns it; use one of {shown}."
        )


def check_tracked_metric(trainer: Any, metrics: Mapping[str, float]) -> None:
    """Refuse an evaluation during training that lacks the metric to track, which `compute_metrics` may return.

    Raises:
        ConfigError: with the metrics it has.
    """
    wanted = trainer.args.metric_for_best_model
    if wanted is not None and _tracker(trainer) is not None and _full_name(wanted) not in metrics:
        raise ConfigError(
            f"metric_for_best_model = {wanted!r}: the evaluation at step {trainer.state.global_step} lacks it; "
            f"let compute_metrics return it, or use one of {', '.join(sorted(metrics))}."
        )


def _full_name(wanted: str) -> str:
    return wanted if wanted.startswith("eval_") else f"eval_{wanted}"


def _tracker(trainer: Any) -> str | None:
    """Name the setting that tracks a metric of the evaluations, or None.

    Raises:
        ConfigError: there will be no evaluation.
    """
    args = trainer.args
    stopping = any(isinstance(callback, EarlyStoppingCallback) for callback in trainer.callback_handler.callbacks)
    found = {
        "load_best_model_at_end = True": args.load_best_model_at_end,
        "save_strategy = 'best'": _word(args.save_strategy) == "best",
        "ReduceLROnPlateau": isinstance(trainer.lr_scheduler, ReduceLROnPlateau)
        or _word(args.lr_scheduler_type) == "reduce_lr_on_plateau",
        "EarlyStoppingCallback": stopping,
    }
    trackers = [name for name, is_there in found.items() if is_there]
    if _word(args.eval_strategy) == "no" and trackers[-1:] and trackers != ["load_best_model_at_end = True"]:
        raise ConfigError(f"{trackers[-1]} with eval_strategy = 'no': there is no metric to track; set eval_strategy.")
    return trackers[0] if trackers else None


def _word(value: Any) -> str:
    return str(getattr(value, "value", value))
