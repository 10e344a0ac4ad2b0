"""Online trainers on episodes of several turns: tools, environments of both protocols, rollout functions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from burnish import (
    ConfigError,
    GRPOConfig,
    GRPOTrainer,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    PPOConfig,
    PPOTrainer,
    RLOOConfig,
    RLOOTrainer,
)
from burnish.environments import Environment, Reply
from burnish.errors import EngineError, RewardError
from burnish.model.packing import pack
from burnish.model.scoring import score
from burnish.rewards import Criterion, Rubric
from burnish.rewards.episodes import EnvironmentReward
from burnish.rewards.verifiers import completion_text
from burnish.types import Episode
from dialects import DIALECTS, speaker

STOPS = [*"aeiourstlnm0123456789 .,", *"BCDFGHJKLPQVWXYZ"]
"""Strings that end a turn of a random model early, so that several turns fit."""
ROWS = [{"prompt": [{"role": "user", "content": f"Count to {i}."}], "number": i} for i in range(8)]


class Talk(Environment):
    """Answers three turns; rewards vowels, so that rewards differ."""

    def __init__(self) -> None:
        self.turns = 0

    def step(self, text: str) -> Reply:
        self.turns += 1
        return Reply([{"role": "user", "content": f"And {self.turns}?"}], done=self.turns == 3)


def spread(completions: list[Any], **columns: Any) -> list[float]:
    """A reward that differs between random texts."""
    said = ["".join(m["content"] for m in messages if m["role"] == "assistant") for messages in completions]
    return [sum(map(ord, text)) % 17 / 17 for text in said]


def settings(tmp_path: Path, config: type = GRPOConfig, **fields: Any) -> Any:
    defaults: dict[str, Any] = {
        "output_dir": str(tmp_path), "max_steps": 3, "per_device_train_batch_size": 8, "num_generations": 4,
        "max_completion_length": 120, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", "seed": 3,
        "stop": STOPS, "progress": False, "report_to": [], "compile_rollouts": False, "log_completions": True,
    }  # fmt: skip
    return config(**{**defaults, **fields})


def model_for(tokenizer: Any, **changes: Any) -> Any:
    return tiny.model(vocab_size=len(tokenizer), max_position_embeddings=2048, **changes)


def build(tmp_path: Path, *, kind: type = GRPOTrainer, config: type = GRPOConfig, **options: Any) -> Any:
    tokenizer, end = speaker(options.pop("dialect", "chatml"))
    made = options.pop("model", None) or model_for(tokenizer)
    made.generation_config.eos_token_id = end
    fields = options.pop("fields", {})
    options.setdefault("reward_funcs", spread)
    return kind(
        model=made, args=settings(tmp_path, config, **fields), train_dataset=ROWS, processing_class=tokenizer, **options
    )


def logs(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def transcripts(tmp_path: Path) -> list[dict[str, Any]]:
    [file] = tmp_path.rglob("transcripts.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_episodes_train_on_what_was_sampled(tmp_path: Path, dialect: str) -> None:
    """The trainer's log-probabilities of whole episodes are the sampler's of single turns."""
    trainer = build(tmp_path, dialect=dialect, environment_factory=Talk)
    trainer.train()
    assert max(logs(trainer, "episodes/mean_turns")) > 1.5
    assert max(logs(trainer, "sampling/logprob_difference/max")) < 1e-4
    assert all(math.isfinite(loss) for loss in logs(trainer, "loss"))
    assert sum(logs(trainer, "grad_norm")) > 0
    records = transcripts(tmp_path)
    assert len(records) == 24
    assert max(len(record["messages"]) for record in records) == 5
    assert all(record["num_tokens"] < 120 for record in records)


@pytest.mark.parametrize(
    ("kind", "config", "fields"),
    [
        (RLOOTrainer, RLOOConfig, {"beta": 0.1}),
        (GRPOTrainer, GRPOConfig, {"algorithm": "reinforce_pp", "beta": 0.1}),
        (GRPOTrainer, GRPOConfig, {"algorithm": "gspo"}),
        (GRPOTrainer, GRPOConfig, {"loss_type": "dr_grpo", "num_iterations": 2, "dynamic_sampling": True}),
        (GRPOTrainer, GRPOConfig, {"sampling_correction": "token_truncate", "entropy_coef": 0.01}),
        (OnlineDPOTrainer, OnlineDPOConfig, {}),
        (PPOTrainer, PPOConfig, {"beta": 0.1}),
    ],
)
def test_algorithms_train_on_episodes(tmp_path: Path, kind: type, config: type, fields: dict[str, Any]) -> None:
    trainer = build(tmp_path, kind=kind, config=config, fields=fields, environment_factory=Talk)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert max(logs(trainer, "episodes/mean_turns")) > 1.5
    changed = [not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True)]
    assert all(changed)


def test_gradients_of_answers_are_zero(tmp_path: Path) -> None:
    """Positions that predict an answer of the environment get no gradient from the loss."""
    trainer = build(tmp_path, environment_factory=Talk)
    stage = trainer.stage
    [groups] = stage.rollout_step()[:1]
    batch = pack(groups)
    masked = [c for g in groups for c in g.completions if c.loss_mask is not None]
    assert masked
    assert batch.num_scored_tokens == sum(c.num_scored_tokens for g in groups for c in g.completions)
    scores = score(stage.run.model, batch, temperature=1.0)
    assert scores.logprobs.shape == (batch.num_scored_tokens,)
    flat = batch.input_ids[0].tolist()
    for group, span in zip(groups, batch.spans, strict=True):
        for completion, (start, length) in zip(group.completions, span.completions, strict=True):
            mask = completion.loss_mask or [True] * length
            # Where an answer's token follows, the position before it is scored for no token.
            unscored = {start + j - 1 for j in range(1, length) if not mask[j]}
            assert not unscored & set(batch.score_index.tolist())
            assert flat[start : start + length] == completion.token_ids


def seen_by(found: list[dict[str, Any]]) -> Any:
    def reward(completions: list[Any], episodes: list[Episode], environments: list[Any], **columns: Any) -> list[float]:
        found.append({"completions": completions, "episodes": episodes, "environments": environments, **columns})
        return spread(completions)

    return reward


def test_reward_functions_see_messages_episodes_and_live_environments(tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    trainer = build(tmp_path, fields={"max_steps": 1}, environment_factory=Talk, reward_funcs=seen_by(found))
    trainer.train()
    [call] = found
    assert len(call["completions"]) == len(call["episodes"]) == len(call["environments"]) == 8
    assert all(isinstance(environment, Talk) for environment in call["environments"])
    assert all(messages[0]["role"] == "assistant" for messages in call["completions"])
    assert any(messages[1:2] == [{"role": "user", "content": "And 1?"}] for messages in call["completions"])
    assert call["number"] == [row["number"] for row in call_rows(call)]
    turns = [(environment.turns, len(episode.turns)) for environment, episode in zip(
        call["environments"], call["episodes"], strict=True
    )]  # fmt: skip
    assert all(played in (seen, seen + 1) for seen, played in turns)  # the last one may be cut
    assert max(turns) == (3, 3)
    # Environments end once rewards have run.
    assert all(e.environment is None for e in call["episodes"])


class Quiz(Talk):
    """Writes the prompt itself, from a seed that the group shares."""

    def reset(self, row: Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
        return [{"role": "user", "content": f"Question {seed % 1000} of {row['number']}."}]


class Paid(Talk):
    """Rewards the second turn only, by its text."""

    def step(self, text: str) -> Reply:
        reply = super().step(text)
        return Reply(reply.messages, done=reply.done, reward=sum(map(ord, text)) % 5 if self.turns == 2 else None)


def test_a_turn_is_credited_with_what_follows_it(tmp_path: Path) -> None:
    """A reward of the second turn moves the first two turns, and not the third."""
    rubric = Rubric([Criterion("paid", EnvironmentReward(per_turn=True), weight=2.0)])
    trainer = build(tmp_path, environment_factory=Paid, reward_funcs=rubric, fields={"turn_credit": True})
    groups = [group for groups in trainer.stage.rollout_step() for group in groups]
    assert any(c.reward for g in groups for c in g.completions)
    for group in groups:
        rewards = [completion.reward for completion in group.completions]
        assert None not in rewards
        mean = sum(rewards) / len(rewards)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
        for completion in group.completions:
            episode, stream = completion.episode, completion.token["advantages"]
            assert episode is not None
            assert completion.score is not None
            assert completion.score.turns["paid"] == [0.0, completion.reward / 2, 0.0]
            expected = (completion.reward - mean) / (deviation + 1e-4) if deviation else 0.0
            turns = [stream[start:end] for start, end in episode.turns]
            for values, wanted in zip(turns, (expected, expected, 0.0), strict=True):
                assert values == pytest.approx([wanted] * len(values))
    trainer.train()
    assert max(logs(trainer, "grad_norm")) > 0


def test_credit_of_a_last_turn_is_that_of_the_completion(tmp_path: Path) -> None:
    """Where only the whole episode is rewarded, turns change nothing."""
    runs = [build(tmp_path / str(c), environment_factory=Talk, fields={"turn_credit": c}) for c in (False, True)]
    for run in runs:
        run.train()
    for a, b in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(a, b)


class Wages(Talk):
    """Rewards every turn, by its text."""

    def step(self, text: str) -> Reply:
        reply = super().step(text)
        return Reply(reply.messages, done=reply.done, reward=sum(map(ord, text)) % 5 - 1.5)


class Once(Wages):
    """Ends with the first turn."""

    def step(self, text: str) -> Reply:
        reply = super().step(text)
        return Reply(reply.messages, done=True, reward=reply.reward)


def wages() -> Rubric:
    return Rubric([Criterion("wages", EnvironmentReward(per_turn=True), weight=2.0)])


PPO: dict[str, Any] = {"kind": PPOTrainer, "config": PPOConfig, "environment_factory": Wages}


@pytest.mark.parametrize("credited", [True, False])
def test_a_critic_learns_what_a_turn_earned(tmp_path: Path, credited: bool) -> None:
    """Returns are the reward to go from the turn on: with lambda and gamma of 1, they are not discounted in it."""
    fields = {"turn_credit": credited, "lam": 1.0, "beta": 0.0, "whiten_advantages": False, "reward_clip_range": None}
    trainer = build(tmp_path, **PPO, reward_funcs=wages(), fields=fields)
    completions = [c for groups in trainer.stage.rollout_step() for g in groups for c in g.completions]
    assert max(len(c.episode.turns) for c in completions) == 3
    for completion in completions:
        returns, values = completion.token["returns"], completion.token["values"]
        paid = [2.0 * (reward or 0.0) for reward in completion.episode.rewards]
        assert sum(paid) == pytest.approx(completion.reward)
        for k, (start, end) in enumerate(completion.episode.turns):
            to_go = sum(paid[k:] if credited else paid)
            assert returns[start:end] == pytest.approx([to_go] * (end - start), abs=1e-5)  # values are fp32
            own = [to_go - value for value in values[start:end]]
            assert completion.token["advantages"][start:end] == pytest.approx(own, abs=1e-5)
    trainer.train()
    assert max(logs(trainer, "grad_norm")) > 0
    assert all(math.isfinite(loss) for loss in logs(trainer, "loss"))


@pytest.mark.parametrize(
    ("factory", "rewards"), [(Talk, spread), (Once, wages()), (Wages, Rubric([Criterion("whole", spread)]))]
)
def test_credit_without_a_turn_before_the_last_changes_no_bit(tmp_path: Path, factory: Any, rewards: Any) -> None:
    made = {**PPO, "environment_factory": factory, "reward_funcs": rewards}
    runs = [build(tmp_path / str(c), **made, fields={"turn_credit": c, "beta": 0.1}) for c in (False, True)]
    for run in runs:
        run.train()
    for a, b in zip(*(run.model.parameters() for run in runs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("kind", "config"), [(PPOTrainer, PPOConfig), (GRPOTrainer, GRPOConfig)])
def test_rewards_of_turns_that_add_up_to_the_same_are_a_signal(tmp_path: Path, kind: type, config: type) -> None:
    def zero_sum(episodes: list[Episode], **columns: Any) -> list[Any]:
        paid = [float(i % 2) if len(e.turns) > 1 else 0.0 for i, e in enumerate(episodes)]
        return [[p, *[0.0] * (len(e.turns) - 2), -p][: len(e.turns)] for p, e in zip(paid, episodes, strict=True)]

    def signals(credited: bool) -> list[Any]:
        fields = {"turn_credit": credited, "max_completion_length": 400}
        trainer = build(
            tmp_path / str(credited), kind=kind, config=config, environment_factory=Talk, reward_funcs=zero_sum,
            fields=fields,
        )  # fmt: skip
        completions = [c for groups in trainer.stage.rollout_step() for g in groups for c in g.completions]
        assert {c.reward for c in completions} == {0.0}
        return [trainer.stage.algorithm.reward_components(c) for c in completions]

    assert len(set(signals(True))) > 1
    assert len(set(signals(False))) == 1


def test_a_reward_function_may_return_a_value_per_turn(tmp_path: Path) -> None:
    def by_turn(episodes: list[Episode], **columns: Any) -> list[Any]:
        return [[float(end - start) for start, end in episode.turns] for episode in episodes]

    def too_few(episodes: list[Episode], **columns: Any) -> list[Any]:
        return [[1.0] if i % 2 else 0.5 for i in range(len(episodes))]

    fields = {"max_steps": 1, "max_failed_rewards": 1.0}
    trainer = build(tmp_path, environment_factory=Talk, reward_funcs=[by_turn, too_few], fields=fields)
    trainer.train()
    for record in transcripts(tmp_path):
        assert record["criteria"]["by_turn"] == record["num_tokens"]
        assert ("returned 1 values for an episode of 3 turns" in str(record["errors"])) == (record["sample"] % 2 == 1)


def test_what_a_tool_said_is_not_graded() -> None:
    messages = [{"role": "assistant", "content": "I ask."}, {"role": "tool", "content": "The answer is 42."}]
    assert completion_text(messages) == "I ask."
    assert completion_text(messages[1:]) == ""


def call_rows(call: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [ROWS[number] for number in call["number"]]


class Count:
    """TRL's protocol, with a reward of its own."""

    def reset(self, number: int, **row: Any) -> str:
        self.number = number
        return f" Now {number}."

    def more(self, by: int) -> int:
        """Count on.

        Args:
            by: by how much.
        """
        self.number += by
        return self.number

    async def get_reward(self) -> float:
        return float(self.number % 3) + torch.rand(1).item()


