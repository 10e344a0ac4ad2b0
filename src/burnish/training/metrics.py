"""Metrics of online training between two logs: means over rollouts and steps, token metrics as means over tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import torch

from burnish.training.step import Loss
from burnish.types import Completion, Group, StopReason

__all__ = ["StepMetrics", "criterion_values", "means_by_name", "means_over_ranks", "with_logged"]

_OF_RECORDS = frozenset(
    {"epoch", "grad_norm", "learning_rate", "loss", "num_tokens", "run", "stage", "step", "time", "train_runtime"}
)
"""Names that every log or record of one has."""


def criterion_values(completions: Sequence[Completion], name: str) -> list[float]:
    """The values of one criterion over the completions that have it."""
    scores = [c.score.criteria.get(name) for c in completions if c.score is not None]
    return [value for value in scores if value is not None]


def means_over_ranks(
    completions: Sequence[Completion], criteria: Sequence[str], sum_over_ranks: Callable[[float], float]
) -> dict[str, float]:
    """Means of the reward, of each criterion and of the lengths over the completions of all ranks."""
    rewards = [r for c in completions if (r := c.reward) is not None]
    sums = {"reward": (sum(rewards), len(rewards))}
    for name in criteria:
        values = criterion_values(completions, name)
        sums[f"rewards/{name}/mean"] = (sum(values), len(values))
    sums["completions/mean_length"] = (sum(len(c.token_ids) for c in completions), len(completions))
    return {name: sum_over_ranks(value) / max(sum_over_ranks(count), 1.0) for name, (value, count) in sums.items()}


def means_by_name(logged: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The mean of the numbers of each name."""
    values: dict[str, list[float]] = defaultdict(list)
    for name, value in logged:
        values[name].append(value)
    return {name: fmean(found) for name, found in values.items()}


def with_logged(metrics: Mapping[str, float], logged: Mapping[str, float]) -> dict[str, float]:
    """Metrics with those that reward functions logged; one whose name is taken goes by `logged/name`."""
    taken = _OF_RECORDS | metrics.keys()
    return {**metrics, **{f"logged/{name}" if name in taken else name: value for name, value in logged.items()}}


class StepMetrics:
    """Collects numbers by name; `flush` reduces them over steps and ranks."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)
        self._tokens: dict[str, list[tuple[float, int]]] = defaultdict(list)
        self._parts: dict[str, dict[int, float]] = defaultdict(dict)
        self._logged: dict[str, list[float]] = defaultdict(list)

    def add(self, name: str, value: float) -> None:
        """A number of this step; the log shows the mean over steps and ranks."""
        self._values[name].append(value)

    def add_tokens(self, name: str, values_N: torch.Tensor) -> None:
        """A number per token; the log shows the mean over all tokens."""
        self._tokens[name].append((float(values_N.detach().sum()), values_N.numel()))

    def add_all(self, values: Mapping[str, float]) -> None:
        """Add several numbers of this step."""
        for name, value in values.items():
            self.add(name, value)

    def add_loss(self, loss: Loss, *, step: int, scale: int) -> None:
        """Add what a part of a step's loss says of itself.

        Args:
            loss: its `sums` show as the mean over steps and ranks of the sums of the parts.
            step: the optimizer step.
            scale: ranks that share the denominator.
        """
        for name, values in loss.means.items():
            self.add_tokens(name, values)
        for name, value in loss.sums.items():
            self._parts[name][step] = self._parts[name].get(step, 0.0) + value * scale

    def add_logged(self, logged: Iterable[tuple[str, float]]) -> None:
        """Numbers that reward functions logged, the same on every rank; the log shows the mean over the rounds."""
        for name, value in means_by_name(logged).items():
            self._logged[name].append(value)

    def add_rewards(self, rewards: Sequence[Sequence[float | None]]) -> None:
        """Mean reward, mean spread within groups, and the share of groups without any."""
        known = [[r for r in row if r is not None] for row in rewards]
        values = [r for row in known for r in row]
        if values:
            self.add("reward", fmean(values))
        spread = [stdev(row) for row in known if len(row) > 1]
        if spread:
            self.add("reward_std", fmean(spread))
            self.add("frac_reward_zero_std", fmean(float(s == 0) for s in spread))

    def add_completions(self, groups: Sequence[Group], criteria: Sequence[str]) -> float:
        """Criteria, failures and lengths of this rank's completions; returns the share cut at the limit."""
        completions = [c for group in groups for c in group.completions]
        for name in criteria:
            if values := criterion_values(completions, name):
                self.add(f"rewards/{name}/mean", fmean(values))
                self.add(f"rewards/{name}/std", stdev(values) if len(values) > 1 else 0.0)
        self.add("rewards/failed", float(sum(c.reward is None for c in completions)))
        lengths = [len(c.token_ids) for c in completions]
        clipped = fmean(float(c.stop_reason is StopReason.LENGTH) for c in completions)
        self.add("completions/mean_length", fmean(lengths))
        self.add("completions/min_length", float(min(lengths)))
        self.add("completions/max_length", float(max(lengths)))
        self.add("completions/clipped_ratio", clipped)
        return clipped

    def flush(self, gathered: Callable[[Sequence[Any]], list[Any]]) -> dict[str, float]:
        """The metrics since the last flush, over the ranks that have them.

        Ranks need not have the same names: one of them may have no completion that a criterion judged, or no token in
        the loss.

        Args:
            gathered: the same list of all ranks.
        """
        means = {name: fmean(values) for name, values in self._values.items()}
        means |= {name: fmean(sums.values()) for name, sums in self._parts.items()}
        tokens = {name: [sum(s for s, _ in parts), sum(n for _, n in parts)] for name, parts in self._tokens.items()}
        logged = {name: fmean(values) for name, values in sorted(self._logged.items())}  # the same on every rank
        for collected in (self._values, self._tokens, self._parts, self._logged):
            collected.clear()
        ranks = gathered([(means, tokens)])
        logs: dict[str, float] = {}
        for name in sorted({name for own, _ in ranks for name in own}):
            logs[name] = fmean(own[name] for own, _ in ranks if name in own)
        for name in sorted({name for _, own in ranks for name in own}):
            total, count = (sum(own[name][i] for _, own in ranks if name in own) for i in (0, 1))
            if count:
                logs[name] = total / count
        return with_logged(logs, logged)

    def state_dict(self) -> dict[str, Any]:
        """What has been collected since the last flush, as JSON."""
        parts = {name: list(sums.items()) for name, sums in self._parts.items()}
        own = {"values": dict(self._values), "tokens": dict(self._tokens), "logged": dict(self._logged)}
        return {**own, "parts": parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._values = defaultdict(list, state["values"])
        self._logged = defaultdict(list, state.get("logged", {}))
        self._tokens = defaultdict(list, {name: [(s, n) for s, n in parts] for name, parts in state["tokens"].items()})
        self._parts = defaultdict(dict, {name: dict(sums) for name, sums in state.get("parts", {}).items()})
