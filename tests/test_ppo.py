"""PPO: the loss against a script of its own, whatever the split; critics of both kinds; resume; rewards by a model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, TrainerCallback

import tiny
from burnish import ConfigError, PPOConfig, PPOTrainer
from burnish.model.classifier import to_reward_model
from test_trainers import PROMPTS, assert_same, digits, recorded, settings, weights

Weights = dict[str, torch.Tensor]


def ppo(folder: Path, model: Any = None, **changes: Any) -> PPOTrainer:
    named = ("peft_config", "ref_model", "eval_dataset", "value_model", "reward_model", "value_peft_config")
    keywords = {name: changes.pop(name) for name in named if name in changes}
    if "reward_model" not in keywords:
        keywords["reward_funcs"] = changes.pop("reward_funcs", digits)
    defaults = {"per_device_train_batch_size": 12, "max_completion_length": 8, "num_iterations": 1}
    return PPOTrainer(
        PPOConfig(**settings(folder, **{**defaults, **changes})),
        tiny.tokenizer(),
        tiny.model() if model is None else model,
        train_dataset=PROMPTS,
        **keywords,
    )


def critic_weights(trainer: PPOTrainer) -> Weights:
    return {name: p.detach().clone() for name, p in trainer.stage.algorithm.critic.model.named_parameters()}


def plain_logprobs(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


def plain_values(critic: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    decoder = critic.base_model
    hidden = decoder(torch.tensor([prompt + completion])).last_hidden_state[0, len(prompt) - 1 : -1]
    return critic.score(hidden.to(critic.score.weight.dtype))[:, 0]


def script_of_one_rollout(trainer: PPOTrainer, start: Any, critic: Any, reference: Any, groups: list[Any]) -> Any:
    """Advantages and returns by loops, in float64; returns (records, advantage of each token)."""
    args = trainer.args
    records: list[dict[str, Any]] = []
    for group in groups:
        for completion in group.completions:
            ids = (group.prompt_ids, completion.token_ids)
            with torch.no_grad():
                old, ref = plain_logprobs(start, *ids), plain_logprobs(reference, *ids)
                values = plain_values(critic, *ids).tolist()
            rewards = [-args.beta * float(a - b) for a, b in zip(old, ref, strict=True)]
            rewards[-1] += completion.score.total
            advantages, following, after = [0.0] * len(rewards), 0.0, 0.0
            for t in reversed(range(len(rewards))):
                delta = rewards[t] + args.gamma * after - values[t]
                following = delta + args.gamma * args.lam * following
                advantages[t], after = following, values[t]
            returns = [a + v for a, v in zip(advantages, values, strict=True)]
            records.append({"ids": ids, "old": old, "values": values, "advantages": advantages, "returns": returns})
    flat = torch.tensor([a for r in records for a in r["advantages"]], dtype=torch.float64)
    whitened = (flat - flat.mean()) / (flat.var() + 1e-8).sqrt()
    return records, whitened.split([len(r["advantages"]) for r in records])


def test_both_losses_by_an_independent_float64_script(tmp_path: Path) -> None:
    """Two passes over one rollout: the second gradients of policy and critic have ratios and clips that act."""
    trainer = ppo(
        tmp_path, tiny.model(dtype=torch.float64), ref_model=tiny.model(seed=3, dtype=torch.float64), optim="sgd",
        max_grad_norm=0.0, max_steps=2, num_iterations=2, learning_rate=0.2, value_learning_rate=0.5, gamma=0.9,
        lam=0.8, lr_scheduler_type="constant", epsilon=0.1, cliprange_value=0.05, beta=0.2, vf_coef=0.3,
        weight_decay=0.0,
    )  # fmt: skip
    start, critic = copy.deepcopy(trainer.model), copy.deepcopy(trainer.stage.algorithm.critic.model)
    snapshots: list[tuple[Weights, Weights]] = []
    rollouts = recorded(trainer)

    class Snapshot(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            snapshots.append((weights(trainer), critic_weights(trainer)))

    trainer.add_callback(Snapshot())
    trainer.train()
    reference = tiny.model(seed=3, dtype=torch.float64)
    records, advantages = script_of_one_rollout(trainer, start, critic, reference, rollouts[0])
    policy, second = copy.deepcopy(start).eval(), copy.deepcopy(critic).eval()
    policy.load_state_dict({**policy.state_dict(), **snapshots[0][0]})
    second.load_state_dict({**second.state_dict(), **snapshots[0][1]})
    losses, value_losses = [], []
    for record, own in zip(records, advantages, strict=True):
        ratio = (plain_logprobs(policy, *record["ids"]) - record["old"]).exp()
        losses.append(-torch.minimum(ratio * own, ratio.clamp(0.9, 1.1) * own))
        values, old = plain_values(second, *record["ids"]), torch.tensor(record["values"], dtype=torch.float64)
        returns = torch.tensor(record["returns"], dtype=torch.float64)
        near = torch.maximum(torch.minimum(values, old + 0.05), old - 0.05)
        value_losses.append(0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2))
    torch.cat(losses).mean().backward()
    (0.3 * torch.cat(value_losses).mean()).backward()
    for rate, module, place in ((0.2, policy, 0), (0.5, second, 1)):
        for name, parameter in module.named_parameters():
            step = (snapshots[0][place][name] - snapshots[1][place][name]) / rate
            assert parameter.grad is not None, name
            # RMS norms and the recorded log-probabilities are fp32 whatever the dtype, and whitened terms cancel.
            scale = float(parameter.grad.abs().max()) + 5e-3
            torch.testing.assert_close(step, parameter.grad, rtol=0, atol=1e-4 * scale, msg=f"{place} {name}")


@pytest.mark.parametrize("adapters", [False, True])
def test_the_split_changes_nothing(tmp_path: Path, adapters: bool) -> None:
    lora = {"peft_config": LoraConfig(r=4, task_type="CAUSAL_LM")} if adapters else {}
    changes: dict[str, Any] = {"optim": "sgd", "max_steps": 2, "num_iterations": 2, **lora}
    whole = ppo(tmp_path / "a", **changes)
    whole.train()
    parts = ppo(
        tmp_path / "b", **changes, gradient_accumulation_steps=4, per_device_train_batch_size=3, token_budget=30
    )
    parts.train()
    assert_same(weights(whole), weights(parts), 3e-6)
    assert_same(critic_weights(whole), critic_weights(parts), 3e-6)


def test_ppo_learns(tmp_path: Path) -> None:
    trainer = ppo(
        tmp_path, per_device_train_batch_size=24, max_steps=40, lr_scheduler_type="constant", learning_rate=5e-3,
        eval_dataset=PROMPTS[:8], num_generations_eval=4,
    )  # fmt: skip
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    assert trainer.evaluate()["eval_reward"] > 2 * before


def test_the_critic_learns_first(tmp_path: Path) -> None:
    trainer = ppo(tmp_path, value_prefit_steps=2, max_steps=2)
    policy, critic = weights(trainer), critic_weights(trainer)
    trainer.train()
    assert_same(policy, weights(trainer), 0.0)
    assert any(not torch.equal(critic[name], value) for name, value in critic_weights(trainer).items())
    trainer = ppo(tmp_path, value_prefit_steps=2, max_steps=3)
    trainer.train()
    assert any(not torch.equal(policy[name], value) for name, value in weights(trainer).items())


def test_with_adapters_the_critic_shares_the_frozen_base(tmp_path: Path) -> None:
    trainer = ppo(tmp_path, peft_config=LoraConfig(r=4, task_type="CAUSAL_LM"), save_strategy="no")
    base = {n: p for n, p in trainer.model.named_parameters() if not p.requires_grad}
    start = {name: p.detach().clone() for name, p in base.items()}
    own = {id(p) for p in trainer.model.parameters()}
    extra = sum(p.numel() for p in trainer.stage.algorithm.critic.model.parameters() if id(p) not in own)
    assert 0 < extra < 0.2 * sum(p.numel() for p in base.values())
    trainer.train()
    for name, value in start.items():
        assert torch.equal(base[name], value), name
    trainer.save_model()
    assert (tmp_path / "adapter_config.json").is_file()
    assert (tmp_path / "value_model" / "adapter_config.json").is_file()


@pytest.mark.parametrize("adapters", [False, True])
def test_resumed_is_uninterrupted(tmp_path: Path, adapters: bool) -> None:
    def made() -> PPOTrainer:
        lora = {"peft_config": LoraConfig(r=4, task_type="CAUSAL_LM")} if adapters else {}
        return ppo(
            tmp_path, max_steps=4, num_iterations=2, save_strategy="steps", save_steps=3, learning_rate=1e-3,
            value_prefit_steps=1, **lora,
        )  # fmt: skip

    whole = made()
    whole.train()
    resumed = made()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(weights(whole), weights(resumed), 0.0)
    assert_same(critic_weights(whole), critic_weights(resumed), 0.0)


def test_a_checkpoint_without_its_critic_is_refused(tmp_path: Path) -> None:
    trainer = ppo(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    (tmp_path / "checkpoint-1" / "critic.pt").unlink()
    with pytest.raises(ConfigError, match=r"critic\.pt is missing"):
        ppo(tmp_path, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_reward_model_rewards_and_starts_the_critic(tmp_path: Path) -> None:
    judge = to_reward_model(tiny.model(seed=4), seed=1)
    judge.config.pad_token_id = 0
    folder = tmp_path / "judge"
    judge.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    trainer = ppo(tmp_path / "run", reward_model=str(folder), value_model=str(folder), max_steps=2)
    trainer.train()
    assert "objective/rlhf_reward" in trainer.state.log_history[0]
    trainer.save_model()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "value_model", num_labels=1)
    named = dict(trainer.stage.algorithm.critic.model.named_parameters())
    torch.testing.assert_close(loaded.score.weight, named["score.weight"].detach())


def test_a_missing_end_costs_reward(tmp_path: Path) -> None:
    trainer = ppo(tmp_path, missing_eos_penalty=3.0, max_steps=1, beta=0.0, gamma=1.0, lam=1.0, whiten_advantages=False)
    steps = recorded(trainer)
    trainer.train()
    for completion in (c for g in steps[0] for c in g.completions):
        penalty = 3.0 if completion.stop_reason == "length" else 0.0
        # With gamma = lambda = 1 the return of every token is the reward.
        assert completion.token["returns"] == pytest.approx(
            [completion.score.total - penalty] * len(completion.token_ids)
        )


def test_failed_rewards_train_neither_policy_nor_critic(tmp_path: Path) -> None:
    def sometimes(completions: list[str], **columns: Any) -> list[float]:
        return [float("nan") if i % 3 == 0 else value for i, value in enumerate(digits(completions))]

    trainer = ppo(tmp_path, reward_funcs=sometimes, max_steps=1)
    trained: list[Any] = []
    stage: Any = trainer.stage
    original, update = stage.next_step, trainer.stage.algorithm.critic.update
    stage.next_step = lambda *a: ((step := original(*a)) and trained.extend(step.groups)) or step
    trainer.stage.algorithm.critic.update = lambda g, **k: trained.extend(g) or update(g, **k)  # type: ignore[method-assign]
    trainer.train()
    assert len(trained) == 2 * 8
    assert all(c.score.total is not None for g in trained for c in g.completions)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"reward_funcs": digits}, "model = None"),
        ({"model": "x"}, "neither given"),
        ({"model": "x", "reward_funcs": digits, "reward_model": "y"}, "both given"),
        ({"model": "x", "reward_funcs": digits, "data_collator": print}, "data_collator"),
    ],
)
def test_what_is_missing_is_named_before_anything_loads(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PPOTrainer(train_dataset=PROMPTS, **keywords)


def test_arguments_of_the_loader_are_for_models_given_by_name(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "policy")
    trainer = ppo(tmp_path, str(tmp_path / "policy"), model_init_kwargs={"attention_dropout": 0.0}, max_steps=1)
    for name, value in trainer.model.model.state_dict().items():
        assert torch.equal(trainer.stage.algorithm.critic.model.model.state_dict()[name], value), name