def test_an_environment_of_trl_needs_no_reward_function(tmp_path: Path) -> None:
    trainer = build(tmp_path, environment_factory=Count, reward_funcs=None, fields={"beta": 0.1})
    assert trainer.stage.rubric.names == ("Count",)
    trainer.train()
    assert len(logs(trainer, "rewards/Count/mean")) == 3
    assert all("Count to" in r["prompt"] and " Now " in r["prompt"] for r in transcripts(tmp_path))
    assert max(logs(trainer, "sampling/logprob_difference/max")) < 1e-4


def test_without_a_reward_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reward_funcs = None: pass a callable, a Rubric, or an environment"):
        build(tmp_path, environment_factory=Talk, reward_funcs=None)


class Broken(Talk):
    made = 0

    def step(self, text: str) -> Reply:
        Broken.made += 1
        if Broken.made % 4 == 0:
            raise RuntimeError("the simulator is down")
        return super().step(text)


def test_a_failing_environment_excludes_its_completion(tmp_path: Path) -> None:
    Broken.made = 0
    trainer = build(tmp_path, environment_factory=Broken, fields={"max_failed_rewards": 0.9})
    trainer.train()
    records = transcripts(tmp_path)
    failed = [record for record in records if record["errors"]]
    assert failed
    assert len(failed) == round(sum(logs(trainer, "episodes/failed")))
    assert all(record["reward"] is None for record in failed)
    assert all("the simulator is down" in record["errors"]["environment"] for record in failed)
    assert all(record["reward"] is not None for record in records if not record["errors"])


