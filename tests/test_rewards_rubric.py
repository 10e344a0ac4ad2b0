"""Rubric: totals, failures as data, TRL-style functions, async functions."""

from __future__ import annotations

import asyncio
import functools
import math
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from burnish.errors import ConfigError, DataError, RewardError
from burnish.rewards import Criterion, Rubric
from burnish.types import Completion, Group


def group(*texts: str, index: int = 0, **row: Any) -> Group:
    return Group([1], [Completion([7] * len(t), text=t) for t in texts], {"prompt": "p", **row}, index)


def length(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(c)) for c in completions]


def const(*values: Any) -> Any:
    return lambda **kwargs: list(values)


def test_total_is_the_weighted_sum_and_is_written_in_place() -> None:
    rubric = Rubric([Criterion("length", length, 0.5), Criterion("two", const(2, True, np.float32(0)), -1.0)])
    groups = [group("a", "bb"), group("cccc")]
    scores = rubric.score(groups)
    assert [[s.total for s in row] for row in scores] == [[-1.5, 0.0], [2.0]]
    assert scores[0][1].criteria == {"length": 2.0, "two": 1.0}
    assert groups[1].completions[0].score is scores[1][0]


def test_functions_receive_what_trl_gives() -> None:
    seen: dict[str, Any] = {}

    def spy(
        prompts: Any, completions: Any, completion_ids: Any, answer: Any, trainer_state: Any, **kw: Any
    ) -> list[int]:
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, answer=answer, state=trainer_state)
        seen.update(kw)
        return [0] * len(prompts)

    chat = [{"role": "user", "content": "q"}]
    groups = [group("a", "b", answer="1", completion="shown"), group("c", prompt=chat, answer="2", extra=3)]
    Rubric([Criterion("spy", spy)]).score(groups, trainer_state="s", note=print)
    assert callable(seen.pop("log_extra"))
    assert callable(seen.pop("log_metric"))
    assert seen == {
        "prompts": ["p", "p", chat],
        "completions": ["a", "b", [{"role": "assistant", "content": "c"}]],
        "ids": [[7], [7], [7]],
        "answer": ["1", "1", "2"],
        "extra": [None, None, 3],
        "completion": ["shown", "shown", None],
        "state": "s",
        "note": print,
    }


def test_a_function_without_kwargs_gets_what_it_names_and_cannot_disturb_the_next() -> None:
    def greedy(completions: list[str]) -> list[float]:
        values = [1.0] * len(completions)
        completions.clear()
        return values

    [[score]] = Rubric.from_functions([greedy, length]).score([group("abc")])
    assert score.criteria == {"greedy": 1.0, "length": 3.0}


def test_none_abstains_and_only_all_none_voids() -> None:
    rubric = Rubric([Criterion("a", const(None, None)), Criterion("b", const(2.0, None))])
    [[one, none]] = rubric.score([group("x", "y", index=4)])
    assert (one.total, one.errors) == (2.0, {})
    assert none.total is None
    assert "prompt 4, completion 1" in none.errors["total"]


@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, "high", [1.0], 1j, np.float64("nan"), np.array([1.0, 2.0]), np.array([])]
)
def test_a_bad_value_voids_its_completion_only(bad: Any) -> None:
    rubric = Rubric([Criterion("good", const(1, 1)), Criterion("bad", lambda **kw: [1.0, bad])])
    [[fine, voided]] = rubric.score([group("x", "y", index=3)])
    assert fine.total == 2.0
    assert voided.total is None
    assert voided.criteria == {"good": 1.0, "bad": None}
    assert "criterion 'bad' failed on prompt 3, completion 1" in voided.errors["bad"]


def test_an_exception_is_pinned_on_the_completion_that_caused_it() -> None:
    def inverse(completions: list[str], **kwargs: Any) -> list[float]:
        return [1 / len(c) for c in completions]

    [scores, _] = Rubric([Criterion("inverse", inverse)]).score([group("a", "", "bb"), group("c", index=1)])
    assert [s.total for s in scores] == [1.0, None, 0.5]
    assert scores[1].errors["inverse"].endswith("prompt 0, completion 1: ZeroDivisionError: division by zero")


def test_a_function_may_return_an_exception_for_one_completion() -> None:
    [[a, b]] = Rubric([Criterion("c", const(KeyError("k"), 1.0))]).score([group("x", "y")])
    assert (a.total, b.total) == (None, 1.0)
    assert "KeyError: 'k'" in a.errors["c"]


def test_no_isolation_for_functions_that_compare() -> None:
    calls: list[int] = []

    def compare(completions: list[str], **kwargs: Any) -> list[float]:
        calls.append(len(completions))
        raise RuntimeError("judge is down")

    with pytest.raises(RewardError, match=r"judge is down.*all 2 completions"):
        Rubric([Criterion("c", compare, isolate=False)]).score([group("x", "y")])
    assert calls == [2]


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ([1.0], "1 values for 2 completions"),
        ([1.0] * 3, "3 values"),
        (1.0, "returned float"),
        (None, "NoneType"),
        ("ab", "str"),
    ],
)
def test_a_wrong_shape_is_never_broadcast(result: Any, words: str) -> None:
    with pytest.raises(RewardError, match=words) as info:
        Rubric([Criterion("shape", lambda **kw: result)]).score([group("x", "y", index=9)])
    assert "criterion 'shape' failed on prompt 9, completion 0" in str(info.value)


