"""Find problems of a run in its records, as sentences for the top of the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from burnish.report.records import MetricRow, Transcript

__all__ = ["findings"]

_MANY = 0.5
"""Fraction of truncated completions that is reported as a problem of the run."""


def findings(metrics: Sequence[MetricRow], transcripts: Sequence[Transcript]) -> list[str]:
    """Report rewards without a learning signal, failed rewards, and mostly truncated completions."""
    found: list[str] = []
    for stage in dict.fromkeys(row.stage for row in [*metrics, *transcripts]):
        found += _dead_rewards(stage, [row for row in metrics if row.stage == stage])
        found += _faults(stage, [row for row in transcripts if row.stage == stage])
    return found


def _dead_rewards(stage: str, rows: Sequence[MetricRow]) -> Iterator[str]:
    flat = [value for row in rows if (value := row.values.get("frac_reward_zero_std")) is not None]
    rewards = [value for row in rows if (value := row.values.get("reward")) is not None]
    if flat and min(flat) == 1 and rewards:
        level = f"all {rewards[0]:g}" if min(rewards) == max(rewards) else f"{min(rewards):g} to {max(rewards):g}"
        yield (
            f"{stage}: no prompt's rewards differed in any of {len(flat)} logged steps (mean reward: {level}), so they "
            "gave no learning signal. Read the transcripts; check the rubric's sources and how hard the prompts are."
        )
    gradients = [value for row in rows if (value := row.values.get("grad_norm")) is not None]
    if len(gradients) > 1 and max(gradients[-max(2, len(gradients) // 2) :]) == 0:
        yield f"{stage}: the gradient was zero in the later half of its logged steps; nothing was learned there."


def _faults(stage: str, rows: Sequence[Transcript]) -> Iterator[str]:
    failed = [row for row in rows if row.errors]
    if failed:
        (name, message), count = Counter(next(iter(row.errors.items())) for row in failed).most_common(1)[0]
        yield (
            f"{stage}: a reward failed on {len(failed):,} of {len(rows):,} completions, which are not in the loss; "
            f"most often {name!r} ({count:,} times): {message}"
        )
    cut = sum(row.stop_reason == "length" for row in rows)
    if rows and cut >= _MANY * len(rows):
        yield (
            f"{stage}: {cut:,} of {len(rows):,} completions were cut at the token limit; raise max_completion_length, "
            "or check that the model writes its end-of-sequence token."
        )
