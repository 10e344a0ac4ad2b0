"""Data of the report's charts: curves, reward histograms and transcripts, as pure functions of a run's records."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from burnish.report.records import MetricRow, Transcript

__all__ = ["ema", "histograms", "pack_transcripts", "sample_evenly", "stage_curves"]

_MAX_POINTS = 1500
_NUM_BINS = 20
_NOT_DRAWN = {"epoch"}

# (pattern of the metric, title, unit, group); the first match wins and the order is that of the page.
_PANELS: tuple[tuple[str, str, str, str], ...] = (
    (r"reward", "Reward, total", "", "Rewards"),
    (r"rewards/(.+)/mean", r"\1", "reward", "Rewards"),
    (r"reward_std", "Reward deviation", "std in a group", "Rewards"),
    (r"frac_reward_zero_std", "Groups of equal rewards", "fraction", "Rewards"),
    (r"completions/mean_length", "Completion length", "tokens, mean", "Completions"),
    (r"completions/clipped_ratio", "Cut at the token limit", "fraction", "Completions"),
    (r"completions/settled_ratio", "Stopped, reward settled", "fraction", "Completions"),
    (r"entropy", "Entropy", "nats per token", "Completions"),
    (r"(eval_)?loss", "Loss", "", "Optimisation"),
    (r"(eval_)?mean_token_accuracy", "Token accuracy", "fraction", "Optimisation"),
    (r"(eval_)?accuracy", "Pairs ranked right", "fraction", "Optimisation"),
    (r"(eval_)?margin", "Margin of the chosen", "score", "Optimisation"),
    (r"(eval_)?rewards/accuracies", "Pairs preferred right", "fraction", "Optimisation"),
    (r"(eval_)?rewards/margins", "Margin of the chosen", "implicit reward", "Optimisation"),
    (r"grad_norm", "Gradient norm", "before clipping", "Optimisation"),
    (r"kl", "KL to reference", "nats per token", "Optimisation"),
    (r"learning_rate", "Learning rate", "", "Optimisation"),
    (r"sampling/kl", "KL of sampler to trainer", "nats per token", "Optimisation"),
    (r"sampling/logprob_difference/(.+)", r"Sampler/trainer gap, \1", "nats", "Optimisation"),
    (r"seconds/(.+)", "Where the time of a step goes", "seconds", "Speed"),
    (r"tokens/(.+)", "Tokens of a step", "tokens", "Speed"),
    (r"tokens_per_second", "Throughput", "tokens per second", "Speed"),
)

_STACKED = "seconds/"
"""Beginning of the metrics that are parts of one whole, and drawn on top of each other."""
_PHASES = ("sampling", "waiting", "sync", "rewards", "scoring", "update", "evaluation", "saving", "other")
"""Order of the phases of a step, from the bottom."""


def ema(values: Sequence[float | None], span: float) -> list[float | None]:
    """Exponential moving average without the pull of its start: sum_i d^(t-i) x_i / sum_i d^(t-i), d = 1 - 2/(span+1).

    A value of None leaves the average as it is.
    """
    decay = 1 - 2 / (span + 1)
    total = weight = 0.0
    smooth: list[float | None] = []
    for value in values:
        if value is not None:
            total, weight = decay * total + value, decay * weight + 1
        smooth.append(total / weight if weight else None)
    return smooth


def _panel_of(metric: str) -> tuple[int, str, str, str]:
    """Return (position, title, unit, group) of a metric; unknown ones come last, under their own name."""
    for position, (pattern, title, unit, group) in enumerate(_PANELS):
        match = re.fullmatch(pattern, metric)
        if match:
            return position, match.expand(title), unit, group
    return len(_PANELS), metric, "", "Other metrics"


def _order(metric: str) -> tuple[int, int]:
    """Sort metrics by panel, and the phases of a step in their order."""
    phase = metric.removeprefix(_STACKED)
    return _panel_of(metric)[0], _PHASES.index(phase) if phase in _PHASES else len(_PHASES)


def _series(metric: str, rows: Sequence[MetricRow], stride: int) -> dict[str, Any]:
    """One line: every stride-th value, its average over all values, and the extremes over all values."""
    values = [row.values.get(metric) for row in rows]
    known = [(value, row.step) for value, row in zip(values, rows, strict=True) if value is not None]
    # A schedule is exact: smoothing would draw a rate that was never used.
    smooth = values if metric == "learning_rate" else ema(values, max(3.0, len(known) / 16))
    return {
        "label": metric.removeprefix(_STACKED).removeprefix("tokens/"),
        "raw": values[::stride],
        "ema": [None if value is None else float(f"{value:.6g}") for value in smooth[::stride]],
        "count": len(known),
        "first": known[0][0] if known else None,
        "last": known[-1][0] if known else None,
        "min": min(known, default=None),
        "max": max(known, default=None),
        "bad": [row.step for row in rows if metric in row.values and row.values[metric] is None],
    }


def stage_curves(rows: Sequence[MetricRow]) -> list[dict[str, Any]]:
    """Curve panels of each stage, in the order in which stages and panels appear on the page.

    Returns:
        [{name, steps, stride, num_steps, panels: [{title, unit, group, metric, stacked, series}]}]; `steps` and the
        values of each series have the same length, at most 1500: every stride-th step.
    """
    stages: dict[str, list[MetricRow]] = defaultdict(list)
    for row in rows:
        stages[row.stage].append(row)
    result: list[dict[str, Any]] = []
    for name, stage_rows in stages.items():
        stride = -(-len(stage_rows) // _MAX_POINTS)
        metrics = dict.fromkeys(metric for row in stage_rows for metric in row.values if metric not in _NOT_DRAWN)
        panels: dict[tuple[str, str], dict[str, Any]] = {}
        for metric in sorted(metrics, key=_order):
            _, title, unit, group = _panel_of(metric)
            panel: dict[str, Any] = {"title": title, "unit": unit, "group": group, "metric": metric, "series": []}
            panel["stacked"] = metric.startswith(_STACKED)
            panels.setdefault((group, title), panel)["series"].append(_series(metric, stage_rows, stride))
        steps = [row.step for row in stage_rows]
        drawn = {"name": name, "steps": steps[::stride], "stride": stride, "num_steps": len(steps)}
        result.append({**drawn, "panels": list(panels.values())})
    return result


def histograms(transcripts: Sequence[Transcript]) -> list[dict[str, Any]]:
    """Rewards of the first and the last fifth of each stage's steps, as shares over common bins.

    Returns:
        [{stage, low, high, early, late}] where early and late are {first, last, count, shares: [20]}; a stage with one
        step, or without rewards, has no histogram.
    """
    stages: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for transcript in transcripts:
        if transcript.reward is not None:
            stages[transcript.stage].append((transcript.step, transcript.reward))
    result: list[dict[str, Any]] = []
    for stage, pairs in stages.items():
        steps = sorted({step for step, _ in pairs})
        if len(steps) < 2:
            continue
        fifth = max(1, len(steps) // 5)
        low, high = min(reward for _, reward in pairs), max(reward for _, reward in pairs)
        high = high if high > low else low + 1.0
        parts: list[dict[str, Any]] = []
        for first, last in ((steps[0], steps[fifth - 1]), (steps[-fifth], steps[-1])):
            rewards = [reward for step, reward in pairs if first <= step <= last]
            shares = [0.0] * _NUM_BINS
            for reward in rewards:
                shares[min(_NUM_BINS - 1, int((reward - low) / (high - low) * _NUM_BINS))] += 1 / len(rewards)
            shares = [round(share, 6) for share in shares]
            parts.append({"first": first, "last": last, "count": len(rewards), "shares": shares})
        result.append({"stage": stage, "low": low, "high": high, "early": parts[0], "late": parts[1]})
    return result


def sample_evenly(transcripts: Sequence[Transcript], limit: int) -> list[Transcript]:
    """At most `limit` transcripts: as equal a number of each (stage, step) as there are, evenly spaced inside it.

    Steps with few transcripts keep all of theirs and leave their room to the others. Where there are more steps than
    room, evenly spaced steps have one each. No randomness: the same run gives the same report.
    """
    if len(transcripts) <= limit:
        return list(transcripts)
    steps: dict[tuple[str, int], list[Transcript]] = defaultdict(list)
    for transcript in transcripts:
        steps[transcript.stage, transcript.step].append(transcript)
    groups = list(steps.values())
    if len(groups) > limit:
        return [groups[i * len(groups) // limit][0] for i in range(limit)]
    quota = [0] * len(groups)
    room = limit
    for rank, index in enumerate(sorted(range(len(groups)), key=lambda i: len(groups[i]))):
        quota[index] = min(len(groups[index]), room // (len(groups) - rank))
        room -= quota[index]
    return [g[i * len(g) // q] for g, q in zip(groups, quota, strict=True) for i in range(q)]


def pack_transcripts(transcripts: Sequence[Transcript], total: int) -> dict[str, Any]:
    """Transcripts as rows of plain values; prompts, stages, stop reasons and criteria are stored once.

    Returns:
        {total, stages, stops, criteria, prompts, rows}; a row is [stage, step, prompt_index, sample, prompt,
        completion, stop, num_tokens, reward, advantage, [value of each criterion], {criterion: error}], where stage,
        prompt and stop are indices into their lists. A criterion that the row lacks is None, like one that failed.
    """
    stages: dict[str, int] = {}
    stops: dict[str, int] = {}
    prompts: dict[str, int] = {}
    criteria = list(dict.fromkeys(name for t in transcripts for name in (*t.criteria, *t.errors)))
    rows: list[list[Any]] = [
        [
            stages.setdefault(t.stage, len(stages)),
            t.step,
            t.prompt_index,
            t.sample,
            prompts.setdefault(t.prompt, len(prompts)),
            t.completion,
            stops.setdefault(t.stop_reason, len(stops)),
            t.num_tokens,
            t.reward,
            t.advantage,
            [t.criteria.get(name) for name in criteria],
            t.errors,
        ]
        for t in transcripts
    ]
    tables = {"stages": list(stages), "stops": list(stops), "criteria": criteria, "prompts": list(prompts)}
    return {"total": total, **tables, "rows": rows}
