"""How criteria count in the total: schedules, gates, normalisation, calls by prompt, and the cache."""

from __future__ import annotations

import statistics
from types import SimpleNamespace
from typing import Any

import pytest

from burnish.errors import ConfigError
from burnish.rewards import Criterion, Rubric, rubric_from_config
from burnish.rewards.identity import rubric_identity
from burnish.rewards.settled import SettledRule
from burnish.types import Group
from test_rewards_rubric import const, group, length


def totals(rubric: Rubric, *groups: Group, **options: Any) -> list[float | None]:
    return [score.total for row in rubric.score(groups, **options) for score in row]


def at(step: int, steps: int = 100) -> Any:
    return SimpleNamespace(global_step=step, max_steps=steps)


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 1.0), (20, 1.0), (30, 0.75), (40, 0.5), (60, 0.0), (100, 0.0), (150, 0.0)]
)
def test_a_schedule_is_linear_between_its_points_and_constant_outside(step: int, factor: float) -> None:
    rubric = Rubric([Criterion("length", length, 2.0, schedule=[(0.2, 1.0), (0.6, 0.0)]), Criterion("one", const(1))])
    assert totals(rubric, group("abc"), trainer_state=at(step)) == [pytest.approx(1 + 2.0 * factor * 3)]
    assert rubric.weights(at(step)) == [pytest.approx(2.0 * factor), 1.0]


def test_without_a_trainer_the_schedule_is_at_its_end() -> None:
    rubric = Rubric([Criterion("length", length, schedule=[(0, 1.0), (1, 0.5)])])
    assert totals(rubric, group("ab")) == [1.0]
    assert totals(rubric, group("ab"), trainer_state=at(0, steps=0)) == [1.0]


def test_a_closed_gate_counts_zero_and_leaves_the_value_in_the_log() -> None:
    rubric = Rubric([
        Criterion("right", const(1, 1, 1, None), 2.0, requires=["format"]),
        Criterion("format", const(1, 0, None, 0), 0.5),
    ])  # fmt: skip
    scores = rubric.score([group("a", "b", "c", "d")])[0]
    # A gate that does not apply is open; a value that does not apply stays none.
    assert [score.total for score in scores] == [2.5, 0.0, 2.0, 0.0]
    assert [score.criteria["right"] for score in scores] == [1.0, 1.0, 1.0, None]
    assert [score.terms["right"] for score in scores] == [1.0, 0.0, 1.0, None]


def test_a_gate_may_name_its_least_value_and_be_several() -> None:
    rubric = Rubric([
        Criterion("value", const(5, 5, 5, 5), requires={"a": 0.5, "b": -1}),
        Criterion("a", const(0.5, 0.4, 0.5, 0.6), 0),
        Criterion("b", const(0, 0, -2, -1), 0),
    ])  # fmt: skip
    assert totals(rubric, group(*"abcd")) == [5.0, 0.0, 0.0, 5.0]


def test_a_gate_that_fails_excludes_the_completion_even_without_a_weight() -> None:
    rubric = Rubric([
        Criterion("value", const(1, 1), requires=["gate"]),
        Criterion("gate", const(ValueError("broken"), 1), 0),
        Criterion("logged", const(1, 1), 0, requires=["gate"]),
    ])  # fmt: skip
    first, second = rubric.score([group("a", "b")])[0]
    assert first.total is None
    assert "broken" in first.errors["gate"]
    assert second.total == 1.0


def test_normalised_values_are_those_of_the_prompt() -> None:
    values = [1.0, 2.0, 6.0]
    rubric = Rubric([Criterion("v", const(*values, 7, 7, 3, None), normalize="group")])
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    expected = [pytest.approx((v - mean) / deviation) for v in values]
    groups = [group("a", "b", "c"), group("d", "e"), group("f", "g")]
    scores = [score for row in rubric.score(groups) for score in row]
    assert [score.total for score in scores[:5]] == [*expected, 0.0, 0.0]
    assert scores[5].total == 0.0
    assert scores[6].total is None, "no criterion applies"
    assert [score.criteria["v"] for score in scores[:3]] == values
    centred = Rubric([Criterion("v", const(*values), 2.0, normalize="center")])
    assert totals(centred, group("a", "b", "c")) == [-4.0, -2.0, 6.0]


def test_gates_come_before_normalisation() -> None:
    rubric = Rubric([
        Criterion("v", const(4, 4), normalize="center", requires=["gate"]), Criterion("gate", const(1, 0), 0)
    ])  # fmt: skip
    assert totals(rubric, group("a", "b")) == [2.0, -2.0]


def test_a_function_of_groups_is_called_once_for_each_prompt() -> None:
    calls: list[list[str]] = []

    def rank(completions: list[str], prompts: list[str], answer: list[str], **kwargs: Any) -> list[float]:
        calls.append(completions)
        assert len(set(prompts)) == len(set(answer)) == 1
        return [float(sorted(completions).index(text)) for text in completions]

    rubric = Rubric([Criterion("rank", rank, per_group=True)])
    groups = [group("b", "a", prompt="p", answer="1"), group(answer="2"), group("d", "c", "e", prompt="q", answer="3")]
    assert totals(rubric, *groups) == [1.0, 0.0, 1.0, 0.0, 2.0]
    assert calls == [["b", "a"], ["d", "c", "e"]]


