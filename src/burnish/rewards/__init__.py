"""Rewards: named, weighted criteria and the verifiers that grade completions. Importing this loads no torch."""

from burnish.rewards.answers import extract_answer, parse_number
from burnish.rewards.pool import WorkerPool
from burnish.rewards.registry import CRITERIA, rubric_from_config
from burnish.rewards.rubric import Criterion, RewardFunction, Rubric
from burnish.rewards.verifiers import (
    AnswerVerifier,
    GoldFailure,
    check_gold,
    exact_answer,
    format_tags,
    gym_answer,
    math_answer,
    numeric_answer,
    soft_overlong,
)

__all__ = [
    "CRITERIA",
    "AnswerVerifier",
    "Criterion",
    "GoldFailure",
    "RewardFunction",
    "Rubric",
    "WorkerPool",
    "check_gold",
    "exact_answer",
    "extract_answer",
    "format_tags",
    "gym_answer",
    "math_answer",
    "numeric_answer",
    "parse_number",
    "rubric_from_config",
    "soft_overlong",
]
