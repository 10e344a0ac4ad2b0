from __future__ import annotations

import math
from typing import Any

import pytest

from burnish.errors import ConfigError, RewardError
from burnish.rewards import (
    Rubric,
    accuracy_reward,
    get_cosine_scaled_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)
from burnish.rewards.answers import boxed_answers
from burnish.types import Completion, Group, StopReason


def said(*texts: str) -> list[Any]:
    return [[{"role": "assistant", "content": text}] for text in texts]


ACCURACY = [
    (r"My answer is \boxed{\frac{1}{3}}", r"\frac{1}{3}", 1.0),
    (r"My answer is \boxed{\frac{1}{2}}", r"\frac{1}{3}", 0.0),
    (r"\boxed{\dfrac{2}{6}}.", r"$\frac{1}{3}$", 1.0),
    ("the answer is 1/3", "1/3", 0.0),
    ("$4$", "4", 0.0),
    ("", "4", 0.0),
    (r"\boxed{}", "4", 0.0),
    (r"\boxed{4", "4", 0.0),
    (r"\boxed{1234}", "1,234", 1.0),
    (r"\boxed{3}", "$x=3$", 1.0),
    (r"\boxed{\boxed{4}}", "4", 1.0),
    # Boxes that differ are one set.
    (r"\boxed{2}, wait \boxed{4}", "4", 0.0),
    (r"\boxed{1} and \boxed{2}", r"$\{1,2\}$", 1.0),
    (r"\boxed{4}, so \boxed{4}", "4", 1.0),
    # A blank solution is no solution, whatever the completion says.
    (r"\boxed{4}", "", None),
    ("nothing", "  ", None),
]
"""Completion, solution, value; the slow test asks TRL for the same."""


def test_accuracy_reads_boxes() -> None:
    completions, solutions, wanted = zip(*ACCURACY, strict=True)
    columns: dict[str, list[Any]] = {}
    assert accuracy_reward(said(*completions), list(solutions), log_extra=columns.__setitem__) == list(wanted)
    assert accuracy_reward(list(completions), list(solutions), prompts=None) == list(wanted)
    assert columns["solution"] == list(solutions)
    assert columns["answer"][:4] == [r"\frac{1}{3}", r"\frac{1}{2}", r"\dfrac{2}{6}", ""]


def test_a_solution_that_is_no_mathematics_does_not_apply() -> None:
    for reward in (accuracy_reward, reasoning_accuracy_reward):
        assert reward(said(r"</think>\boxed{4}", "</think>", "no end"), ["$$", "$$", "$$"]) == [None] * 3


def test_accuracy_needs_one_solution_for_each_completion() -> None:
    with pytest.raises(RewardError, match="solution has 1 entries for 2 completions"):
        accuracy_reward(said("a", "b"), ["1"])


REASONING = [
    (r"<think> a </think> \boxed{4}", 1.0),
    (r"<think> \boxed{4}", 0.0),
    (r"<think>\boxed{3}</think>\boxed{4}</think>\boxed{5}", 0.0),
    (r"<think>\boxed{5}</think>\boxed{4}", 1.0),
    ("a</think>4", 0.0),
    (r"</think>\boxed{4}", 1.0),
]


def test_reasoning_is_not_the_answer() -> None:
    completions, wanted = zip(*REASONING, strict=True)
    columns: dict[str, list[Any]] = {}
    solutions = ["4"] * len(wanted)
    assert reasoning_accuracy_reward(said(*completions), solutions, log_extra=columns.__setitem__) == list(wanted)
    assert columns["answer"] == ["4", "", "5", "4", "", "4"]
    ends = ["###", "</think>"]
    assert reasoning_accuracy_reward(said(r"\boxed{3} ### \boxed{4}"), ["4"], reasoning_delimiters=ends) == [1.0]
    for bad in ([], "</think>", [""]):
        with pytest.raises(ConfigError, match=r"reasoning_delimiters = .* use a list of strings"):
            reasoning_accuracy_reward(said("x"), ["4"], reasoning_delimiters=bad)


