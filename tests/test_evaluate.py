"""pass@k against enumeration, intervals against simulation, and evaluations end to end with a scripted engine."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from burnish.errors import ConfigError, RewardError
from burnish.evaluation.evaluate import (
    Evaluation,
    _key,
    compare,
    evaluate,
    mean_interval,
    mean_nll,
    paired_difference,
    pass_at_k,
)
from burnish.model.scoring import prepare_for_scoring
from burnish.rewards import Criterion, Rubric, exact_answer
from burnish.rollout.engine import Request, SamplingParams
from burnish.runs.evaluations import Interval
from burnish.types import Completion, Group, StopReason

PARAMS = SamplingParams(max_new_tokens=4, stop=("x",))


@pytest.mark.parametrize("num_samples", [1, 2, 5, 7])
def test_pass_at_k_equals_enumeration(num_samples: int) -> None:
    for correct in range(num_samples + 1):
        outcomes = [True] * correct + [False] * (num_samples - correct)
        for k in range(1, num_samples + 1):
            drawn = [any(subset) for subset in itertools.combinations(outcomes, k)]
            # A few roundings of a log and an exp.
            assert pass_at_k(num_samples, correct, k) == pytest.approx(sum(drawn) / len(drawn), abs=1e-15)


def test_pass_at_k_is_stable_where_binomials_are_huge() -> None:
    exact = 1 - math.comb(99_999, 500) / math.comb(100_000, 500)
    assert pass_at_k(100_000, 1, 500) == pytest.approx(500 / 100_000, rel=1e-13)
    assert exact == pytest.approx(500 / 100_000, rel=1e-9)
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3, rel=1e-15)
    assert (pass_at_k(10, 0, 5), pass_at_k(10, 6, 5)) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "words"), [((5, 2, 6), "k = 6"), ((5, 2, 0), "k = 0"), ((5, 6, 1), "num_correct = 6")]
)
def test_pass_at_k_checks(arguments: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        pass_at_k(*arguments)


def test_interval_matches_the_normal_one_for_large_normal_samples() -> None:
    values = np.random.default_rng(0).normal(2.0, 3.0, 2000)
    interval = mean_interval(values.tolist())
    half = 1.96 * values.std(ddof=1) / math.sqrt(2000)
    assert interval.mean == pytest.approx(values.mean())
    # 10,000 resamples place a 2.5% quantile to about 3% of the half-width.
    assert interval.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    hits = {0.8: 0, 0.95: 0}
    for trial in range(150):
        rates = rng.binomial(4, rng.beta(0.5, 0.5, 30)) / 4  # per-problem rates piled up at 0 and 1, mean 1/2
        for level in hits:
            interval = mean_interval(rates.tolist(), level, bounds=(0, 1), seed=trial)
            hits[level] += interval.low <= 0.5 <= interval.high
    # Three standard errors of 150 trials.
    for level, count in hits.items():
        assert count / 150 == pytest.approx(level, abs=3 * math.sqrt(level * (1 - level) / 150) + 0.01)


def test_interval_of_equal_values() -> None:
    assert mean_interval([0.5] * 9) == Interval(0.5, 0.5, 0.5, 9)
    # Nothing solved in 20: the exact binomial limit, 1 - 0.025^(1/20).
    zero, one = (mean_interval([v] * 20, bounds=(0, 1)) for v in (0.0, 1.0))
    assert (zero.low, one.high) == (0.0, 1.0)
    assert zero.high == pytest.approx(1 - 0.025 ** (1 / 20))
    assert one.low == pytest.approx(0.025 ** (1 / 20))


def test_interval_is_seeded_cut_to_bounds_and_checked() -> None:
    values = [0.0, 0.0, 0.0, 1.0]
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, bounds=(0, 1)).low == 0.0
    assert mean_interval(values).low < 0.0
    for bad in ([], [math.nan], [2.0]):
        with pytest.raises(ConfigError, match="values"):
            mean_interval(bad, bounds=(0, 1))
    with pytest.raises(ConfigError, match="level = 1"):
        mean_interval(values, 1)


def test_pairing_takes_the_spread_between_problems_out() -> None:
    before = np.random.default_rng(3).normal(0, 10, 50)
    after = before + np.random.default_rng(4).normal(1, 0.1, 50)
    interval = paired_difference(before.tolist(), after.tolist())
    assert 0.9 < interval.low < interval.mean < interval.high < 1.1
    with pytest.raises(ConfigError, match="before has 2"):
        paired_difference([1, 2], [1])


class ScriptedEngine:
    """Answers from a table: the engine protocol without a model."""

    def __init__(self, answers: Sequence[Sequence[str]]) -> None:
        self.answers = answers
        self.calls: list[tuple[list[Request], int, int]] = []

    def generate(self, requests: Sequence[Request], *, seed: int, step: int) -> list[list[Completion]]:
        self.calls.append((list(requests), seed, step))
        return [[_completion(text) for text in texts] for texts in self.answers]

    def sync(self, version: int) -> None: ...

    def close(self) -> None: ...


def _completion(text: str) -> Completion:
    cut = text.endswith("~")
    return Completion([0] * len(text), text=text.rstrip("~"), stop_reason=StopReason.LENGTH if cut else StopReason.EOS)


def brittle(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(c.strip("!")) / 2 for c in completions]


def problems() -> list[Group]:
    return [Group([i + 1], [], {"prompt": f"q{i}", "answer": str(i)}, index=10 + i) for i in range(3)]


def rubric() -> Rubric:
    return Rubric([Criterion("right", exact_answer(sources=["text"])), Criterion("half", brittle, 0.0)])


def run(answers: Sequence[Sequence[str]], **options: Any) -> Evaluation:
    arguments: dict[str, Any] = {"params": PARAMS, "num_samples": 2, "ks": (1, 2), "solved": "right", **options}
    return evaluate(ScriptedEngine(answers), problems(), rubric(), **arguments)


BASE = [["0", "0"], ["1", "2"], ["3", "33~"]]


def test_evaluation_by_hand() -> None:
    engine, groups = ScriptedEngine(BASE), problems()
    result = evaluate(engine, groups, rubric(), params=PARAMS, num_samples=2, ks=(2, 1), solved="right", seed=5, step=3)
    [(requests, seed, step)] = engine.calls
    assert (seed, step) == (5, 3)
    assert [(list(r.prompt_ids), r.num_samples, r.params, r.index) for r in requests] == [
        ([1], 2, PARAMS, 10),
        ([2], 2, PARAMS, 11),
        ([3], 2, PARAMS, 12),
    ]
    assert [(p.num_graded, p.num_solved, p.num_truncated) for p in result.problems] == [(2, 2, 0), (2, 1, 0), (2, 0, 1)]
    assert {k: i.mean for k, i in result.pass_at_k.items()} == {1: 0.5, 2: pytest.approx(2 / 3)}
    assert result.criteria["right"].mean == 0.5
    assert result.criteria["half"].mean == pytest.approx((0 + 0.75 + 9) / 3)
    assert result.mean_completion_tokens == pytest.approx(8 / 6)
    assert result.truncated_fraction == pytest.approx(1 / 6)
    assert (result.num_failed, result.errors) == (0, ())
    assert all(group.completions == [] for group in groups)


def test_json_round_trip() -> None:
    result = run(BASE, name="base")
    text = json.dumps(result.to_dict())
    assert Evaluation.from_dict(json.loads(text)) == result
    with pytest.raises(ConfigError, match="not an evaluation"):
        Evaluation.from_dict({"name": "x"})


def test_failed_rewards_are_loud_and_never_wrong_answers() -> None:
    answers = [["0", "0"], ["1", "?"], ["2", "2"]]
    with pytest.raises(RewardError, match=r"failed on 1 of 6 completions.*'half' failed on prompt 11, completion 1"):
        run(answers)
    result = run(answers, max_failed_fraction=0.2)
    assert result.num_failed == 1
    assert "ValueError" in result.errors[0]
    assert result.problems[1].criteria == {"right": 0.5, "half": 0.5}  # the failed one is in no mean of `half`


def test_a_missing_verdict_leaves_its_problem_out_of_larger_k() -> None:
    def verdict(completions: list[str], **kwargs: Any) -> list[float]:
        return [float("nan") if c == "?" else 1.0 for c in completions]

    engine = ScriptedEngine([["a", "a"], ["a", "?"], ["a", "a"]])
    options: dict[str, Any] = {"params": PARAMS, "num_samples": 2, "ks": (1, 2), "max_failed_fraction": 0.5}
    result = evaluate(engine, problems(), Rubric([Criterion("v", verdict)]), **options)
    assert [(result.pass_at_k[k].num, result.pass_at_k[k].mean) for k in (1, 2)] == [(3, 1.0), (2, 1.0)]


def test_compare_is_paired() -> None:
    before, after = run(BASE), run([["0", "0"], ["1", "1"], ["2", "33~"]])
    assert compare(before, after).mean == pytest.approx((0 + 0.5 + 0.5) / 3)
    assert compare(before, after, "pass@2").mean == pytest.approx(1 / 3)
    assert compare(after, before, "right").mean == pytest.approx(-1 / 3)
    assert compare(before, after, "completion_tokens").mean == 0.0
    assert compare(before, after, "truncated_fraction").mean == 0.0


def test_one_more_criterion_is_paired_like_the_others() -> None:
    before, after = run(BASE), run(BASE)
    before, after = before.with_criterion("nll", [2.0, 1.0, None]), after.with_criterion("nll", [1.0, 0.5, 3.0])
    assert before.criteria["nll"].mean == 1.5
    assert compare(before, after, "nll").mean == pytest.approx((-1.0 - 0.5) / 2), (
        "a problem without a value is left out"
    )
    assert Evaluation.from_dict(after.to_dict()) == after


def test_a_demonstration_is_no_part_of_the_problem() -> None:
    rows = [{"prompt": "p", "answer": "1"}, {"prompt": "p", "answer": "1", "completion": "c"}, {"prompt": "p"}]
    keys = [_key(row) for row in rows]
    assert keys[0] == keys[1] != keys[2]


def test_a_question_is_one_problem_as_text_and_as_messages() -> None:
    """`prompt_group` adds the prompt that it reads from the question, by the tokenizer's template."""
    row = {"question": "1+1=", "answer": "2"}
    keys = {_key(row), _key({**row, "prompt": "1+1="}), _key({**row, "prompt": [{"role": "user", "content": "1+1="}]})}
    assert len(keys) == 1
    assert _key({**row, "question": "1+2="}) not in keys


