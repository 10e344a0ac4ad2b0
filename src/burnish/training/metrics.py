"""Metrics between two logs: means over rollouts and steps, and token metrics as means over tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import torch

from burnish.training.step import Loss, Selected
from burnish.types import Completion, Group

__all__ = ["StepMetrics", "criterion_values", "means_by_name", "means_over_ranks", "with_logged"]

_OF_RECORDS = frozenset(
    {"epoch", "grad_norm", "learning_rate", "loss", "num_tokens", "run", "stage", "step", "time", "train_runtime"}
)
"""Names that every log or its record has."""


def criterion_values(completions: Sequence[Completion], name: str) -> list[float]:
    """Return the values of a criterion over the completions that have it."""
    scores = [c.score.criteria.get(name) for c in completions if c.score is not None]
    return [value for value in scores if value is not None]


def means_over_ranks(
    completions: Sequence[Completion], criteria: Sequence[str], sum_over_ranks: Callable[[float], float]
) -> dict[str, float]:
    """Compute the mean reward, criteria and length over the completions of all ranks."""
    rewards = [r for c in completions if (r := c.reward) is not None]
    sums = {"reward": (sum(rewards), len(rewards))}
    for name in criteria:
        values = criterion_values(completions, name)
        sums[f"rewards/{name}/mean"] = (sum(values), len(values))
    sums["completions/mean_length"] = (sum(c.num_scored_tokens for c in completions), len(completions))
    return {name: sum_over_ranks(value) / max(sum_over_ranks(count), 1.0) for name, (value, count) in sums.items()}


def means_by_name(logged: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the mean of each name's values."""
    values: dict[str, list[float]] = defaultdict(list)
    for name, value in logged:
        values[name].append(value)
    return {name: fmean(found) for name, found in values.items()}


def with_logged(metrics: Mapping[str, float], logged: Mapping[str, float]) -> dict[str, float]:
    """Add metrics logged by reward functions, renamed to `logged/NAME` where the name is taken."""
    taken = _OF_RECORDS | metrics.keys()
    return {**metrics, **{f"logged/{name}" if name in taken else name: value for name, value in logged.items()}}


class StepMetrics:
    """Collect numbers by name; `flush` reduces them over steps and ranks.

    Numbers on a device stay there until then: reading one would make the host wait in the middle of a step.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)
        self._tokens: dict[str, list[tuple[float | torch.Tensor, int | torch.Tensor]]] = defaultdict(list)
        self._parts: dict[str, dict[int, list[float | torch.Tensor]]] = defaultdict(dict)
        self._logged: dict[str, list[float]] = defaultdict(list)

    def add(self, name: str, value: float) -> None:
        """Add a number of this step; the log shows its mean over steps and ranks."""
        self._values[name].append(value)

    def add_tokens(self, name: str, values_N: torch.Tensor | Selected) -> None:
        """Add a number per token; the log shows its mean over all tokens, or over the selected ones."""
        if isinstance(values_N, Selected):
            chosen_N = values_N.chosen
            total = torch.where(chosen_N, values_N.values.detach(), 0).sum()
            self._tokens[name].append((total, chosen_N.sum()))
        else:
            self._tokens[name].append((values_N.detach().sum(), values_N.numel()))

    def add_all(self, values: Mapping[str, float]) -> None:
        """Add several numbers of this step."""
        for name, value in values.items():
            self.add(name, value)

    def add_loss(self, loss: Loss, *, step: int, scale: int) -> None:
        """Add the metrics of a part of a step's loss.

        Args:
            loss: loss of the part; its `sums` are summed over the parts of a step.
            step: optimizer step.
            scale: number of ranks that share the denominator.
        """
        for name, values in loss.means.items():
            self.add_tokens(name, values)
        for name, value in loss.sums.items():
            self._parts[name].setdefault(step, []).append(value * scale)

    def add_logged(self, logged: Iterable[tuple[str, float]]) -> None:
        """Add metrics logged by reward functions, equal on all ranks; the log shows their mean over rounds."""
        for name, value in means_by_name(logged).items():
            self._logged[name].append(value)

    def add_rewards(self, rewards: Sequence[Sequence[float | None]]) -> None:
        """Add the mean reward, the mean standard deviation within groups, and the fraction of groups with none."""
        known = [[r for r in row if r is not None] for row in rewards]
        values = [r for row in known for r in row]
        if values:
            self.add("reward", fmean(values))
        deviations = [stdev(row) for row in known if len(row) > 1]
        if deviations:
            self.add("reward_std", fmean(deviations))
            self.add("frac_reward_zero_std", fmean(float(s == 0) for s in deviations))

    def add_completions(self, groups: Sequence[Group], criteria: Sequence[str]) -> float:
        """Add criteria, failures and lengths of this rank's completions; return the truncated fraction."""
        completions = [c for group in groups for c in group.completions]
        for name in criteria:
            if values := criterion_values(completions, name):
                self.add(f"rewards/{name}/mean", fmean(values))
                self.add(f"rewards/{name}/std", stdev(values) if len(values) > 1 else 0.0)
        self.add("rewards/failed", float(sum(c.reward is None for c in completions)))
        lengths = [c.num_scored_tokens for c in completions]
        clipped = fmean(float(c.is_truncated) for c in completions)
        self.add("completions/mean_length", fmean(lengths))
        self.add("completions/min_length", float(min(lengths)))
        self.add("completions/max_length", float(max(lengths)))
        self.add("completions/clipped_ratio", clipped)
        if episodes := [c.episode for c in completions if c.episode is not None]:
            calls = sum(episode.num_calls for episode in episodes)
            self.add("episodes/mean_turns", fmean(len(episode.turns) for episode in episodes))
            self.add("episodes/failed", float(sum(episode.error is not None for episode in episodes)))
            self.add("tools/call_frequency", calls / len(episodes))
            self.add("tools/failure_frequency", sum(e.num_failed_calls for e in episodes) / calls if calls else 0.0)
        return clipped

    def flush(self, gathered: Callable[[Sequence[Any]], list[Any]]) -> dict[str, float]:
        """Return the metrics since the last flush, over the ranks that have them.

        Ranks may differ in names: one may have no completion with a criterion, or no token in the loss.

        Args:
            gathered: concatenates the lists of all ranks.
        """
        means = {name: fmean(values) for name, values in self._values.items()}
        means |= {name: fmean(sums.values()) for name, sums in self._sums().items()}
        tokens = {
            name: [sum(float(s) for s, _ in parts), sum(int(n) for _, n in parts)]
            for name, parts in self._tokens.items()
        }
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

    def _sums(self) -> dict[str, dict[int, float]]:
        return {
            name: {step: sum(map(float, values)) for step, values in steps.items()}
            for name, steps in self._parts.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what was collected since the last flush, as JSON."""
        parts = {name: list(sums.items()) for name, sums in self._sums().items()}
        tokens = {name: [(float(s), int(n)) for s, n in found] for name, found in self._tokens.items()}
        return {"values": dict(self._values), "tokens": tokens, "logged": dict(self._logged), "parts": parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._values = defaultdict(list, state["values"])
        self._logged = defaultdict(list, state.get("logged", {}))
        self._tokens = defaultdict(list, {name: [(s, n) for s, n in parts] for name, parts in state["tokens"].items()})
        parts = {name: {step: [value] for step, value in sums} for name, sums in state.get("parts", {}).items()}
        self._parts = defaultdict(dict, parts)