def test_environments_that_fail_too_often_stop_the_run(tmp_path: Path) -> None:
    class Down(Talk):
        def reset(self, row: Mapping[str, Any], seed: int) -> None:
            raise ConnectionError("no route to the simulator")

    with pytest.raises(RewardError, match="no route to the simulator"):
        build(tmp_path, environment_factory=Down, fields={"max_steps": 20}).train()


def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """What TRL's scripts write: render, sample, append a line of the environment, sample again."""
    tokenizer, engine = trainer.processing_class, trainer.stage.sampler.engine
    ids = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in prompts]
    columns: dict[str, list[Any]] = {
        "prompt_ids": [], "completion_ids": [], "logprobs": [], "env_mask": [], "moves": []
    }  # fmt: skip
    line = tokenizer("<|im_end|>\nMore?", add_special_tokens=False)["input_ids"]
    first = engine.sample(ids, trainer.args.num_generations)
    for prompt, group in zip(ids, first, strict=True):
        for turn in group:
            [[more]] = engine.sample([[*prompt, *turn.token_ids, *line]])
            columns["prompt_ids"].append(prompt)
            columns["completion_ids"].append([*turn.token_ids, *line, *more.token_ids])
            columns["logprobs"].append([*turn.sampler_logprobs, *[0.0] * len(line), *more.sampler_logprobs])
            columns["env_mask"].append([1] * len(turn.token_ids) + [0] * len(line) + [1] * len(more.token_ids))
            columns["moves"].append(len(more.token_ids))
    return columns