THINK = [
    ("<think>\na\n</think>\nb", 1.0),
    ("<think></think>", 1.0),
    ("<think>a</think>b</think>c", 1.0),
    (" <think>a</think>b", 0.0),
    ("\n<think>a</think>b", 0.0),
    ("<think>a<think>b</think>c", 0.0),
    ("<think>a</think>b<think>", 0.0),
    ("a<think>b</think>", 0.0),
    ("<think>a", 0.0),
    ("", 0.0),
]


def test_thinking_is_closed_before_the_answer() -> None:
    completions, wanted = zip(*THINK, strict=True)
    assert think_format_reward(said(*completions), solution=None) == list(wanted)


# (max_completion_len, soft_punish_cache), lengths, values by equation 13 of DAPO.
OVERLONG = [
    ((100, 20), (0, 80, 81, 90, 99, 100, 101), (0, 0, -0.05, -0.5, -0.95, -1, -1)),
    ((10, 0), (0, 10, 11, 99), (0, 0, -1, -1)),
    ((10, 10), (0, 1, 9, 10, 11), (0, -0.1, -0.9, -1, -1)),
]


@pytest.mark.parametrize(("arguments", "lengths", "wanted"), OVERLONG)
def test_long_completions_lose(arguments: Any, lengths: Any, wanted: Any) -> None:
    reward: Any = get_soft_overlong_punishment(*arguments)
    assert reward(completion_ids=[[1] * n for n in lengths]) == pytest.approx(wanted, abs=1e-12)
    assert reward.__name__ == "soft_overlong_punishment_reward"


def test_repeated_tokens_lose() -> None:
    reward: Any = get_repetition_penalty_reward(ngram_size=2)
    assert reward(completion_ids=[[1, 2, 3, 4], [5] * 5, [1], []]) == [0.0, -0.75, 0.0, 0.0]
    assert get_repetition_penalty_reward(1, -2.0)(completion_ids=[[7, 7]]) == [-1.0]  # type: ignore[call-arg]


LENGTHS = (0, 25, 50, 100, 150)


def test_right_and_wrong_count_by_length() -> None:
    reward: Any = get_cosine_scaled_reward(max_len=100)
    ids = [[1] * n for n in LENGTHS]
    quarter = 0.5 * (1 + math.cos(math.pi / 4))
    right = reward(said(*[r"\boxed{4}"] * 5), ["4"] * 5, completion_ids=ids)
    assert right == pytest.approx([1.0, 0.5 + 0.5 * quarter, 0.75, 0.5, 0.5])
    wrong = reward(said(*["no"] * 5), ["4"] * 5, completion_ids=ids)
    assert wrong == pytest.approx([-1.0, -0.5 - 0.5 * quarter, -0.75, -0.5, -0.5])
    assert reward(said("no"), [""], completion_ids=[[1]]) == [None]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: get_soft_overlong_punishment(10, 12), "cache = 12"),
        (lambda: get_repetition_penalty_reward(0), "ngram_size = 0"),
        (lambda: get_repetition_penalty_reward(3, 1.0), "max_penalty = 1.0"),
        (lambda: get_cosine_scaled_reward(0), "max_len = 0"),
    ],
)
def test_bad_options_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_rubric_takes_them() -> None:
    functions = [accuracy_reward, think_format_reward, get_soft_overlong_punishment(4, 2)]
    texts = {"<think>a</think>\\boxed{4}": [1] * 3, "\\boxed{5}": [1]}
    completions = [Completion(token_ids=ids, text=text, stop_reason=StopReason.EOS) for text, ids in texts.items()]
    row = {"prompt": "2+2", "solution": "4"}
    group = Group(index=0, prompt_ids=[1], completions=completions, row=row)
    scores = Rubric.from_functions(functions).score([group])[0]
    assert [score.total for score in scores] == [1.5, 0.0]


def test_boxes_are_found_in_one_pass() -> None:
    assert boxed_answers(r"\boxed{1} {\boxed {a{b}}} \boxed{ } \boxed{\boxed{2}3} \boxed{x") == ["1", "a{b}", "2"]
    assert boxed_answers("\\boxed{" * 50_000) == []
