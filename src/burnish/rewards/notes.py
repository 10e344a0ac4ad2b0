"""What a reward function logs beside its values, by the arguments `log_extra` and `log_metric`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

__all__ = ["Notes", "as_list"]


class Notes:
    """Columns and metrics of one call; they count once the call has succeeded.

    Args:
        size: completions of the call.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._columns: dict[str, list[Any]] = {}
        self._metrics: list[tuple[str, float]] = []

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Add a column to the transcripts.

        Args:
            column: its name.
            values: one for each completion of the call.

        Raises:
            TypeError: `values` is not a list, or the name is not a string.
            ValueError: its length is not that of the completions.
        """
        listed = as_list(values)
        if not isinstance(column, str) or listed is None:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"log_extra({column!r:.80}, {values!r:.80}): pass a name, and a list of one value each")
        if len(listed) != self._size:
            raise ValueError(f"log_extra({column!r:.80}): {len(listed)} values for {self._size} completions")
        self._columns[column] = listed

    def log_metric(self, name: str, value: float) -> None:
        """Log a number; the metric is the mean of all that is logged under the name.

        Args:
            name: of the metric.
            value: a number, or a tensor or an array of one.

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
        """Hand everything on.

        Args:
            criterion: whose call it was; tells columns of two criteria with one name apart.
            extras: of each completion of the call; columns are added.
            log_metric: takes the metrics; None drops them.
        """
        for column, values in self._columns.items():
            for extra, value in zip(extras, values, strict=True):
                extra[f"{criterion}/{column}" if column in extra else column] = value
        for name, value in self._metrics if log_metric is not None else ():
            cast("Callable[[str, float], object]", log_metric)(name, value)


def as_list(values: Any) -> list[Any] | None:
    """A list, a tuple, an array or a tensor as a list; None of anything else."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    return list(cast("Sequence[Any]", values)) if isinstance(values, list | tuple) else None
