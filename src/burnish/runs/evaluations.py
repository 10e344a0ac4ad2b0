"""Evaluation results, as a run writes and a report reads them."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Comparison", "EvaluationSummary", "Interval"]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over `num` problems with its confidence interval; None for what is unknown."""

    mean: float
    low: float | None = None
    high: float | None = None
    num: int | None = None
    level: float = 0.95

    @property
    def excludes_zero(self) -> bool | None:
        """True if zero lies outside the interval; None without an interval."""
        return None if self.low is None or self.high is None else self.low > 0 or self.high < 0

    def __str__(self) -> str:
        ends = "" if self.low is None or self.high is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.mean:.4g}{ends}"


@dataclass(frozen=True, slots=True)
class EvaluationSummary:
    """The figures of one model without the record of each problem.

    Attributes:
        name: `raw`, or the stage that the model came out of.
        num_problems: problems.
        num_samples: completions a problem.
        pass_at_k: interval over problems for each k.
        criteria: interval over problems of each criterion's mean.
        mean_tokens: mean length of a completion.
        truncated_fraction: fraction of completions truncated at the token limit.
        num_failed: completions that could not be graded.
    """

    name: str
    num_problems: int | None = None
    num_samples: int | None = None
    pass_at_k: dict[int, Interval] = field(default_factory=dict[int, Interval])
    criteria: dict[str, Interval] = field(default_factory=dict[str, Interval])
    mean_tokens: float | None = None
    truncated_fraction: float | None = None
    num_failed: int | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The paired difference `after - before` of one metric on the same problems."""

    before: str
    after: str
    metric: str
    difference: Interval