def test_a_single_completion_that_fails_is_data() -> None:
    [[score]] = Rubric([Criterion("c", const(math.nan))]).score([group("x")])
    assert score.total is None


def test_the_error_shows_where_the_function_raised() -> None:
    def broken(**kwargs: Any) -> list[float]:
        raise KeyError("answr")

    with pytest.raises(RewardError, match=r"answr[\s\S]*in broken"):
        Rubric([Criterion("c", broken)]).score([group("x", "y")])


def test_a_failing_criterion_of_weight_zero_voids_nothing() -> None:
    rubric = Rubric([Criterion("good", const(1, 1)), Criterion("watch", const(math.nan, 5), 0.0)])
    [[a, b]] = rubric.score([group("x", "y")])
    assert (a.total, b.total) == (1.0, 1.0)
    assert set(a.errors) == {"watch"}
    assert not b.errors


def test_arrays_and_tensors_are_lists() -> None:
    torch = pytest.importorskip("torch")
    values = [np.array([1, 2]), torch.tensor([1.0, 2.0]), [torch.tensor(1.0), torch.tensor(2.0)], (1, 2)]
    for value in values:
        [scores] = Rubric([Criterion("c", lambda value=value, **kw: value)]).score([group("x", "y")])
        assert [s.total for s in scores] == [1.0, 2.0]


def test_async_functions_run_together_and_inside_a_running_loop() -> None:
    gate = asyncio.Event()

    async def first(completions: list[str], **kwargs: Any) -> list[float]:
        await gate.wait()  # only ends if the other one runs at the same time
        return length(completions)

    async def second(completions: list[str], **kwargs: Any) -> list[float]:
        gate.set()
        if "" in completions:
            raise ValueError("empty")
        return length(completions)

    async def caller() -> Any:
        return Rubric.from_functions([first, second, length]).score([group("a", "")])

    [[a, b]] = asyncio.run(caller())
    assert a.total == 3.0
    assert b.criteria == {"first": 0.0, "second": None, "length": 0.0}
    assert "ValueError: empty" in b.errors["second"]


def test_from_functions_names_and_weights() -> None:
    class Judge:
        def __call__(self, **kwargs: Any) -> list[float]:
            return [1.0]

    rubric = Rubric.from_functions([length, functools.partial(length), Judge()], [1, 2, 3])
    assert rubric.names == ("length", "length_2", "Judge")
    assert [c.weight for c in rubric.criteria] == [1, 2, 3]
    assert Rubric.from_functions(length).names == ("length",)
    with pytest.raises(ConfigError, match="reward_weights has 1 entries for 2"):
        Rubric.from_functions([length, length], [1.0])


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Rubric([]), "at least one"),
        (lambda: Rubric([Criterion("a", length), Criterion("a", length)]), "share the name 'a'"),
        (lambda: Criterion("total", length), "'total'"),
        (lambda: Criterion("a", length, math.nan), "weight = nan"),
        (lambda: Criterion("a", "not a function"), "pass a callable"),  # type: ignore[arg-type]
    ],
)
def test_bad_rubrics(build: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build()


def test_modules_are_no_functions() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(ConfigError, match="Linear"):
        Criterion("rm", torch.nn.Linear(1, 1))


def test_rows_need_a_prompt() -> None:
    with pytest.raises(RewardError, match="prompt 2 has no column 'prompt'"):
        Rubric([Criterion("c", length)]).score([Group([1], [Completion([1])], {"q": 1}, index=2)])


def test_nothing_to_score() -> None:
    assert Rubric([Criterion("c", length)]).score([]) == []


def test_rewards_import_without_torch_or_the_extras() -> None:
    code = (
        "import sys, burnish.rewards; "
        "bad = {'torch', 'transformers', 'math_verify', 'sympy', 'reasoning_gym'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids", "trainer_state"])
def test_a_column_that_an_argument_would_hide_is_refused(name: str) -> None:
    rubric = Rubric.from_functions(length)
    with pytest.raises(DataError, match=rf"row 3 has a column '{name}'.*columns = {{ {name} = .given_{name}. }}"):
        rubric.score([group("a", index=3, **{name: "x"})])
    assert rubric.score([group("a", **{name: None})])[0][0].total == 1.0


def test_a_demonstration_reaches_the_functions_that_ask_for_it() -> None:
    def equals(completions: list[str], completion: list[str]) -> list[float]:
        return [float(a == b) for a, b in zip(completions, completion, strict=True)]

    assert [s.total for s in Rubric.from_functions(equals).score([group("a", "b", completion="b")])[0]] == [0.0, 1.0]


