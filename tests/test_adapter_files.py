"""Saved adapters find their base, whatever its vocabulary was; sizes that do not fit are known from file headers."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from burnish import ModelError, RewardModel, Rubric
from burnish.cli.config import EvaluationSection, PairsSection
from burnish.cli.stages import evaluate_model, make_pairs, rank_with, train
from burnish.model.adapter_files import saved_adapters
from burnish.model.classifier import load_reward_model
from burnish.model.critic import load_value_model
from burnish.model.loading import load_model
from burnish.model.packing import pack
from burnish.model.scoring import prepare_for_scoring, score
from burnish.rewards import Criterion
from burnish.rollout import Request, SamplingParams, make_engine
from burnish.types import Completion, Group
from test_chaining import LANGUAGE, alternating, made
from test_preference_trainer import PAIRS
from test_trainers import PROMPTS, assert_same, settings, weights

NEW = 100
GROUPS = [Group([5, 96, 7, 98], [Completion([99, 10, 11]), Completion([12, 97, 14, 15, 0])])]


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **changes})


def base_in(folder: Path, **changes: Any) -> Path:
    tiny.model(**changes).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def resized(base: Path) -> Any:
    """The base with four more tokens, whose embeddings no other load would draw again."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.random.fork_rng():
        model.resize_token_embeddings(NEW, mean_resizing=False)
        torch.manual_seed(1)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            torch.nn.init.normal_(layer.weight[96:], std=0.2)
    return model


@torch.no_grad()
def scores(model: Any) -> torch.Tensor:
    model.eval()
    prepare_for_scoring(model)
    return score(model, pack(GROUPS)).logprobs


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """Adapters of a resized base, and the scores of what was trained."""
    folder = tmp_path_factory.mktemp("grown")
    trainer = made("sft", folder / "adapters", resized(base_in(folder / "base")), peft_config=lora())
    trainer.train()
    trainer.save_model()
    return folder / "adapters", scores(trainer.model)


# Resized vocabularies


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"trainable_token_indices": [5, 97]},
    ],
    ids=["lora", "copies", "head", "embedding", "tokens"],
)
def test_every_kind_of_adapter_reopens_with_the_vocabulary_that_it_had(
    tmp_path: Path, tied: bool, changes: dict[str, Any]
) -> None:
    base = base_in(tmp_path / "base", tie_word_embeddings=tied)
    if tied and "trainable_token_indices" not in changes and changes:
        changes = {**changes, "ensure_weight_tying": True}
    trainer = made("sft", tmp_path / "out", resized(base), peft_config=lora(**changes))
    trainer.train()
    trainer.save_model()
    trained = scores(trainer.model)
    again, _ = load_model(tmp_path / "out", bf16=False)
    assert again.config.vocab_size == NEW
    assert torch.equal(scores(again), trained)
    # Plain peft reads the same files on a base that was resized by hand.
    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.resize_token_embeddings(NEW, mean_resizing=False)
    assert torch.equal(scores(PeftModel.from_pretrained(plain, tmp_path / "out")), trained)


@pytest.mark.parametrize("stage", LANGUAGE)
def test_every_stage_trains_them_further(tmp_path: Path, grown: tuple[Path, torch.Tensor], stage: str) -> None:
    trainer = made(stage, tmp_path, str(grown[0]))
    assert torch.equal(scores(trainer.model), grown[1])
    trainer.train()
    trainer.save_model()
    again, _ = load_model(tmp_path, bf16=False)
    assert torch.equal(scores(again), scores(trainer.model))


