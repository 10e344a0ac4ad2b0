"""Runs without a learning signal are named and stopped; runs that may learn, or are complete, continue."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest

import tiny
from burnish import CheckFailed, Criterion, Rubric
from burnish.rewards import exact_answer, numeric_answer
from burnish.training.learning_signal import (
    UNKNOWN,
    Assessment,
    LearningMonitor,
    Outcome,
    assess_gradient,
    assess_loss,
    assess_rewards,
)
from test_finite import TRAINERS, make

ONLINE = ["grpo", "online_dpo", "ppo"]


def constant(completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def varied(completions: list[str], **columns: Any) -> list[float]:
    return [sum(map(ord, text)) / 100 for text in completions]


def nothing(completions: list[str], **columns: Any) -> list[None]:
    return [None] * len(completions)


def run(kind: str, folder: Path, **changes: Any) -> Any:
    fields = {"learning_rate": 1e-3, "max_steps": 12, "max_dead_steps": 3, "logging_steps": 1, **changes}
    trainer = make(kind, folder, **fields)
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", sorted(TRAINERS))
def test_destroyed_weights_stop_every_stage(tmp_path: Path, kind: str) -> None:
    with pytest.raises(CheckFailed, match=r"step \d+: [34] optimizer steps .* no learning signal: .*learning_rate"):
        # Logits of 1e6 differ between sampler and trainer by more than rounding, which stops the run earlier.
        run(kind, tmp_path, learning_rate=1e3, **({"logprob_check_bound": 1e9} if kind in ONLINE else {}))


@pytest.mark.parametrize("kind", ONLINE)
@pytest.mark.parametrize(
    ("reward", "changes", "problem"),
    [
        (constant, {}, "no reward differs from those it is compared with: all 8 are 0"),
        (nothing, {}, "none of 8 completions has a reward"),
        (None, {"mask_truncated_completions": True, "max_completion_length": 1, "learning_rate": 0.0},
         "completions are truncated at max_completion_length = 1 and masked"),
    ],
)  # fmt: skip
def test_rewards_without_a_signal_are_named_at_once_and_stop_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, reward: Any, changes: dict[str, Any], problem: str
) -> None:
    rewards = {} if reward is None else {"reward_funcs": reward}
    with pytest.raises(CheckFailed, match=rf"3 optimizer steps in a row had no learning signal: .*{problem}"):
        run(kind, tmp_path, **rewards, **changes)
    said = [message for message in caplog.messages if "has no learning signal" in message]
    assert len(said) == 1
    assert said[0].startswith("step 1 has no learning signal")
    assert "after 3 such steps in a row (max_dead_steps)" in said[0]


def test_masked_labels_are_named(tmp_path: Path) -> None:
    trainer = make("sft", tmp_path, learning_rate=1e-3, max_steps=8, max_dead_steps=3)
    for group in trainer.train_dataset:
        group.completions[0].loss_mask = [False] * len(group.completions[0].token_ids)
    with pytest.raises(CheckFailed, match=r"step 3: 3 optimizer steps .* nothing of the step is in the loss"):
        trainer.train()


@pytest.mark.parametrize("limit", [0, None])
def test_the_field_switches_it_off_and_short_runs_end_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, limit: int | None
) -> None:
    trainer = run("grpo", tmp_path, reward_funcs=constant, max_dead_steps=limit)
    assert trainer.state.global_step == 12
    assert "none of the run's 12 steps had a learning signal" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("grpo", {"entropy_coef": 0.1}),
        ("grpo", {"beta": 0.1, "ref_model": "another"}),
        ("ppo", {"value_prefit_steps": 12}),
        # One completion a step is compared with those of other steps, by the critic.
        ("ppo", {"num_generations": 1, "per_device_train_batch_size": 1, "reward_funcs": varied}),
        ("grpo", {"prompt_sampling": "curriculum", "curriculum_target": -1.0}),
    ],
)
def test_runs_that_learn_something_else_go_on(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    if "ref_model" in changes:
        changes = {**changes, "ref_model": tiny.model(seed=3)}
    assert run(kind, tmp_path, **{"reward_funcs": constant, **changes}).state.global_step == 12


def solved() -> Assessment:
    return assess_rewards([[Outcome((1.0,))] * 4], max_completion_length=8)


def failed(reward: float = 0.0) -> Assessment:
    return assess_rewards([[Outcome((reward,))] * 4], max_completion_length=8)


LEARNING = assess_rewards([[Outcome((1.0,)), Outcome((0.0,))]], max_completion_length=8)


def steps_until_stopped(assessments: list[Assessment], limit: int = 20) -> int | None:
    learning_monitor = LearningMonitor(limit)
    for step, assessment in enumerate(assessments, 1):
        try:
            learning_monitor.end_step(step, assessment)
        except CheckFailed:
            return step
    return None


@pytest.mark.parametrize(
    ("assessments", "stopped"),
    [
        ([failed()] * 30, 20),
        ([solved()] * 30, 20),  # from the start: there is nothing to learn
        ([LEARNING, *[solved()] * 100], None),  # solved
        ([LEARNING, *[failed()] * 30], 21),  # collapsed
        ([*[LEARNING] * 50, *[failed()] * 30], 70),
        ([*[LEARNING] * 50, *[solved(), failed()] * 30], None),  # some prompts always, some never solved
        ([*[LEARNING] * 5, *[solved(), failed()] * 30], 25),  # too early for that
        ([*[failed()] * 19, LEARNING] * 5, None),
        ([*[failed()] * 19, UNKNOWN] * 5, 21),
        ([dataclasses.replace(failed(), stops=False)] * 50, None),
        ([*[LEARNING] * 50, *[assess_rewards([[Outcome(None)]], max_completion_length=8)] * 30], 70),
        ([*[Assessment()] * 50, *[assess_gradient(0.0, loss_left=1.0)] * 30], 70),
        ([*[Assessment()] * 50, *[assess_gradient(0.0, loss_left=0.0)] * 30], None),  # nothing is left to learn
        ([Assessment(), *[assess_gradient(0.0, loss_left=0.0)] * 30], 21),  # saturated by a single step
        ([*[assess_loss(11.0, 2.0, uniform=10.8)] * 30], 20),
        ([*[assess_loss(10.9, 10.8, uniform=10.8)] * 30], None),  # from scratch, in its warm-up
    ],
)
def test_the_rule(assessments: list[Assessment], stopped: int | None) -> None:
    assert steps_until_stopped(assessments) == stopped
    assert steps_until_stopped(assessments, limit=0) is None


@pytest.mark.parametrize(
    ("compared", "groups", "kind"),
    [
        ("group", [[(0.0,), (1.0,)], [(1.0,), (1.0,)]], "learning"),
        ("group", [[(0.0,), (0.0,)], [(1.0,), (1.0,)]], "constant_reward"),
        ("batch", [[(0.0,), (0.0,)], [(1.0,), (1.0,)]], "learning"),
        ("batch", [[(1.0,)], [(1.0,)]], "constant_reward"),
        ("group", [[(0.0, 1.0), (1.0, 0.0)]], "learning"),  # criteria that cancel, each normalised by itself
        ("group", [[None, (1.0,)], [(1.0,), (1.0,)]], "constant_reward"),
        ("group", [[None, None]], "no_reward"),
    ],
)
def test_what_a_reward_is_compared_with(compared: str, groups: list[list[Any]], kind: str) -> None:
    outcomes = [[Outcome(rewards) for rewards in group] for group in groups]
    assert assess_rewards(outcomes, compared=compared, max_completion_length=8).kind == kind


def test_a_single_dull_batch_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    learning_monitor = LearningMonitor(20)
    with caplog.at_level(logging.WARNING):
        for step, assessment in enumerate([LEARNING, failed(), LEARNING, *[failed()] * 4, LEARNING], 1):
            learning_monitor.end_step(step, assessment)
        assert caplog.messages == []
        for step in range(9, 20):
            learning_monitor.end_step(step, failed())
    assert len(caplog.messages) == 1


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"reward_funcs": constant, "max_dead_steps": 5, "save_strategy": "steps", "save_steps": 2}
    run("grpo", tmp_path, **fields, max_steps=2)
    trainer = make("grpo", tmp_path, learning_rate=1e-3, **{**fields, "max_steps": 9})
    with pytest.raises(CheckFailed, match=r"step 5: 5 optimizer steps in a row"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    # What the message offers: the same run goes on with the limit off.
    trainer = make("grpo", tmp_path, learning_rate=1e-3, **{**fields, "max_steps": 9, "max_dead_steps": 0})
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == 9


@pytest.mark.parametrize("others", [[], [Criterion("varied", varied)]], ids=["alone", "beside one that varies"])
def test_a_verifier_that_reads_no_answer_is_named_after_the_first_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, others: list[Criterion]
) -> None:
    rubric = Rubric([Criterion("numeric", numeric_answer()), *others])
    trainer = make("grpo", tmp_path, reward_funcs=rubric, learning_rate=1e-3, max_dead_steps=0, log_completions=True)
    trainer.train()
    said = [message for message in caplog.messages if "no <answer> tag in any of 8 completions" in message]
    assert len(said) >= 1
    assert "criterion 'numeric'" in said[0]
    written = [json.loads(line) for line in (tmp_path / "transcripts.jsonl").read_text().splitlines()]
    assert [row["answers"] for row in written] == [{}] * 8


def test_transcripts_keep_the_answer_that_was_read(tmp_path: Path) -> None:
    rubric = Rubric([Criterion("exact", exact_answer(sources=["text"]))])
    trainer = make("grpo", tmp_path, reward_funcs=rubric, learning_rate=1e-3, log_completions=True)
    trainer.train()
    written = [json.loads(line) for line in (tmp_path / "transcripts.jsonl").read_text().splitlines()]
    read = [row for row in written if "exact" in row["answers"]]
    assert read
    assert all(row["answers"]["exact"] in row["completion"] for row in read)


@pytest.mark.parametrize("kind", ONLINE)
def test_evaluations_of_online_stages_keep_their_completions(tmp_path: Path, kind: str) -> None:
    trainer = make(kind, tmp_path, learning_rate=1e-3, max_steps=2, log_completions=True)
    for _ in range(2):
        trainer.evaluate([{"prompt": "1+1="}, {"prompt": "2+2="}])
        if trainer.state.global_step == 0:
            trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "eval_transcripts.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt_index"], row["sample"]) for row in rows] == [
        (step, prompt, sample) for step in (0, 2) for prompt in (0, 1) for sample in range(4)
    ]
    assert all(row["split"] == "eval" and row["criteria"] for row in rows)