@pytest.mark.parametrize(("value", "weights"), [(1e308, (1.0, 1.0)), (1e308, (10.0, -10.0)), (1e300, (1e300, 1.0))])
def test_a_total_that_overflows_fails_its_completion(value: float, weights: tuple[float, float]) -> None:
    def huge(completions: list[str]) -> list[float]:
        return [value if text == "huge" else 1.0 for text in completions]

    def also(completions: list[str]) -> list[float]:
        return huge(completions)

    group = Group([1], [Completion([1], text="huge"), Completion([1], text="one")], {"prompt": "p"})
    [[bad, good]] = Rubric.from_functions([huge, also], weights).score([group])
    assert bad.total is None
    assert "overflows" in bad.errors["total"]
    assert good.total == weights[0] + weights[1]


def test_async_rewards_and_rewards_with_alarms_work_inside_a_running_loop() -> None:
    async def later(completions: list[str]) -> list[float]:
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    def ring(*_: Any) -> None:
        raise TimeoutError

    def alarmed(completions: list[str]) -> list[float]:
        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            time.sleep(30)
        except TimeoutError:
            return [0.5] * len(completions)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        return [0.0] * len(completions)

    async def notebook() -> Any:
        group = Group([1], [Completion([1], text="x")], {"prompt": "p"})
        return Rubric.from_functions([later, alarmed]).score([group])

    [[score]] = asyncio.run(notebook())
    assert score.total == 1.5


@pytest.mark.parametrize("is_async", [False, True])
def test_functions_log_columns_and_metrics(is_async: bool) -> None:
    def plain(completions: list[str], log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
        log_extra("first", [text[:1] for text in completions])
        log_extra("size", np.array([len(text) for text in completions]))
        log_metric("mean_size", np.float32(sum(map(len, completions)) / len(completions)))
        return length(completions)

    async def waiting(**arguments: Any) -> list[float]:
        await asyncio.sleep(0)
        return plain(**arguments)

    logged: list[Any] = []
    rubric = Rubric([Criterion("c", waiting if is_async else plain, overlap=False)])
    groups = [group("ab", "c"), group("defg", index=1)]
    rubric.score(groups, log_metric=lambda *metric: logged.append(metric))
    extras = [completion.score.extra for g in groups for completion in g.completions if completion.score]
    assert extras == [{"first": "a", "size": 2}, {"first": "c", "size": 1}, {"first": "d", "size": 4}]
    assert logged == [("mean_size", pytest.approx(7 / 3))]
    rubric.score(groups)  # nobody takes the metrics: they are dropped


def test_what_a_failed_call_logs_is_logged_by_the_calls_that_follow_alone() -> None:
    def judged(completions: list[str], log_extra: Any, log_metric: Any) -> list[float]:
        log_extra("text", completions)
        log_metric("size", len(completions))
        if "bad" in completions:
            raise ValueError("no")
        return length(completions)

    logged: list[Any] = []
    [scores] = Rubric.from_functions(judged).score(
        [group("a", "bad", "c")], log_metric=lambda *metric: logged.append(metric)
    )
    assert [score.extra for score in scores] == [{"text": "a"}, {}, {"text": "c"}]
    assert logged == [("size", 1.0), ("size", 1.0)]


def test_columns_of_two_criteria_with_one_name_stay_apart() -> None:
    def first(completions: list[str], log_extra: Any) -> list[float]:
        log_extra("note", ["once"])
        log_extra("note", ["first"])
        return [1.0]

    def second(completions: list[str], log_extra: Any) -> list[float]:
        log_extra("note", ["second"])
        return [1.0]

    [[score]] = Rubric.from_functions([first, second]).score([group("a")])
    assert score.extra == {"note": "first", "second/note": "second"}


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (lambda log_extra, **_: log_extra("x", [1]), r"log_extra\('x'\): 1 values for 2 completions"),
        (lambda log_extra, **_: log_extra("x", "ab"), r"log_extra\('x', 'ab'\): pass a name and a list"),
        (lambda log_extra, **_: log_extra(1, [1, 2]), r"log_extra\(1, \[1, 2\]\): pass a name"),
        (lambda log_metric, **_: log_metric("x", "1"), r"log_metric\('x', '1'\): pass a name and a number"),
        (lambda log_metric, **_: log_metric(None, 1), r"log_metric\(None, 1\): pass a name and a number"),
    ],
)
def test_what_cannot_be_logged_is_named(log: Any, words: str) -> None:
    def judged(completions: list[str], **given: Any) -> list[float]:
        log(**given)
        return length(completions)

    with pytest.raises(RewardError, match=words):
        Rubric([Criterion("c", judged, isolate=False)]).score([group("a", "b")])


@pytest.mark.parametrize("name", ["log_extra", "log_metric"])
def test_columns_named_as_the_loggers_are_refused(name: str) -> None:
    with pytest.raises(DataError, match=f"column '{name}', which is reserved for an argument of reward functions"):
        Rubric.from_functions(length).score([group("a", **{name: "x"})])
