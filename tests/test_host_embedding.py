"""An input embedding in host memory computes the same and stays where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import tiny
from burnish import SFTConfig, SFTTrainer
from burnish.errors import ConfigError
from burnish.model.critic import share_base
from burnish.model.host_embedding import keep_embedding_on_host
from burnish.model.packing import pack
from burnish.model.scoring import prepare_for_scoring, score
from test_recomputation import groups
from test_trainers import TEXTS, assert_same, grpo, settings, weights


def adapted(**changes: Any) -> Any:
    model = tiny.model("llama", tie_word_embeddings=False, **changes)
    return get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))


def test_scores_and_gradients_are_the_same_to_the_bit() -> None:
    model = adapted().train()
    prepare_for_scoring(model)
    found = []
    for moved in (False, True):
        if moved:
            keep_embedding_on_host(model)
        model.zero_grad()
        logprobs = score(model, pack(groups())).logprobs
        logprobs.sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((logprobs.detach(), gradients))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    assert all(torch.equal(grad, found[1][1][name]) for name, grad in found[0][1].items())


def test_it_stays_when_the_model_moves_and_is_saved_with_it() -> None:
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    keep_embedding_on_host(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    model.to("meta")
    assert model.get_input_embeddings().weight.device.type == "cpu"
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_run_takes_the_same_steps(tmp_path: Path) -> None:
    trained = []
    for moved in (False, True):
        made = grpo(
            tmp_path / str(moved), tiny.model("llama", tie_word_embeddings=False), max_steps=2,
            embedding_offloading=moved, peft_config=LoraConfig(r=2, target_modules="all-linear"),
        )  # fmt: skip
        made.train()
        trained.append({name: value for name, value in weights(made).items() if "lora" in name})
    assert_same(*trained, tolerance=0.0)


def test_a_critic_on_the_policy_s_base_looks_up_the_same_embedding(tmp_path: Path) -> None:
    policy = adapted()
    keep_embedding_on_host(policy)
    critic = share_base(policy, seed=3, pad_token_id=0)
    assert critic.get_input_embeddings().weight is policy.get_input_embeddings().weight


def test_a_run_with_a_frozen_embedding_resumes(tmp_path: Path) -> None:
    """The checkpoint holds the embedding, which is read back though it is not a parameter."""

    def run(resume: str | None = None) -> Any:
        model = tiny.model("llama", tie_word_embeddings=False)
        model.get_input_embeddings().weight.requires_grad_(False)
        fields = settings(
            tmp_path, embedding_offloading=True, max_steps=2, save_strategy="steps", save_steps=1, optim="sgd"
        )
        made = SFTTrainer(model, SFTConfig(**fields), train_dataset=TEXTS, processing_class=tiny.tokenizer())
        made.train(resume_from_checkpoint=resume)
        return made

    whole, resumed = run(), run(str(tmp_path / "checkpoint-1"))
    assert_same(weights(whole), weights(resumed), tolerance=0.0)
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert torch.equal(saved["model.embed_tokens.weight"], whole.model.get_input_embeddings().weight)


def test_what_cannot_stay_on_the_host_is_an_error(tmp_path: Path) -> None:
    tied = get_peft_model(tiny.model("llama", tie_word_embeddings=True), LoraConfig(target_modules="all-linear"))
    trained = tiny.model("llama", tie_word_embeddings=False)
    with_rows = get_peft_model(
        tiny.model("llama", tie_word_embeddings=False),
        LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]),
    )
    for model, reason in ((tied, "head's weight too"), (trained, "trains"), (with_rows, "TrainableTokens")):
        with pytest.raises(ConfigError, match=f"embedding_offloading = True: .*{reason}"):
            keep_embedding_on_host(model)
    with pytest.raises(ConfigError, match=r"embedding_offloading = True: LlamaForCausalLM .* trains"):
        grpo(tmp_path, tiny.model("llama", tie_word_embeddings=False), embedding_offloading=True)