def test_resumed_is_uninterrupted(tmp_path: Path, grown: tuple[Path, torch.Tensor]) -> None:
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = made("sft", tmp_path, str(grown[0]), **changes)
    whole.train()
    again = made("sft", tmp_path, str(grown[0]), **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same(weights(whole), weights(again), 0.0)


def test_commands_read_them(tmp_path: Path, grown: tuple[Path, torch.Tensor]) -> None:
    rubric = Rubric([Criterion("even", alternating)])
    adapters = str(grown[0])
    evaluation = EvaluationSection(num_samples=2, ks=[1], max_completion_length=4)
    assert evaluate_model(adapters, PROMPTS[:2], rubric, evaluation, name="grown").problems
    pairs = PairsSection(output_dir=str(tmp_path / "pairs"), num_samples=2, max_completion_length=4)
    assert make_pairs(adapters, PROMPTS[:2], rubric, pairs)
    options = settings(tmp_path / "dpo", max_steps=1, per_device_train_batch_size=4)
    assert train("dpo", adapters, PAIRS, options).model.config.vocab_size == NEW
    model, _ = load_model(adapters, bf16=False)
    engine = make_engine(model, tiny.tokenizer())
    assert engine.generate([Request([5, 96, 7], 2, SamplingParams(4))], seed=0, step=0)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    # fp32: the merged product is rounded once and not twice.
    torch.testing.assert_close(scores(load_model(tmp_path / "merged", bf16=False)[0]), grown[1], rtol=0, atol=1e-4)


def test_reward_models_and_critics_have_them_too(tmp_path: Path) -> None:
    trainer = made("reward", tmp_path / "out", resized(base_in(tmp_path / "base")), peft_config=lora())
    trainer.train()
    trainer.save_model()
    prompts, chosen = [row["prompt"] for row in PAIRS], [row["chosen"] for row in PAIRS]
    trained = RewardModel(trainer.model, trainer.tokenizer)(prompts, chosen)
    assert RewardModel(tmp_path / "out", bf16=False)(prompts, chosen) == pytest.approx(trained, abs=1e-5)
    assert rank_with(str(tmp_path / "out"), PAIRS)
    critic, _ = load_value_model(tmp_path / "out", bf16=False, seed=0, pad_token_id=0)
    assert critic.get_input_embeddings().weight.shape[0] == NEW
    made("reward", tmp_path / "again", str(tmp_path / "out")).train()


def test_embeddings_are_saved_where_peft_cannot_see_that_they_were_resized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft asks the hub for the base's configuration, also where the cache has it and the network is off."""
    from huggingface_hub import constants

    base = base_in(tmp_path / "base")
    cached = tmp_path / "cache" / "models--someone--base"
    shutil.copytree(base, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = resized(base)
    model.config._name_or_path = model.name_or_path = "someone/base"
    trainer = made("sft", tmp_path / "out", model, peft_config=lora())
    trainer.save_model()
    shapes = saved_adapters(tmp_path / "out").shapes  # type: ignore[union-attr]
    assert {name: shape[0] for name, shape in shapes.items() if "lora" not in name} == {
        "model.embed_tokens.weight": NEW, "lm_head.weight": NEW
    }  # fmt: skip


# Sizes that do not fit


class Unread(Exception):
    pass


def test_sizes_that_do_not_fit_are_known_before_weights_are_read(
    tmp_path: Path, grown: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = base_in(tmp_path / "other", hidden_size=64)
    wide = shutil.copytree(grown[0], tmp_path / "wide")
    point(wide, str(other))
    lost = shutil.copytree(grown[0], tmp_path / "lost")
    tensors = load_file(lost / "adapter_model.safetensors")
    heads = {"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 32),
             "base_model.model.lm_head.lora_B.weight": torch.zeros(NEW, 2)}  # fmt: skip
    kept = {name: value for name, value in tensors.items() if "lora" in name}
    save_file({**kept, **heads}, lost / "adapter_model.safetensors", {"format": "pt"})

    def read(*args: Any, **kwargs: Any) -> None:
        raise Unread

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)
    for folder, message in (
        (wide, r"wide': model\.layers\.0\.self_attn\.q_proj is 32 x 32 in the adapters and 32 x 64 in their base"),
        (lost, r"lost': lm_head is 100 x 32 in the adapters and 96 x 32 in their base .* resized and not saved"),
    ):
        with pytest.raises(ModelError, match=message):
            load_model(folder, bf16=False)
    point(wide, str(other), task_type="SEQ_CLS")
    with pytest.raises(ModelError, match="q_proj is 32 x 32 in the adapters and 32 x 64"):
        load_reward_model(wide, bf16=False, seed=0)


def test_half_saved_embeddings_are_refused(tmp_path: Path, grown: tuple[Path, torch.Tensor]) -> None:
    folder = shutil.copytree(grown[0], tmp_path / "half")
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors["base_model.model.model.embed_tokens.weight"]
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"for 100 tokens, model\.embed_tokens of their base .* has 96, and"):
        load_model(folder, bf16=False)


def test_what_headers_do_not_show_is_a_clear_error_too(tmp_path: Path, grown: tuple[Path, torch.Tensor]) -> None:
    folder = shutil.copytree(grown[0], tmp_path / "rank")
    point(folder, str(grown[0].parent / "base"), r=3)
    with pytest.raises(ModelError, match=r"rank': the adapters do not fit their base .* size mismatch"):
        load_model(folder, bf16=False)
    (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ModelError, match=r"rank': adapter_model.safetensors cannot be read"):
        load_model(folder, bf16=False)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"rank': adapter_config.json without adapter_model.safetensors"):
        load_model(folder, bf16=False)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"rank': its adapter_config.json cannot be read"):
        load_model(folder, bf16=False)


