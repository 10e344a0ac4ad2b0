"""Stages chain in memory: a trainer leaves nothing on a model but its weights, however it ended."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback, get_constant_schedule

import tiny
from burnish import (
    CheckFailed,
    ConfigError,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    ModelError,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from burnish.model.checkpointing import checkpointing_field
from burnish.model.dropout import disable_dropout
from burnish.model.masters import MasterWeights
from test_preference_trainer import LABELLED, PAIRS
from test_trainers import PROMPTS, TEXTS, assert_same, settings, weights

STAGES: dict[str, tuple[Any, Any, Any]] = {
    "sft": (SFTConfig, SFTTrainer, TEXTS),
    "dpo": (DPOConfig, DPOTrainer, PAIRS),
    "kto": (KTOConfig, KTOTrainer, LABELLED),
    "grpo": (GRPOConfig, GRPOTrainer, PROMPTS),
    "rloo": (RLOOConfig, RLOOTrainer, PROMPTS),
    "online_dpo": (OnlineDPOConfig, OnlineDPOTrainer, PROMPTS),
    "ppo": (PPOConfig, PPOTrainer, PROMPTS),
    "reward": (RewardConfig, RewardTrainer, PAIRS),
}
SAMPLES = ("grpo", "rloo", "online_dpo", "ppo")
LANGUAGE = [stage for stage in STAGES if stage != "reward"]
ONLINE = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}


def alternating(completions: list[str], **columns: Any) -> list[float]:
    """A reward with spread in every group, whatever the policy has become."""
    return [float(i % 2) for i in range(len(completions))]


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.5, **changes})


def made(
    stage: str, folder: Path, model: Any, *, callbacks: Any = None, peft_config: Any = None, **changes: Any
) -> Any:
    config, trainer, rows = STAGES[stage]
    rows = changes.pop("rows", rows)
    optimizers = {name: changes.pop(name) for name in ("optimizers", "value_model") if name in changes}
    options = {"per_device_train_batch_size": 4, "max_steps": 1, **(ONLINE if stage in SAMPLES else {})}
    args = config(**settings(folder, **{**options, **changes}))
    rewards = {"reward_funcs": alternating} if stage in SAMPLES else {}
    return trainer(
        model=model, args=args, train_dataset=rows, processing_class=tiny.tokenizer(), peft_config=peft_config,
        callbacks=callbacks, **rewards, **optimizers,
    )  # fmt: skip


class Dies(TrainerCallback):
    """Gradients are there, the optimizer has not stepped."""

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def sft_losses_and_weights(folder: Path, model: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    trainer = made("sft", folder, model, bf16=True, max_steps=3)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], weights(trainer)


def trail(model: torch.nn.Module) -> dict[str, Any]:
    """What of a model could make another trainer of it behave differently."""
    return {
        "dropout": [(n, m.p) for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout)],
        "attention": [m.attention_dropout for m in model.modules() if hasattr(m, "attention_dropout")],
        "trains": [n for n, p in model.named_parameters() if p.requires_grad],
        "gradients": [n for n, p in model.named_parameters() if p.grad is not None],
        "hooks": [n for n, p in model.named_parameters() if getattr(p, "_post_accumulate_grad_hooks", None)],
        "checkpointing": [n for n, m in model.named_modules() if getattr(m, "gradient_checkpointing", False)],
    }


@pytest.mark.parametrize("adapters", [False, True])
def test_trainers_that_die_leave_the_model_as_it_was(tmp_path: Path, adapters: bool) -> None:
    """One model survives a death in every stage; the losses and weights of SFT, with dropout, are a fresh model's."""
    changes: dict[str, Any] = {"bf16": True, checkpointing_field(SFTConfig): True}

    def fresh() -> Any:
        if not adapters:
            return tiny.model("gpt2", dtype=torch.bfloat16, resid_pdrop=0.3, embd_pdrop=0.3, pad_token_id=0)
        model = tiny.model(dtype=torch.bfloat16)
        torch.manual_seed(0)
        return get_peft_model(model, lora(), autocast_adapter_dtype=False)

    model = fresh()
    before, configuration = trail(model), model.config.to_dict()
    for stage in LANGUAGE if adapters else STAGES:
        trainer = made(stage, tmp_path, model, callbacks=[Dies()], **changes)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert trail(model) == before, stage
    assert model.config.to_dict() == {**configuration, "use_cache": False}, "transformers' Trainer sets use_cache"
    survivor, other = (sft_losses_and_weights(tmp_path, one) for one in (model, fresh()))
    assert survivor[0] == other[0]
    assert_same(survivor[1], other[1], 0.0)


def check_chain(folder: Path, stages: list[str], *, adapters: bool, bf16: bool) -> None:
    """Train one model by one stage after another; every training must move it."""
    model, peft_config = tiny.model(dtype=torch.bfloat16 if bf16 else torch.float32), lora() if adapters else None
    before = None
    for stage in stages:
        trainer = made(stage, folder, model, peft_config=peft_config, bf16=bf16, optim="sgd", learning_rate=0.1)
        start = weights(trainer)
        trainer.train()
        assert any(not torch.equal(value, start[name]) for name, value in weights(trainer).items()), (before, stage)
        model, peft_config, before = trainer.model, None, stage