def test_a_function_of_groups_that_fails_excludes_that_prompt_only() -> None:
    calls: list[int] = []

    def picky(completions: list[str], **kwargs: Any) -> list[float]:
        calls.append(len(completions))
        if "x" in completions:
            raise ValueError("x")
        return [1.0] * len(completions)

    rubric = Rubric([Criterion("picky", picky, per_group=True)])
    assert totals(rubric, group("a", "b"), group("x", "c")) == [1.0, 1.0, None, None]
    assert calls == [2, 2], "one call for each prompt, and none for single completions"


def test_a_cache_saves_calls_for_what_was_graded_before() -> None:
    calls: list[list[str]] = []

    def counted(completions: list[str], **kwargs: Any) -> list[Any]:
        calls.append(completions)
        return [ValueError("no") if text == "bad" else None if text == "none" else len(text) for text in completions]

    rubric = Rubric([Criterion("counted", counted, memoize=True), Criterion("one", const(*[1] * 5))])
    texts = ("a", "bb", "a", "bad", "none")
    first = totals(rubric, group(*texts, answer=1))
    assert first == [2.0, 3.0, 2.0, None, 1.0]
    assert sorted(calls.pop()) == ["a", "bad", "bb", "none"]
    assert totals(rubric, group(*texts, answer=1)) == first
    assert calls.pop() == ["bad"], "a failure is no value"
    totals(rubric, group(*texts, answer=2))
    assert len(calls.pop()) == 4, "another column, another value"
    totals(rubric, group(*texts, answer=2, prompt="q"))
    assert len(calls.pop()) == 4


def test_a_cache_of_everything_calls_nothing() -> None:
    calls: list[int] = []

    def counted(completions: list[str], **kwargs: Any) -> list[float]:
        calls.append(len(completions))
        return [1.0] * len(completions)

    rubric = Rubric([Criterion("counted", counted, memoize=True)])
    assert [totals(rubric, group("a", "b")) for _ in range(2)] == [[1.0, 1.0]] * 2
    assert calls == [2]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"schedule": [(0.5, 1), (0.5, 0)]}, "schedule"),
        ({"schedule": [(-0.1, 1)]}, "schedule"),
        ({"schedule": [(0, 1, 2)]}, "schedule"),
        ({"schedule": [(0, float("nan"))]}, "schedule"),
        ({"schedule": 3}, "schedule"),
        ({"requires": "format"}, "requires"),
        ({"requires": [3]}, "requires"),
        ({"requires": {"a": "b"}}, "requires"),
        ({"requires": 3}, "requires"),
        ({"requires": ["other"]}, "requires"),
        ({"requires": ["x"]}, "requires"),
        ({"normalize": "batch"}, "normalize"),
        ({"per_group": True, "memoize": True}, "memoize"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Rubric([Criterion("x", length, **options)])
    with pytest.raises(ConfigError, match=named):
        rubric_from_config([{"kind": "soft_overlong", "max_completion_length": 9, "cache": 2, "name": "x", **options}])


def test_run_files_take_them() -> None:
    rubric = rubric_from_config([
        {"kind": "exact", "name": "right", "requires": ["format"], "schedule": [[0, 0], [0.5, 1]]},
        {"kind": "format", "tags": ["answer"], "normalize": "center", "memoize": True},
    ])  # fmt: skip
    right, form = rubric.criteria
    assert (right.gates, right.weight_at(0.25), form.normalize, form.memoize) == ({"format": 1.0}, 0.5, "center", True)
    with pytest.raises(ConfigError, match=r"rubric\[0\].per_group"):
        rubric_from_config([{"kind": "exact", "per_group": 1}])


def test_identity_and_settled_rewards_know_them() -> None:
    def identity(**options: Any) -> str:
        return rubric_identity(Rubric([Criterion("a", length, **options), Criterion("g", length)]))

    assert len({identity(), identity(requires=["g"]), identity(normalize="group"), identity(schedule=[(0, 2)])}) == 4
    assert identity(memoize=True) == identity()

    def settled(text: str, **columns: Any) -> bool:
        return text == "done"

    def one(completions: list[str], **kwargs: Any) -> list[float]:
        return [1.0] * len(completions)

    one.is_settled = settled  # pyright: ignore[reportFunctionMemberAccess]
    SettledRule(Rubric([Criterion("one", one), Criterion("off", length, 3.0, schedule=[(0, 0)])]))
    with pytest.raises(ConfigError, match="'gate' has no is_settled"):
        SettledRule(Rubric([Criterion("one", one, requires=["gate"]), Criterion("gate", length, 0)]))