@pytest.mark.parametrize("budget", [None, 12])
def test_nll_equals_plain_forwards(budget: int | None) -> None:
    """Rows of many lengths, some with unscored tokens, whatever the split."""
    model = tiny.model()
    rng = np.random.default_rng(0)
    groups: list[Group] = []
    expected: list[float] = []
    for index in range(7):
        prompt, ids = (rng.integers(2, 96, size=n).tolist() for n in (1 + index % 3, 2 + index))
        mask = [bool(i % 3 != 1) for i in range(len(ids))]
        groups.append(Group(prompt, [Completion(ids, mask, "")], {}, index))
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="none")
        expected.append(float(losses[torch.tensor(mask)].mean()))
    prepare_for_scoring(model)
    # fp32, another order of the sums.
    assert mean_nll(model, groups, token_budget=budget) == pytest.approx(expected, abs=1e-5)


def test_compare_refuses() -> None:
    before = run(BASE)
    other = replace(before, problems=before.problems[::-1])
    with pytest.raises(ConfigError, match=r"not the same problems in the same order \(3 shared\)"):
        compare(before, other)
    for metric in ("pass@3", "pass@0", "pass@", "wrong"):
        with pytest.raises(ConfigError, match=r"pass@k with k in 1 \.\. 2, completion_tokens"):
            compare(before, before, metric)
    with pytest.raises(ConfigError, match="success is"):
        compare(before, replace(before, solved="half"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solved": None}, "solved = None.*right, half"),
        ({"solved": "write"}, "solved = 'write'"),
        ({"ks": (3,)}, "ks = "),
        ({"ks": ()}, "ks = "),
        ({"num_samples": 0}, "num_samples = 0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run(BASE, **options)


def test_an_evaluation_keeps_its_completions() -> None:
    result = Evaluation.from_dict(json.loads(json.dumps(run(BASE).to_dict())))
    assert [[sample["text"] for sample in problem.samples] for problem in result.problems] == [
        ["0", "0"], ["1", "2"], ["3", "33"],
    ]  # fmt: skip
    last = result.problems[2].samples[1]
    assert last["stop_reason"] == "length"
    assert last["num_tokens"] == 3
    assert last["criteria"]["right"] == 0.0
    assert last["answers"] == {"right": "33"}
    assert result == run(BASE)


def test_an_evaluation_written_without_completions_is_still_read() -> None:
    data = run(BASE).to_dict()
    for problem in data["problems"]:
        del problem["samples"]
    assert compare(Evaluation.from_dict(data), run(BASE)).mean == 0.0