@pytest.mark.parametrize("adapters", [False, True])
def test_stages_chain(tmp_path: Path, adapters: bool) -> None:
    check_chain(
        tmp_path,
        ["sft", "sft", "dpo", "kto", "grpo", "grpo", "rloo", "online_dpo", "ppo"],
        adapters=adapters,
        bf16=True,
    )


@pytest.mark.parametrize("bf16", [False, True])
def test_stages_chain_with_trained_tokens(tmp_path: Path, bf16: bool) -> None:
    """The reference is the base, its fingerprint does not move, and new adapters go on the base without the rows."""
    model = tiny.model(tie_word_embeddings=True, dtype=torch.bfloat16 if bf16 else torch.float32)
    changes: dict[str, Any] = {"bf16": bf16, "optim": "sgd", "learning_rate": 0.1}
    tokens = lora(trainable_token_indices=[5, 9])
    first = made("sft", tmp_path, model, peft_config=tokens, **changes)
    start = weights(first)
    first.train()
    assert [n for n, v in weights(first).items() if "trainable_tokens" in n and not torch.equal(v, start[n])]
    for stage in ("dpo", "grpo", "ppo"):
        trainer = made(stage, tmp_path, first.model, **changes)
        before = trainer.stage.reference.fingerprint(trainer.model)
        trainer.train()
        assert trainer.stage.reference.fingerprint(trainer.model) == before, stage
    bare = made("dpo", tmp_path, model, peft_config=tokens, **changes)
    before = bare.stage.reference.fingerprint(bare.model)
    bare.train()
    assert bare.stage.reference.start is None
    assert bare.stage.reference.fingerprint(bare.model) == before


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("adapters", [False, True])
def test_every_pair_of_stages_chains(tmp_path: Path, adapters: bool, bf16: bool) -> None:
    walk: list[str] = []
    for i, stage in enumerate(LANGUAGE):
        walk += [stage, stage]
        for other in LANGUAGE[i + 1 :]:
            walk += [other, stage]
    assert set(itertools.pairwise(walk)) == set(itertools.product(LANGUAGE, LANGUAGE))
    check_chain(tmp_path, walk, adapters=adapters, bf16=bf16)


@pytest.mark.parametrize(
    "stage", ["sft", "ppo", *(pytest.param(s, marks=pytest.mark.slow) for s in LANGUAGE if s not in ("sft", "ppo"))]
)
def test_reward_models_come_after_any_stage_and_before_none(tmp_path: Path, stage: str) -> None:
    trainer = made(stage, tmp_path, tiny.model(dtype=torch.bfloat16), bf16=True)
    trainer.train()
    reward = made("reward", tmp_path, trainer.model, bf16=True)
    reward.train()
    made("reward", tmp_path, reward.model, bf16=True).train()
    assert trainer.model.config.num_labels == 2, "the language model's configuration is its own"
    with pytest.raises(ModelError, match="pass a causal language model"):
        made(stage, tmp_path, reward.model, bf16=True)


