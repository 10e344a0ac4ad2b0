"""Reward functions with the names and signatures of `trl.rewards`, built on the verifiers.

A completion is a string, or a list of messages of which the last one is graded. None means that the reward does not
apply to a completion, an exception that it could not be graded; all trainers accept both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias

from burnish.errors import ConfigError, RewardError
from burnish.rewards.answers import UNREADABLE_GOLD, boxed_answers, parse_number
from burnish.rewards.rubric import RewardFunction
from burnish.rewards.verifiers import AnswerVerifier, completion_text, math_answer, soft_overlong

__all__ = [
    "accuracy_reward",
    "get_cosine_scaled_reward",
    "get_repetition_penalty_reward",
    "get_soft_overlong_punishment",
    "reasoning_accuracy_reward",
    "think_format_reward",
]

Values: TypeAlias = list[float | Exception | None]
LogExtra: TypeAlias = Callable[[str, list[Any]], None]


def accuracy_reward(
    completions: Sequence[Any], solution: Sequence[Any], log_extra: LogExtra | None = None, **kwargs: Any
) -> Values:
    r"""Reward 1 if the content of `\boxed{...}` equals the solution mathematically, else 0.

    Several boxes with different contents form one answer, their set, so guessing many numbers does not pay. A solution
    that cannot be parsed yields None.

    Args:
        completions: texts or conversations.
        solution: the column of solutions, LaTeX or plain.
        log_extra: receives columns for a table of completions by name.
        kwargs: other columns; unused.

    Returns:
        One value for each completion; 0 where the verifier ran out of time.

    Raises:
        ConfigError: math-verify is not installed.
        RewardError: lists of different lengths.
    """
    values, answers = _graded([completion_text(completion) for completion in completions], solution)
    _log(log_extra, solution=solution, answer=answers)
    return values


def reasoning_accuracy_reward(
    completions: Sequence[Any],
    solution: Sequence[Any],
    reasoning_delimiters: Sequence[str] | None = None,
    log_extra: LogExtra | None = None,
    **kwargs: Any,
) -> Values:
    """Apply `accuracy_reward` to the text after the last delimiter; unfinished reasoning scores 0.

    Args:
        completions: texts or conversations.
        solution: the column of solutions, LaTeX or plain.
        reasoning_delimiters: texts that end the reasoning; `["</think>"]` if None.
        log_extra: receives columns for a table of completions by name.
        kwargs: other columns; unused.

    Returns:
        One value for each completion; 0 where the verifier ran out of time.

    Raises:
        ConfigError: no delimiter, or math-verify is not installed.
        RewardError: lists of different lengths.
    """
    delimiters = ["</think>"] if reasoning_delimiters is None else list(reasoning_delimiters)
    if not delimiters or isinstance(reasoning_delimiters, str) or not all(delimiters):
        raise ConfigError(
            f"reasoning_delimiters = {reasoning_delimiters!r}: use a list of strings, such as ['</think>']."
        )
    texts = [completion_text(completion) for completion in completions]
    ends = [max(text.rfind(mark) + len(mark) if mark in text else -1 for mark in delimiters) for text in texts]
    # Unfinished reasoning is graded as an empty answer, so that a solution that cannot be parsed still yields None.
    values, answers = _graded([text[end:] if end >= 0 else "" for text, end in zip(texts, ends, strict=True)], solution)
    _log(log_extra, solution=solution, answer=answers)
    return values


def think_format_reward(completions: Sequence[Any], **kwargs: Any) -> list[float]:
    """Reward 1 if a completion begins with `<think>`, contains it once, and closes it with `</think>`, else 0.

    Args:
        completions: texts or conversations.
        kwargs: other columns; unused.
    """
    texts = [completion_text(completion) for completion in completions]
    return [float(t.startswith("<think>") and t.count("<think>") == 1 and "</think>" in t) for t in texts]


def _breaks_think_format(text: str, **kwargs: Any) -> bool:
    """Tell that a text begins with something else than `<think>`, or repeats it: the reward stays 0."""
    return text.count("<think>") > 1 or not (text + "<think>"[len(text) :]).startswith("<think>")


think_format_reward.is_settled = _breaks_think_format  # pyright: ignore[reportFunctionMemberAccess]


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> RewardFunction:
    """Create DAPO's penalty of long completions, equation 13 (2503.14476); see `burnish.rewards.soft_overlong`.

    Args:
        max_completion_len: tokens at which the penalty reaches -1.
        soft_punish_cache: tokens before that over which it falls from 0; 0 for a step right after the maximum.

    Raises:
        ConfigError: an invalid length.
    """
    if soft_punish_cache == 0:
        # A ramp of one token that starts at the maximum.
        soft = soft_overlong(max_completion_length=max_completion_len + 1, cache=1)
    else:
        soft = soft_overlong(max_completion_length=max_completion_len, cache=soft_punish_cache)

    def soft_overlong_punishment_reward(completion_ids: Sequence[Sequence[int]], **kwargs: Any) -> Any:
        return soft(completion_ids=completion_ids)

    return soft_overlong_punishment_reward


def get_repetition_penalty_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> RewardFunction:
    """Create a penalty of repeated token n-grams: max_penalty * (1 - distinct / all); appendix C.2 of 2502.03373.

    Args:
        ngram_size: n, at least 1; a completion of fewer tokens scores 0.
        max_penalty: at most 0.

    Raises:
        ConfigError: an invalid size or penalty.
    """
    if ngram_size < 1:
        raise ConfigError(f"ngram_size = {ngram_size!r}: use at least 1 token.")
    if not -math.inf < max_penalty <= 0:
        raise ConfigError(f"max_penalty = {max_penalty!r}: use a number of at most 0, such as -1.")

    def repetition_penalty_reward(completion_ids: Sequence[Sequence[int]], **kwargs: Any) -> list[float]:
        all_ngrams = [
            [tuple(ids[i : i + ngram_size]) for i in range(len(ids) - ngram_size + 1)] for ids in completion_ids
        ]
        return [max_penalty * (1 - len(set(found)) / len(found)) if found else 0.0 for found in all_ngrams]

    return repetition_penalty_reward


def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> RewardFunction:
    """Scale `accuracy_reward` by length L: low + (high - low) (1 + cos(pi L / max_len)) / 2; C.1 of 2502.03373.

    Short right answers earn most, and short wrong ones lose most. Beyond `max_len` the value is constant.

    Args:
        max_len: tokens at which the cosine ends.
        min_value_wrong: reward of a wrong completion of length 0.
        max_value_wrong: reward of a wrong completion of length `max_len`.
        min_value_correct: reward of a right completion of length `max_len`.
        max_value_correct: reward of a right completion of length 0.

    Raises:
        ConfigError: an invalid length.
    """
    if max_len < 1:
        raise ConfigError(f"max_len = {max_len!r}: use at least 1 token.")
    ends = {1.0: (min_value_correct, max_value_correct), 0.0: (max_value_wrong, min_value_wrong)}

    def cosine_scaled_reward(
        completions: Sequence[Any], solution: Sequence[Any], completion_ids: Sequence[Sequence[int]], **kwargs: Any
    ) -> Values:
        values: Values = []
        for right, ids in zip(accuracy_reward(completions, solution), completion_ids, strict=True):
            if isinstance(right, float):
                low, high = ends[right]
                right = low + 0.5 * (high - low) * (1 + math.cos(math.pi * min(len(ids), max_len) / max_len))
            values.append(right)
        return values

    return cosine_scaled_reward


@cache
def _verifier() -> AnswerVerifier:
    return math_answer(column="solution", sources=("text",))


def _graded(texts: Sequence[str], solution: Sequence[Any]) -> tuple[Values, list[str]]:
    """Grade the boxed answer of each text; returns the values and the answers."""
    if len(texts) != len(solution):
        raise RewardError(f"solution has {len(solution)} entries for {len(texts)} completions: give one each.")
    # Boxes with one content are that answer; where they differ, math-verify reads all of them as a set.
    contents = [list(dict.fromkeys(boxed_answers(text))) for text in texts]
    answers = [found[0] if len(found) == 1 else " ".join(rf"\boxed{{{one}}}" for one in found) for found in contents]
    golds = [None if isinstance(gold, str) and not gold.strip() else gold for gold in solution]
    # An empty box makes the verifier parse the gold answer even where the completion gives no answer.
    shown = [
        answer or ("" if parse_number(str(gold)) is not None else r"\boxed{}")
        for answer, gold in zip(answers, golds, strict=True)
    ]
    values: Values = []
    for value in _verifier()([], shown, solution=golds):
        unreadable = isinstance(value, RewardError) and str(value).endswith(UNREADABLE_GOLD)
        values.append(None if unreadable else value)
    return values, answers


def _log(log_extra: LogExtra | None, **columns: Sequence[Any]) -> None:
    if log_extra is not None:
        for name, values in columns.items():
            log_extra(name, list(values))
