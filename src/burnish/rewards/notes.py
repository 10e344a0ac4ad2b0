"""Transcript columns and metrics that reward functions log with `log_extra` and `log_metric`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

__all__ = ["Notes", "as_list"]


class Notes:
    """Columns and metrics of one call, which `settle` records once the call has succeeded.

    Args:
        size: number of completions in the call.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._columns: dict[str, list[Any]] = {}
        self._metrics: list[tuple[str, float]] = []

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Add a column to the transcripts.

        Args:
            column: name of the column.
            values: one per completion of the call.

        Raises:
            TypeError: `values` is not a list, or the name is not a string.
            ValueError: the length is not the number of completions.
        """
        listed = as_list(values)
        if not isinstance(column, str) or listed is None:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"log_extra({column!r:.80}, {values!r:.80}): pass a name and a list with one value per completion"
            )
        if len(listed) != self._size:
            raise ValueError(f"log_extra({column!r:.80}): {len(listed)} values for {self._size} completions")
        self._columns[column] = listed

    def log_metric(self, name: str, value: float) -> None:
        """Log a number; the metric is the mean of all numbers logged under the name.

        Args:
            name: name of the metric.
            value: a number, or a tensor or array of one element.

        Raises:
            TypeError: it is not a number, or the name is not a string.
        """
        given: Any = value
        number: Any = given.item() if hasattr(given, "item") and getattr(given, "size", None) != 0 else given
        if not isinstance(name, str) or not isinstance(number, int | float):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"log_metric({name!r:.80}, {value!r:.80}): pass a name and a number")
        self._metrics.append((name, float(number)))

    def settle(
        self, criterion: str, extras: Sequence[dict[str, Any]], log_metric: Callable[[str, float], object] | None
    ) -> None:
        """Record the columns and the metrics.

        Args:
            criterion: name of the criterion; prefix of columns whose name is taken.
            extras: columns of each completion of the call, to add to.
            log_metric: receives the metrics; None drops them.
        """
        for column, values in self._columns.items():
            for extra, value in zip(extras, values, strict=True):
                extra[f"{criterion}/{column}" if column in extra else column] = value
        for name, value in self._metrics if log_metric is not None else ():
            cast("Callable[[str, float], object]", log_metric)(name, value)


def as_list(values: Any) -> list[Any] | None:
    """Convert a list, tuple, array or tensor to a list; None for anything else."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    return list(cast("Sequence[Any]", values)) if isinstance(values, list | tuple) else None