@pytest.mark.parametrize("stage", ["sft", "grpo", "reward"])
def test_a_second_try_with_new_adapters_starts_from_the_base(
    tmp_path: Path, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a notebook whose cell runs again; the first trainer's model keeps what it has learned."""
    model = tiny.model()
    first = made(stage, tmp_path, model, peft_config=lora(modules_to_save=["embed_tokens"]), max_steps=2)
    first.train()
    learned = weights(first)
    again = made(stage, tmp_path, model, peft_config=lora(target_modules=["k_proj"]), max_steps=2)
    assert "carries the adapters of an earlier trainer" in caplog.text
    again.train()
    fresh = made(stage, tmp_path, tiny.model(), peft_config=lora(target_modules=["k_proj"]), max_steps=2)
    fresh.train()
    assert_same(weights(again), weights(fresh), 0.0)
    assert_same(weights(first), learned, 0.0)
    with pytest.raises(ModelError, match="carries the adapters of an earlier trainer"):
        made(stage, tmp_path, model)


@pytest.mark.parametrize("stage", ["dpo", "grpo", "ppo"])
def test_training_twice_is_no_change_of_the_reference(tmp_path: Path, stage: str) -> None:
    cached = {"precompute_ref_log_probs": True} if stage == "dpo" else {}
    for changes in ({}, cached):
        trainer = made(stage, tmp_path, tiny.model(), max_steps=2, optim="sgd", learning_rate=1.0, **changes)
        trainer.train()
        before = weights(trainer)
        trainer.train()
        assert any(not torch.equal(value, before[name]) for name, value in weights(trainer).items())
    changed = made(stage, tmp_path, tiny.model(), max_steps=2)
    changed.model.lm_head.weight.data.mul_(2)
    with pytest.raises(CheckFailed, match="before the first update the reference differs"):
        changed.train()


def test_models_that_would_change_with_the_policy_are_refused(tmp_path: Path) -> None:
    model = tiny.model()
    reward = made("reward", tmp_path, model)
    with pytest.raises(ModelError, match=r"reward model .* are the policy's, which train"):
        GRPOTrainer(
            model, reward.model, GRPOConfig(**settings(tmp_path)), PROMPTS, processing_class=tiny.tokenizer(),
            reward_processing_classes=tiny.tokenizer(),
        )  # fmt: skip
    twin = copy.copy(model)
    with pytest.raises(ModelError, match=r"ref_model = .* are the policy's, which train"):
        DPOTrainer(model, twin, DPOConfig(**settings(tmp_path)), train_dataset=PAIRS, processing_class=tiny.tokenizer())


def test_a_reference_that_was_passed_can_be_trained_afterwards(tmp_path: Path) -> None:
    reference = tiny.model(seed=3)
    trainer = DPOTrainer(
        tiny.model(), reference, DPOConfig(**settings(tmp_path)), train_dataset=PAIRS, processing_class=tiny.tokenizer()
    )
    start = {name: p.clone() for name, p in reference.named_parameters()}
    trainer.train()
    assert_same(dict(reference.named_parameters()), start, 0.0)
    made("sft", tmp_path, reference).train()


# Weights that the user froze


def stacked() -> Any:
    """Two adapters at once, of which the first has been trained before."""
    model = get_peft_model(tiny.model(), lora(lora_dropout=0.0))
    model.add_adapter("second", lora(r=3, lora_dropout=0.0))
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        if "default" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        parameter.requires_grad_("second" in name)
    return model


def frozen_a() -> Any:
    """LoRA-FA (2308.03303)."""
    model = get_peft_model(tiny.model(), lora(lora_dropout=0.0))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    return model


def last_layer() -> Any:
    model = get_peft_model(tiny.model(), lora(lora_dropout=0.0, modules_to_save=["lm_head"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1." in name and "lora_" in name)
    return model


def without_adapters() -> Any:
    model = tiny.model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.mlp" in name)
    return model


@pytest.mark.parametrize("pattern", [stacked, frozen_a, last_layer, without_adapters])
def test_frozen_weights_do_not_move(tmp_path: Path, pattern: Any) -> None:
    for stage in LANGUAGE:
        torch.manual_seed(0)
        model = pattern()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        changes = {"value_model": tiny.model()} if stage == "ppo" else {}
        trainer = made(stage, tmp_path, model, optim="sgd", learning_rate=10.0, **changes)
        trainer.train()
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trains
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved, stage
        assert moved <= trains, (stage, moved - trains)


# An optimizer that the user made


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "reward"])
def test_an_optimizer_over_other_weights_is_refused(tmp_path: Path, stage: str) -> None:
    model, other = tiny.model(), tiny.model()
    cases = [
        (model, other.parameters(), None),
        (model, [model.lm_head.weight], None),
        (other, other.parameters(), lora()),
    ]
    for trained, parameters, adapters in cases:
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        with pytest.raises(ConfigError, match=r"optimizers: AdamW holds [01] of the \d+ tensors that train"):
            made(stage, tmp_path, trained, peft_config=adapters, optimizers=(optimizer, None))


@pytest.mark.parametrize("stage", ["sft", "grpo"])
@pytest.mark.parametrize("bf16", [False, True])
def test_an_optimizer_of_the_users_trains_as_the_configured_one(tmp_path: Path, stage: str, bf16: bool) -> None:
    """bf16 weights get fp32 masters under it too, and its scheduler stays in force."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    changes = {"bf16": bf16, "max_steps": 3, "learning_rate": 1e-4, "lr_scheduler_type": "constant"}
    configured = made(stage, tmp_path, tiny.model(dtype=dtype), optim="adamw_torch", **changes)
    model = tiny.model(dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    own = made(stage, tmp_path, model, optimizers=(optimizer, get_constant_schedule(optimizer)), **changes)
    for trainer in (configured, own):
        trainer.train()
    assert_same(weights(own), weights(configured), 0.0 if bf16 else 1e-6)
    assert (own.master_weights is not None) == bf16


def test_an_optimizer_that_cannot_have_masters_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Plain(torch.optim.SGD):
        """Of a module that is not known to update every parameter by itself."""

    model = tiny.model(dtype=torch.bfloat16)
    trainer = made("sft", tmp_path, model, bf16=True, optimizers=(Plain(model.parameters(), lr=1.0), None))
    before = weights(trainer)
    trainer.train()
    assert "Plain updates 16-bit weights in place" in caplog.text
    assert not isinstance(trainer.optimizer, MasterWeights)
    assert any(not torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_dropout_can_be_switched_off_for_good() -> None:
    model = tiny.model("gpt2", resid_pdrop=0.4)
    disable_dropout(model)
    assert all(module.p == 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))
    assert model.config.resid_pdrop == 0.4, "the saved configuration keeps what it says"
