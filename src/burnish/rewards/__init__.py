"""Rewards: weighted criteria and the verifiers that grade completions. Importing this does not load torch.

`RewardModel` needs torch, so it lives in `burnish.model.reward_model` and loads on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from burnish.rewards.answers import extract_answer, parse_number
from burnish.rewards.catalogue import (
    accuracy_reward,
    get_cosine_scaled_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)
from burnish.rewards.diagnosis import AnswerCounts, count_answers
from burnish.rewards.formats import format_tags
from burnish.rewards.pool import WorkerPool
from burnish.rewards.programs import code_answer, sql_answer
from burnish.rewards.registry import CRITERIA, rubric_from_config
from burnish.rewards.rubric import Criterion, RewardFunction, Rubric
from burnish.rewards.sandbox.runner import Sandbox
from burnish.rewards.sandbox.zygotes import Limits, Run, SandboxError
from burnish.rewards.verifiers import (
    AnswerVerifier,
    GoldFailure,
    check_gold,
    exact_answer,
    gym_answer,
    math_answer,
    numeric_answer,
    soft_overlong,
)

if TYPE_CHECKING:
    from burnish.model.reward_model import RewardModel

__all__ = [
    "CRITERIA",
    "AnswerCounts",
    "AnswerVerifier",
    "Criterion",
    "GoldFailure",
    "Limits",
    "RewardFunction",
    "RewardModel",
    "Rubric",
    "Run",
    "Sandbox",
    "SandboxError",
    "WorkerPool",
    "accuracy_reward",
    "check_gold",
    "code_answer",
    "count_answers",
    "exact_answer",
    "extract_answer",
    "format_tags",
    "get_cosine_scaled_reward",
    "get_repetition_penalty_reward",
    "get_soft_overlong_punishment",
    "gym_answer",
    "math_answer",
    "numeric_answer",
    "parse_number",
    "reasoning_accuracy_reward",
    "rubric_from_config",
    "soft_overlong",
    "sql_answer",
    "think_format_reward",
]


def __getattr__(name: str) -> Any:
    if name != "RewardModel":
        raise AttributeError(f"module 'burnish.rewards' has no attribute {name!r}")
    return import_module("burnish.model.reward_model").RewardModel
