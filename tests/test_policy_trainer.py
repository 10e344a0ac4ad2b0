"""Online trainers: every part of the loss against an independent script, whatever the split, checks and samples."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import TrainerCallback

import tiny
from burnish import CheckFailed, ConfigError, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from burnish.algorithms import register
from burnish.config.algorithms import ADVANTAGE_NAMES, ALGORITHMS, LOSS_NAMES
from burnish.objectives.advantages import ADVANTAGES, per_criterion_advantages
from burnish.objectives.policy import POLICY_LOSSES
from burnish.rewards import Criterion, Rubric
from burnish.rollout import Request
from burnish.stages.policy_gradient import Record, estimate
from burnish.types import Completion, Group
from test_trainers import PROMPTS, Elsewhere, assert_same, digits, grpo, recorded, settings, weights

Sequence_ = tuple[Group, Completion, torch.Tensor, torch.Tensor, torch.Tensor]
"""A sequence with its log-probabilities under the trained, the old and the reference policy."""


def kl(estimator: str, new: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    d = new - ref
    return {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() + d - 1}[estimator]


def ratio_of(level: str, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    d = new - old
    if level == "sequence":
        return d.mean().exp().expand_as(d)
    if level == "product":
        return d.sum().exp().expand_as(d)
    if level == "sequence_token":
        return d.mean().exp().detach() * (new - new.detach()).exp()
    return d.exp()


def surrogate(loss_type: str, ratio: torch.Tensor, new: torch.Tensor, advantage: Any, high: float) -> torch.Tensor:
    if loss_type == "cispo":
        return -ratio.detach().clamp(max=high) * advantage * new
    if loss_type == "sapo":
        tau = torch.where(torch.as_tensor(advantage) > 0, 1.0, 1.05)
        return -advantage * 4 / tau / (1 + (-tau * (ratio - 1)).exp())
    if loss_type == "vespo":
        w = ratio.detach().prod()  # of tokens
        k, decay = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
        return -(w**k) * (decay * (1 - w)).exp() * advantage * new
    return -torch.minimum(ratio * advantage, ratio.clamp(0.9, 1 + high) * advantage)


CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "beta": 0.2},
    "grpo-sequence": {"loss_type": "grpo", "beta": 0.2, "importance_sampling_level": "sequence"},
    "dapo": {"loss_type": "dapo", "beta": 0.2},
    "dr_grpo": {"loss_type": "dr_grpo", "beta": 0.2, "scale_rewards": "none"},
    "k1": {"loss_type": "dapo", "beta": 0.2, "kl_estimator": "k1"},
    "k2": {"loss_type": "dapo", "beta": 0.2, "kl_estimator": "k2"},
    "k3-plain": {"loss_type": "dapo", "beta": 0.2, "use_bias_correction_kl": False},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.05},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo", "beta": 0.2},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "gspo_token": {"loss_type": "grpo", "importance_sampling_level": "sequence_token"},
    "rloo": {"loss_type": "grpo", "importance_sampling_level": "product", "advantage_estimator": "leave_one_out"},
    "temperature": {"loss_type": "dapo", "temperature": 1.5, "beta": 0.2},
    "off_policy_mask": {"loss_type": "dapo", "beta": 0.2, "off_policy_mask_threshold": 0.02},
    "entropy": {"loss_type": "grpo", "entropy_coef": 0.3},
    "top-entropy": {"loss_type": "dapo", "top_entropy_quantile": 0.3, "entropy_coef": 0.3, "beta": 0.2},
    "reinforce++": {"loss_type": "dapo", "advantage_estimator": "batch", "kl_in": "reward", "beta": 0.2,
                    "kl_estimator": "k1"},
    # A truncated distribution is sampled from, so that its log-probabilities are not the policy's.
    "token_truncate": {"loss_type": "dapo", "top_p": 0.6, "sampling_correction": "token_truncate",
                       "sampling_correction_max": 0.7},
    "sequence_mask": {"loss_type": "grpo", "top_p": 0.6, "sampling_correction": "sequence_mask",
                      "sampling_correction_min": 0.02, "beta": 0.2},
}  # fmt: skip


def correction(config: Any, old: torch.Tensor, completion: Completion) -> torch.Tensor:
    """Truncated weights of tokens, or masked ones of the sequence."""
    if config.sampling_correction is None:
        return torch.ones_like(old)
    difference = old - torch.tensor(completion.sampler_logprobs)
    if config.sampling_correction == "token_truncate":
        return difference.exp().clamp(max=config.sampling_correction_max)
    weight = difference.sum().exp()
    return weight * (weight >= config.sampling_correction_min) * torch.ones_like(old)


def reference_loss(sequences: Sequence[Sequence_], entropies: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
    """The loss of a whole step, from plain log-probabilities of its sequences."""
    cut = torch.cat([h.detach() for h in entropies]).quantile(1 - config.top_entropy_quantile)
    keeps = [(h.detach() >= cut).float() for h in entropies]
    losses = []
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    for (_, completion, new, old, ref), keep in zip(sequences, keeps, strict=True):
        advantage: Any = completion.sequence.get("advantages")
        if "advantages" in completion.token:
            advantage = torch.tensor(completion.token["advantages"])
        ratio = ratio_of(config.importance_sampling_level, new, old)
        loss = surrogate(config.loss_type, ratio, new, advantage, high) * keep * correction(config, old, completion)
        if config.off_policy_mask_threshold is not None:
            moved = float((old - new.detach()).mean()) > config.off_policy_mask_threshold
            loss = loss * float(completion.sequence["advantages"] >= 0 or not moved)
        if config.beta and config.kl_in == "loss":
            plain = config.use_bias_correction_kl is False or config.kl_estimator == "k2"
            loss = loss + config.beta * kl(config.kl_estimator, new, ref) * (1.0 if plain else ratio)
        losses.append(loss)
    match config.loss_type:
        case "grpo" | "sapo":
            total = torch.stack([x.mean() for x in losses]).mean()
        case "luspo":
            total = torch.stack([x.sum() for x in losses]).mean()
        case "dr_grpo":
            total = torch.cat(losses).sum() / (len(losses) * 8)
        case _:
            total = torch.cat(losses).mean()
    bonus = sum((h * k).sum() for h, k in zip(entropies, keeps, strict=True)) / sum(k.sum() for k in keeps)
    return total - config.entropy_coef * bonus


@pytest.mark.parametrize("head", ["trained", "frozen"])
@pytest.mark.parametrize("name", CASES)
def test_gradient_by_an_independent_script(tmp_path: Path, name: str, head: str) -> None:
    """Two updates on one rollout, so that ratios differ from 1 in the second; the second gradient is checked."""
    defaults: dict[str, Any] = {"epsilon": 0.1, "epsilon_high": 0.15}
    if "beta" in CASES[name]:
        defaults["ref_model"] = tiny.model(seed=3)
    trainer = grpo(
        tmp_path, optim="sgd", max_grad_norm=0.0, max_steps=2, num_iterations=2,
        learning_rate=0.3, lr_scheduler_type="constant", **{**defaults, **CASES[name]},
    )  # fmt: skip
    if head == "frozen":
        assert trainer.model.lm_head.weight is not trainer.model.get_input_embeddings().weight
        trainer.model.lm_head.requires_grad_(False)
    start, reference = copy.deepcopy(trainer.model), tiny.model(seed=3)
    snapshots: list[Any] = []
    rollouts = recorded(trainer)

    class Snapshot(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            snapshots.append(weights(trainer))

    trainer.add_callback(Snapshot())
    trainer.train()
    policy = copy.deepcopy(start).eval()
    policy.load_state_dict({**policy.state_dict(), **snapshots[0]})
    sequences: list[Sequence_] = []
    entropies: list[torch.Tensor] = []
    for group, completion in [(g, c) for g in rollouts[0] for c in g.completions]:
        ids = torch.tensor([group.prompt_ids + completion.token_ids])
        rows, target = slice(len(group.prompt_ids) - 1, -1), ids[0, len(group.prompt_ids) :, None]
        temperature = trainer.args.temperature
        full = [(m(ids).logits[0, rows] / temperature).log_softmax(-1) for m in (policy, start, reference)]
        new, old, ref = (x.gather(-1, target)[:, 0] for x in full)
        sequences.append((group, completion, new, old.detach(), ref.detach()))
        entropies.append(-(full[0].exp() * full[0]).sum(-1))
    reference_loss(sequences, entropies, trainer.args).backward()
    for parameter_name, parameter in policy.named_parameters():
        step = (snapshots[0][parameter_name] - snapshots[1][parameter_name]) / 0.3
        if parameter_name == "lm_head.weight" and head == "frozen":
            assert not step.any()
            continue
        assert parameter.grad is not None
        scale = float(parameter.grad.abs().max()) + 1e-3
        # fp32: the step is a difference of weights, which rounds at 1e-7 of a weight.
        torch.testing.assert_close(step, parameter.grad, rtol=0, atol=2e-3 * scale, msg=parameter_name)


ALGORITHM_NAMES = (
    "grpo", "bnpo", "dr_grpo", "dapo", "gspo", "gspo_token", "luspo", "cispo", "sapo", "vespo", "rloo",
    "reinforce_pp",
    "reinforce_pp_baseline", "maxrl",
)  # fmt: skip


@pytest.mark.parametrize("name", ALGORITHM_NAMES)
def test_every_algorithm_is_independent_of_the_split(tmp_path: Path, name: str) -> None:
    changes: dict[str, Any] = {"optim": "sgd", "algorithm": name, "max_steps": 2, "num_iterations": 2}
    whole = grpo(tmp_path / "a", **changes)
    whole.train()
    parts = grpo(
        tmp_path / "b", **changes, gradient_accumulation_steps=4, per_device_train_batch_size=3, token_budget=30
    )
    parts.train()
    before = dict(tiny.model().named_parameters())
    assert any(not torch.equal(before[k].detach(), v) for k, v in weights(whole).items()), "it moved"
    assert_same(weights(whole), weights(parts), 3e-6)


@pytest.mark.parametrize("changes", [{"top_entropy_quantile": 0.4}, {"entropy_coef": 0.1}, {"kl_in": "reward"}])
def test_terms_of_tokens_are_independent_of_the_split(tmp_path: Path, changes: dict[str, Any]) -> None:
    shared: dict[str, Any] = {"optim": "sgd", "max_steps": 2, "beta": 0.1, **changes}
    whole = grpo(tmp_path / "a", **shared)
    whole.train()
    parts = grpo(tmp_path / "b", **shared, token_budget=30)
    parts.train()
    assert_same(weights(whole), weights(parts), 3e-6)


def test_rloo_trainer_is_the_row_rloo(tmp_path: Path) -> None:
    shared = settings(tmp_path, per_device_train_batch_size=12, num_generations=4, max_completion_length=8, optim="sgd")
    one = RLOOTrainer(tiny.model(), digits, RLOOConfig(**shared), PROMPTS, processing_class=tiny.tokenizer())
    two = grpo(tmp_path / "b", algorithm="rloo", optim="sgd")
    for trainer in (one, two):
        trainer.train()
    assert_same(weights(one), weights(two), 0.0)


def only_even(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """Half of the prompts carry no signal, whatever is sampled."""
    return [float(text.count("1")) if int(a) % 2 == 0 else 0.5 for text, a in zip(completions, answer, strict=True)]


def test_dynamic_sampling_fills_the_batch_and_counts_what_it_took(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, rewards=only_even, algorithm="dapo", max_steps=3, overlong_buffer=None, temperature=1.5)
    steps = recorded(trainer)
    sizes: list[float] = []
    stage: Any = trainer.stage
    original = stage.next_step
    stage.next_step = lambda *a: ((step := original(*a)) and sizes.append(step.count)) or step
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [len(step) for step in steps] == [3, 3, 3]
    assert sum(log["sampling/extra_completions"] for log in logs) > 0
    for step, size in zip(steps, sizes, strict=True):
        assert all(len({c.score.total for c in g.completions if c.score}) > 1 for g in step)
        assert size == sum(len(c.token_ids) for g in step for c in g.completions)


def test_without_dynamic_sampling_the_same_task_wastes_groups(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, rewards=only_even, loss_type="dapo", max_steps=3, temperature=1.5)
    steps = recorded(trainer)
    trainer.train()
    flat = [len({c.score.total for c in g.completions if c.score}) == 1 for step in steps for g in step]
    assert any(flat)


def test_refills_draw_new_samples_of_a_prompt_that_comes_again(tmp_path: Path) -> None:
    """With 6 prompts and refills a prompt repeats within a batch; its samples must not."""
    args = GRPOConfig(
        **settings(tmp_path, learning_rate=0.0),
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=8,
        dynamic_sampling=True,
        temperature=1.5,
    )
    trainer = GRPOTrainer(tiny.model(), only_even, args, PROMPTS[:6], processing_class=tiny.tokenizer())
    steps = recorded(trainer)
    trainer.train()
    for step in steps:
        by_prompt: dict[int, list[Any]] = {}
        for group in step:
            by_prompt.setdefault(group.index, []).append([c.token_ids for c in group.completions])
        assert all(len(seen) == 1 or seen[0] != seen[1] for seen in by_prompt.values())


def test_replay_trains_on_remembered_groups(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, rewards=only_even, replay_size=8, max_steps=6, temperature=1.5)
    steps = recorded(trainer)
    trainer.train()
    again = [g for step in steps for g in step if any(c.policy_logprobs is None for c in g.completions)]
    assert again
    assert all("old_logprobs" in c.token for g in again for c in g.completions)
    assert sum(log.get("sampling/replayed_groups", 0) for log in trainer.state.log_history) == len(again)


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "dapo"},
        {"replay_size": 4},
        {"prompt_sampling": "curriculum", "curriculum_target": 0.05},
        {"algorithm": "rloo", "kl_target": 0.01, "kl_horizon": 10},
        {"use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef_delta": 0.1},
    ],
)
def test_resumed_is_uninterrupted(tmp_path: Path, changes: dict[str, Any]) -> None:
    def made() -> GRPOTrainer:
        args = GRPOConfig(
            **settings(tmp_path, max_steps=5, save_strategy="steps", save_steps=3, learning_rate=1e-3),
            per_device_train_batch_size=12, num_generations=4, max_completion_length=8, temperature=1.5, **changes,
        )  # fmt: skip
        rows = [{**row, "difficulty": i} for i, row in enumerate(PROMPTS)]
        return GRPOTrainer(tiny.model(), only_even, args, rows, processing_class=tiny.tokenizer())

    whole = made()
    whole.train()
    resumed = made()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(weights(whole), weights(resumed), 0.0)
    names = ("kl_coef", "entropy_coef", "curriculum/level", "sampling/rounds", "reward")
    last = [{n: t.state.log_history[-2].get(n) for n in names} for t in (whole, resumed)]
    assert last[0] == last[1]


def test_an_adaptive_coefficient_follows_the_divergence(tmp_path: Path) -> None:
    far = grpo(tmp_path / "a", ref_model=tiny.model(seed=5), algorithm="rloo", kl_target=1e-3, kl_horizon=24)
    far.train()
    logged = [log["kl_coef"] for log in far.state.log_history if "kl_coef" in log]
    # A divergence far above the target: 12 completions of a horizon of 24 raise beta by half of 20%.
    assert logged == pytest.approx([0.05, 0.05 * 1.1, 0.05 * 1.21])


ADAPTIVE = {"use_adaptive_entropy": True, "entropy_coef_delta": 0.02}


@pytest.mark.parametrize(
    ("target", "bounds", "expected"),
    [
        # The entropy of 64 tokens at random is about 4 nats: far below a target of 9, far above one of 0.01.
        (9.0, {}, [0.07, 0.09, 0.11]),
        (9.0, {"entropy_coef_max": 0.08}, [0.07, 0.08, 0.08]),
        (0.01, {"entropy_coef_min": 0.02}, [0.03, 0.02, 0.02]),
    ],
)
def test_an_adaptive_entropy_bonus_moves_towards_its_target(
    tmp_path: Path, target: float, bounds: dict[str, float], expected: list[float]
) -> None:
    trainer = grpo(tmp_path, entropy_coef=0.05, entropy_target=target, **ADAPTIVE, **bounds)
    trainer.train()
    logged = [log["entropy_coef"] for log in trainer.state.log_history if "entropy_coef" in log]
    assert logged == pytest.approx(expected)


def test_an_adaptive_entropy_bonus_is_that_of_the_step_before(tmp_path: Path) -> None:
    """None in the first step; then the adapted weight where the entropy was low, and none where it was high."""
    shared: dict[str, Any] = {"optim": "sgd", "lr_scheduler_type": "constant", "loss_type": "grpo"}

    def after(name: str, steps: int, **changes: Any) -> dict[str, torch.Tensor]:
        trainer = grpo(tmp_path / name, max_steps=steps, **shared, **changes)
        trainer.train()
        return weights(trainer)

    low = {"entropy_coef": 0.3, "entropy_target": 9.0, **ADAPTIVE}
    high = {"entropy_coef": 0.3, "entropy_target": 0.01, **ADAPTIVE}
    plain = {steps: after(f"plain-{steps}", steps) for steps in (1, 2)}
    assert_same(after("first", 1, **low), plain[1], 3e-7)
    assert_same(after("high", 2, **high), plain[2], 3e-7)
    second = after("low", 2, **low)
    # From the same weights, a second step with the weight 0.3 + 0.02.
    resumed = grpo(tmp_path / "fixed", max_steps=2, save_strategy="steps", save_steps=1, **shared)
    resumed.train()
    fixed = grpo(tmp_path / "fixed", max_steps=2, entropy_coef=0.32, **shared)
    fixed.train(resume_from_checkpoint=str(tmp_path / "fixed" / "checkpoint-1"))
    assert_same(second, weights(fixed), 3e-7)
    with pytest.raises(AssertionError):
        assert_same(second, plain[2], 3e-7)


def test_an_evaluation_leaves_an_adaptive_entropy_bonus_alone(tmp_path: Path) -> None:
    runs = []
    for name, more in (("a", {}), ("b", {"eval_strategy": "steps", "eval_steps": 1})):
        trainer = grpo(tmp_path / name, eval_dataset=PROMPTS[:3], entropy_target=9.0, **ADAPTIVE, **more)
        trainer.train()
        runs.append((weights(trainer), trainer.stage.algorithm.entropy_bonus.state_dict()))
    assert_same(runs[0][0], runs[1][0], 0.0)
    assert runs[0][1] == runs[1][1]


def test_token_corrections_are_part_of_vespo_s_weight(tmp_path: Path) -> None:
    """Weights of 2 and 1/2 in one sequence cancel in its product, so that the update is the uncorrected one."""
    shared: dict[str, Any] = {"algorithm": "vespo", "optim": "sgd", "max_steps": 1, "lr_scheduler_type": "constant"}
    plain = grpo(tmp_path / "a", **shared)
    correction = {"sampling_correction": "token_truncate", "sampling_correction_max": 3.0}
    corrected = grpo(tmp_path / "b", **shared, **correction)
    corrected.stage.algorithm._correction = alternating  # type: ignore[method-assign]
    other = grpo(tmp_path / "c", **shared, **correction)
    other.stage.algorithm._correction = lambda batch, old_N: torch.full_like(old_N, 1.1)  # type: ignore[method-assign]
    for trainer in (plain, corrected, other):
        trainer.train()
    assert_same(weights(plain), weights(corrected), 3e-7)
    with pytest.raises(AssertionError):
        assert_same(weights(plain), weights(other), 3e-7)


def alternating(batch: Any, old_N: torch.Tensor) -> torch.Tensor:
    """Weights of 2 and 1/2 in turn, and 1 for the last token of a sequence of odd length."""
    made = torch.ones_like(old_N)
    for sequence in range(batch.num_sequences):
        places = (batch.sequence_index == sequence).nonzero()[:, 0]
        even = len(places) // 2 * 2
        made[places[0:even:2]], made[places[1:even:2]] = 2.0, 0.5
    return made


def test_a_rollout_is_penalised_with_the_coefficient_before_its_own_divergence(tmp_path: Path) -> None:
    """What a batch does to the coefficient is for the next batch, as in 1909.08593."""
    changes: dict[str, Any] = {"algorithm": "rloo", "beta": 0.5, "optim": "sgd", "max_steps": 1}
    steps: list[dict[str, torch.Tensor]] = []
    for name, own in (("fixed", {}), ("moves", {"kl_target": 1e-3, "kl_horizon": 24})):
        trainer = grpo(tmp_path / name, ref_model=tiny.model(seed=5), **changes, **own)
        trainer.train()
        steps.append(weights(trainer))
    assert_same(*steps, 0.0)


class Silent(Elsewhere):
    """An engine that leaves out log-probabilities."""

    def __init__(self, engine: Any, *missing: str) -> None:
        super().__init__(engine)
        self.missing = missing

    def generate(self, requests: Sequence[Request], *, seed: int, step: int) -> list[list[Completion]]:
        found = super().generate(requests, seed=seed, step=step)
        for completion in (c for row in found for c in row):
            for name in self.missing:
                setattr(completion, name, None)
        return found


def test_an_engine_without_log_probabilities_says_that_nothing_is_checked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = grpo(tmp_path, max_steps=2)
    trainer.stage.sampler.engine = Silent(trainer.stage.sampler.engine, "policy_logprobs")
    trainer.train()
    assert sum("Silent returns no policy_logprobs" in message for message in caplog.messages) == 1


def test_a_correction_needs_what_the_sampler_said(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, sampling_correction="token_truncate")
    trainer.stage.sampler.engine = Silent(trainer.stage.sampler.engine, "sampler_logprobs")
    before = weights(trainer)
    with pytest.raises(ConfigError, match="Silent returns no sampler_logprobs"):
        trainer.train()
    assert_same(before, weights(trainer), 0.0)


def test_overlong_completions_lose_reward_after_the_filter(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, overlong_buffer=4, overlong_penalty=2.0, max_steps=1)
    steps = recorded(trainer)
    trainer.train()
    for completion in (c for g in steps[0] for c in g.completions):
        assert completion.score is not None
        expected = -2.0 * min(1, max(0, (len(completion.token_ids) - 4) / 4))
        assert completion.score.criteria["overlong"] == pytest.approx(expected)
        assert completion.score.total == pytest.approx((completion.score.criteria["digits"] or 0) + expected)
    assert "rewards/overlong/mean" in trainer.state.log_history[0]


def test_records_become_advantages_by_hand() -> None:
    table = [[Record(3.0, 2, [3.0], [0.5, 0.25]), Record(1.0, 1, [1.0], [-0.25]), Record(None, 1, [None], [9.0])]]
    changes: dict[str, Any] = {"weights": [1.0], "scale": "none", "by_criterion": False}
    assert estimate(table, "leave_one_out", **changes) == [[1.0, -1.0, 0.0]]
    # Tokens get what follows them: 3 - 0.75, 3 - 0.25, 1 + 0.25, whitened.
    (first, second, failed), *_ = cast("list[list[list[float]]]", estimate(table, "batch", **changes))
    assert (first[1] - first[0]) / (first[0] - second[0]) == pytest.approx(0.5)
    assert sum(first + second) == pytest.approx(0.0)
    assert failed == [0.0]


def test_rloo_s_advantages_by_hand(tmp_path: Path) -> None:
    """Clipped rewards, less beta times the log-ratio to the reference, less the mean of the others."""
    trainer = grpo(
        tmp_path, algorithm="rloo", beta=0.5, ref_model=tiny.model(seed=5), reward_clip_range=[0.1, 0.3], max_steps=1
    )
    steps = recorded(trainer)
    trainer.train()
    for group in steps[0]:
        values = []
        for c in group.completions:
            assert c.score is not None
            assert c.score.total is not None
            assert c.policy_logprobs is not None
            kl = sum(a - b for a, b in zip(c.policy_logprobs, c.token["ref_logprobs"], strict=True))
            values.append(min(max(c.score.total, 0.1), 0.3) - 0.5 * kl)
        for c, value in zip(group.completions, values, strict=True):
            others = (sum(values) - value) / (len(values) - 1)
            assert c.sequence["advantages"] == pytest.approx(value - others, abs=1e-9)


def test_criteria_are_normalised_as_they_count(tmp_path: Path) -> None:
    """With normalize_then_sum: values behind their gates, weights of the step."""

    def places(completions: list[str], **columns: Any) -> list[float]:
        return [float(i) for i in range(len(completions))]

    def odd(completions: list[str], **columns: Any) -> list[float]:
        return [float(i % 2) for i in range(len(completions))]

    rubric = Rubric([
        Criterion("places", places, per_group=True, requires=["odd"], schedule=[(0, 1), (1, 0)]),
        Criterion("odd", odd, 0.5, per_group=True),
    ])  # fmt: skip
    trainer = grpo(
        tmp_path, rewards=rubric, multi_objective_aggregation="normalize_then_sum", scale_rewards="none", max_steps=2
    )
    steps = recorded(trainer)
    trainer.train()
    for step, factor in zip(steps, (1.0, 0.5), strict=True):
        sizes = [range(len(group.completions)) for group in step]
        criteria = [
            [[float(i if i % 2 else 0) for i in own] for own in sizes],
            [[float(i % 2) for i in own] for own in sizes],
        ]
        totals = [[factor * a + 0.5 * b for a, b in zip(*rows, strict=True)] for rows in zip(*criteria, strict=True)]
        expected = per_criterion_advantages(criteria, [factor, 0.5], totals)
        for group, values in zip(step, expected, strict=True):
            assert [c.sequence["advantages"] for c in group.completions] == pytest.approx(values)


@pytest.mark.parametrize(("scale", "same"), [(True, "group"), (False, "none")])
def test_trl_s_booleans_of_scale_rewards(tmp_path: Path, scale: bool, same: str) -> None:
    table = [[Record(r, 1, [r], None) for r in (1.0, 0.0, 0.0)], [Record(r, 1, [r], None) for r in (5.0, 1.0, 0.0)]]
    rows = [grpo(tmp_path, scale_rewards=value).stage.algorithm.estimate(table) for value in (scale, same)]
    assert rows[0] == rows[1]
    assert rows[0] != grpo(tmp_path, scale_rewards="batch").stage.algorithm.estimate(table)


class Tightlipped:
    """An engine that samples as the trainer's own, and says nothing of the policy's log-probabilities."""

    def __init__(self, engine: Any) -> None:
        self.own = engine

    def generate(self, requests: Sequence[Request], *, seed: int, step: int) -> list[list[Completion]]:
        made = self.own.generate(requests, seed=seed, step=step)
        for completion in (c for row in made for c in row):
            completion.policy_logprobs = None
        return made

    def sync(self, version: int) -> None: ...

    def close(self) -> None: ...


def test_the_divergence_in_the_reward_does_not_depend_on_what_an_engine_tells(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"algorithm": "rloo", "beta": 0.5, "ref_model": tiny.model(seed=7), "optim": "sgd"}
    told, silent = (grpo(tmp_path / name, **changes) for name in ("a", "b"))
    silent.stage.sampler.engine = Tightlipped(silent.stage.sampler.engine)
    for trainer in (told, silent):
        trainer.train()
    kl = [[log["kl"] for log in t.state.log_history if "kl" in log] for t in (told, silent)]
    assert kl[0] == pytest.approx(kl[1], abs=1e-5)
    assert abs(kl[0][0]) > 0.01
    # The rewards differ by rounding of the two ways to compute a log-probability.
    assert_same(weights(told), weights(silent), 1e-5)


class Stale:
    """An engine that samples from a copy of the weights which is renewed every `every` syncs."""

    def __init__(self, trainer: Any, every: int) -> None:
        self.own, self.every, self.count = trainer.stage.sampler.engine, every, 0
        self.trainer, self.weights = trainer, weights(trainer)

    def generate(self, requests: Sequence[Request], *, seed: int, step: int) -> list[list[Completion]]:
        current = weights(self.trainer)
        self.trainer.model.load_state_dict({**self.trainer.model.state_dict(), **self.weights})
        made = self.own.generate(requests, seed=seed, step=step)
        self.trainer.model.load_state_dict({**self.trainer.model.state_dict(), **current})
        return made

    def sync(self, version: int) -> None:
        if self.count % self.every == 0:
            self.weights = weights(self.trainer)
        self.count += 1

    def close(self) -> None: ...


@pytest.mark.parametrize("apart", ["temperature", "stale"])
def test_a_sampler_apart_is_caught_and_corrected(tmp_path: Path, apart: str) -> None:
    def made(folder: Path, **changes: Any) -> GRPOTrainer:
        trainer = grpo(folder, max_steps=30, lr_scheduler_type="constant", eval_dataset=PROMPTS[:8], **changes)
        other = Elsewhere(trainer.stage.sampler.engine, 1.3) if apart == "temperature" else Stale(trainer, 4)
        trainer.stage.sampler.engine = other  # type: ignore[assignment]
        return trainer

    with pytest.raises(CheckFailed, match="sampler and trainer mismatch"):
        made(tmp_path / "a").train()
    trainer = made(tmp_path / "b", sampling_correction="token_truncate")
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    assert trainer.evaluate()["eval_reward"] > 2 * before
    logs = [log for log in trainer.state.log_history if "sampling/kl" in log]
    assert max(log["sampling/kl"] for log in logs) > 1e-6
    assert all(math.isfinite(log["sampling/correction/mean"]) for log in logs)


@pytest.fixture
def own_row() -> Iterator[str]:
    """Name a row, and remove it from the tables of the process at the end: other tests compare them with the docs."""
    yield "ranked"
    for table in (ALGORITHMS, ADVANTAGES, POLICY_LOSSES):
        table.pop("ranked", None)
    for names in (ADVANTAGE_NAMES, LOSS_NAMES):
        names._added.remove("ranked")


@pytest.mark.usefixtures("own_row")
def test_a_row_of_ones_own_in_ten_lines(tmp_path: Path) -> None:
    """What the docs show: an advantage and a loss from outside the package."""
    register(
        "ranked",
        "ranks instead of rewards, squared surrogate",
        advantage=lambda rewards: [[sorted(row).index(r) - (len(row) - 1) / 2 for r in row] for row in rewards.totals],
        loss=lambda terms, options: -terms.advantages * terms.log_ratio.exp() + terms.log_ratio**2,
        reduction="sequence",
        learning_rate=5e-3,
    )
    trainer = grpo(tmp_path, algorithm="ranked", max_steps=50, learning_rate=1e-2, eval_dataset=PROMPTS[:8])
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    assert trainer.evaluate()["eval_reward"] > 1.5 * before
    assert GRPOConfig(**settings(tmp_path) | {"learning_rate": 1.0}, algorithm="ranked").learning_rate == 1.0
    with pytest.raises(ConfigError, match="the table has it already"):
        register("ranked", "again")
    with pytest.raises(ConfigError, match="not a field of GRPOConfig"):
        register("other", "typo", epsilon_hihg=0.2)


def test_a_loss_that_reduces_is_refused(tmp_path: Path) -> None:
    register("reduced", "wrong", loss=lambda terms, options: (-terms.advantages * terms.log_ratio.exp()).sum())
    with pytest.raises(CheckFailed, match="one loss per token"):
        grpo(tmp_path, algorithm="reduced").train()


def test_metrics_of_ones_own_in_evaluation(tmp_path: Path) -> None:
    def longest(groups: Sequence[Group]) -> dict[str, float]:
        assert all(len(g.completions) == 4 for g in groups)
        return {"longest": max(len(c.token_ids) for g in groups for c in g.completions)}

    args = GRPOConfig(**settings(tmp_path), per_device_train_batch_size=12, num_generations=4, max_completion_length=8)
    trainer = GRPOTrainer(
        tiny.model(), digits, args, PROMPTS, PROMPTS[:3], processing_class=tiny.tokenizer(), compute_metrics=longest
    )
    assert trainer.evaluate()["eval_longest"] == 8.0


def test_num_tokens_are_those_sampled_however_often_they_are_trained_on(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, num_iterations=2, max_steps=4)
    steps = recorded(trainer)
    trainer.train()
    first, second = (sum(group.num_tokens for group in steps[i]) for i in (0, 2))
    logged = [log["num_tokens"] for log in trainer.state.log_history if "loss" in log]
    assert logged == [first, first, first + second, first + second]


def test_a_group_without_spread_keeps_its_entropy_bonus(tmp_path: Path) -> None:
    """No advantage, yet a gradient: it must not be dropped before the forward."""
    trainer = grpo(tmp_path, rewards=lambda completions, **_: [1.0] * len(completions), entropy_coef=0.1, max_steps=1)
    before = weights(trainer)
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in weights(trainer).items())


@pytest.mark.parametrize(("steps", "expected"), [(1, []), (2, [("old_logprobs", 3)])])
def test_fresh_samples_cost_no_forward_of_their_own(tmp_path: Path, steps: int, expected: list[Any]) -> None:
    """One step a rollout and beta = 0: nothing is scored but in the loss. Two steps: only the second one's groups."""
    trainer = grpo(tmp_path, max_steps=2, steps_per_generation=steps)
    filled: list[tuple[str, int]] = []
    stage: Any = trainer.stage
    original = stage._fill
    stage._fill = lambda name, g, m: filled.append((name, len(g))) or original(name, g, m)
    trainer.train()
    assert [(name, number) for name, number in filled if number] == expected