def test_a_rollout_function_returns_the_completions(tmp_path: Path) -> None:
    seen: list[list[int]] = []

    def reward(completions: list[Any], moves: list[int], **columns: Any) -> list[float]:
        seen.append(moves)
        return [float(move % 7) for move in moves]

    trainer = build(tmp_path, rollout_func=rollout, reward_funcs=reward, fields={"max_completion_length": 60})
    trainer.train()
    assert len(seen) == 3
    assert all(len(moves) == 8 for moves in seen)
    assert max(logs(trainer, "sampling/logprob_difference/max")) < 1e-4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("logprobs"), "returned no 'logprobs'"),
        (lambda c: c["completion_ids"].pop(), "returned 7 completion_ids for 8 completions of 2 prompts"),
        (lambda c: c["logprobs"][0].pop(), "logprobs for"),
    ],
)
def test_a_rollout_function_that_returns_something_else_is_an_error(tmp_path: Path, change: Any, words: str) -> None:
    def broken(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        columns = rollout(prompts, trainer)
        change(columns)
        return columns

    with pytest.raises(EngineError, match=words):
        build(tmp_path, rollout_func=broken, fields={"max_completion_length": 60}).train()


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rollout_func with tools"):
        build(tmp_path, rollout_func=rollout, environment_factory=Talk)
    with pytest.raises(ConfigError, match="stop_settled = True with tools"):
        build(tmp_path, environment_factory=Talk, fields={"stop_settled": True})
    with pytest.raises(ConfigError, match="tool_format = 'hermis'"):
        build(tmp_path, environment_factory=Talk, fields={"tool_format": "hermis"})


@pytest.mark.parametrize(
    "options", [{"environment_factory": Talk}, {**PPO, "reward_funcs": wages(), "fields": {"num_iterations": 1}}]
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, options: dict[str, Any]) -> None:
    """A checkpoint in the middle of a rollout holds episodes that are trained on afterwards."""
    fields = {
        "steps_per_generation": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 4,
        "lr_scheduler_type": "constant", "per_device_train_batch_size": 4,
    }  # fmt: skip
    fields |= options.get("fields", {})

    def made(name: str, **changes: Any) -> Any:
        return build(tmp_path / name, **{**options, "fields": {**fields, **changes}})

    whole = made("a")
    whole.train()
    made("b", max_steps=3).train()
    rest = made("b")
    rest.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert rest.state.global_step == 4
    for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(a, b)
    records = [
        [(r["step"], r["completion"], r["reward"]) for r in transcripts(tmp_path / folder)] for folder in ("a", "b")
    ]
    assert records[0] == records[1]


def test_evaluation_plays_episodes_too(tmp_path: Path) -> None:
    tokenizer, end = speaker("chatml")
    made = model_for(tokenizer)
    made.generation_config.eos_token_id = end
    trainer = GRPOTrainer(
        model=made,
        reward_funcs=spread,
        args=settings(tmp_path, num_generations_eval=2),
        train_dataset=ROWS,
        eval_dataset=ROWS[:3],
        processing_class=tokenizer,
        environment_factory=Talk,
    )
    metrics = trainer.evaluate()
    assert 0 < metrics["eval_reward"] < 1
    [file] = tmp_path.rglob("eval_transcripts.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(records) == 6
    assert max(len(record["messages"]) for record in records) == 5
