"""Whether the rewards of a rollout, over all ranks, can teach anything, and what the rubric says where they cannot."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from burnish.rewards import Rubric, count_answers
from burnish.rollout.prompts import Shard
from burnish.training.liveness import Outcome, Verdict, judge_rewards
from burnish.types import Completion

__all__ = ["judge_rollout"]

_logger = logging.getLogger(__name__)


def judge_rollout(
    shards: Sequence[Shard],
    *,
    rubric: Rubric,
    outcome: Callable[[Completion], Outcome],
    gathered: Callable[[Sequence[Any]], list[Any]],
    compared: str,
    max_completion_length: int,
    is_first: bool,
) -> Verdict:
    """Judge a rollout; after the first one, also name criteria that read no answer from any completion.

    Args:
        shards: this rank's part of the batch.
        rubric: scored them.
        outcome: what became of a completion.
        gathered: the same list of all ranks.
        compared: with what a completion is compared; see `judge_rewards`.
        max_completion_length: for the message.
        is_first: whether the run has had no rollout before.
    """
    groups: dict[int, list[Outcome]] = defaultdict(list)
    for place, outcomes in gathered([(s.position, [outcome(c) for c in s.group.completions]) for s in shards]):
        groups[place] += outcomes

    def diagnose() -> str | None:
        texts = [completion.text for shard in shards for completion in shard.group.completions]
        return " ".join(message for counts in count_answers(rubric, texts) if (message := counts.message())) or None

    verdict = judge_rewards(
        list(groups.values()), compared=compared, max_completion_length=max_completion_length, diagnose=diagnose
    )
    if is_first and verdict.kind == "alive" and (message := diagnose()):
        _logger.warning("the first completions: %s", message)
    return verdict