# Where the base is


def point(folder: Path, base: str, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base, **changes}))


def test_a_relative_base_is_in_the_working_folder_or_else_beside_the_adapters(
    tmp_path: Path, grown: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(grown[0].parent / "base", tmp_path / "runs" / "base")
    adapters = shutil.copytree(grown[0], tmp_path / "runs" / "adapters")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    point(adapters, "../base")
    trainer = made("sft", tmp_path / "out", str(adapters))
    assert torch.equal(scores(trainer.model), grown[1])
    trainer.save_model()
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tmp_path / "runs" / "base")
    # The working folder wins.
    base_in(tmp_path / "base", seed=1)
    found = saved_adapters(adapters)
    assert found is not None
    assert found.base == "../base"
    point(adapters, "../bases")
    with pytest.raises(ModelError, match=r"its base '../bases' does not exist \(\S+ has no 'bases'; it has 'base'\)"):
        load_model(adapters, bf16=False)


# Leftovers


def test_a_configuration_beside_adapters_is_a_leftover(
    tmp_path: Path, grown: tuple[Path, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(grown[0], tmp_path / "adapters")
    shutil.copy(grown[0].parent / "base" / "config.json", folder)
    with caplog.at_level(logging.WARNING):
        trainer = made("dpo", tmp_path / "out", str(folder))
    assert torch.equal(scores(trainer.model), grown[1])
    assert "whole model" not in caplog.text
    shutil.copy(grown[0].parent / "base" / "model.safetensors", folder)
    with caplog.at_level(logging.WARNING):
        trainer = made("dpo", tmp_path / "out", str(folder))
    assert torch.equal(scores(trainer.model), grown[1])
    assert caplog.text.count("holds adapters and a whole model (model.safetensors): the adapters are loaded") == 1


def test_adapters_of_the_model_in_their_own_folder(tmp_path: Path) -> None:
    """Trained from a folder into the same one."""
    base = base_in(tmp_path / "model")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(task_type="CAUSAL_LM"))
    model.save_pretrained(base)
    assert (base / "config.json").is_file()
    again, _ = load_model(base, bf16=False)
    groups = [Group([5, 6], [Completion([7, 8])])]
    for one in (model, again):
        prepare_for_scoring(one.eval())
    with torch.no_grad():
        assert torch.equal(score(again, pack(groups)).logprobs, score(model, pack(groups)).logprobs)


def test_a_configuration_of_adapters_that_are_gone_is_a_leftover_too(tmp_path: Path) -> None:
    base = base_in(tmp_path / "merged")
    (base / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "/nowhere"}')
    loaded, _ = load_model(base, bf16=False)
    assert loaded.name_or_path == str(base)
    assert not hasattr(loaded, "peft_config")