def test_rounds_of_sampling_within_one_step_are_sampled_together(tmp_path: Path) -> None:
    """Two rounds between two updates come from the same weights: they are one rollout."""
    batch: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 2}
    parts, whole = grpo(tmp_path / "a", steps_per_generation=2, **batch), grpo(tmp_path / "b", **batch)
    steps = recorded(parts)
    parts.train()
    whole.train()
    assert [sum(len(group.completions) for group in step) for step in steps] == [16, 16]
    assert parts.stage._rollouts == 2
    assert_same(weights(parts), weights(whole), 0.0)


@pytest.mark.parametrize("split", [{}, {"token_budget": 64}, {"gradient_accumulation_steps": 2}])
def test_the_policy_loss_is_logged_without_entropy_bonus_and_divergence(tmp_path: Path, split: dict[str, int]) -> None:
    """At ratio 1 a token's loss is minus its advantage; the logged loss has the other two terms as well."""
    size = 12 // split.get("gradient_accumulation_steps", 1)
    trainer = grpo(
        tmp_path, max_steps=1, loss_type="dapo", entropy_coef=0.1, beta=0.2, ref_model=tiny.model(seed=3),
        per_device_train_batch_size=size, **split,
    )  # fmt: skip
    steps = recorded(trainer)
    trainer.train()
    completions = [c for group in steps[0] for c in group.completions]
    tokens = sum(len(c.token_ids) for c in completions)
    log = trainer.state.log_history[0]
    by_hand = -sum(c.sequence["advantages"] * len(c.token_ids) for c in completions) / tokens
    assert abs(by_hand) > 1e-3
    assert log["policy_loss"] == pytest.approx(by_hand, rel=1e-5)  # fp32
    assert log["loss"] == pytest.approx(by_hand + 0.2 * log["kl"] - 0.1 * log["entropy"], rel=1e-4)


def test_the_logged_policy_loss_survives_a_checkpoint_between_logs(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"max_steps": 4, "logging_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = grpo(tmp_path, loss_type="dapo", entropy_coef=0.1, **changes)
    whole.train()
    resumed = grpo(tmp_path, loss_type="dapo", entropy_coef=0.1, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert whole.state.log_history[0]["policy_loss"] == resumed.state.log_history[0]["policy_loss"]
