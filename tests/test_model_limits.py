"""What a model and its adapters cannot do is refused by name, before the first step where that can be known."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from burnish import ConfigError, ModelError
from burnish.model.packing import pack
from burnish.model.scoring import prepare_for_scoring, score
from burnish.rollout import NativeEngine, Request, SamplingParams, make_engine
from burnish.rollout.lockstep import LockstepEngine
from burnish.types import Completion, Group
from test_chaining import SAMPLES, STAGES, made

# Positions


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gptj"])
@pytest.mark.parametrize("stage", STAGES)
def test_sequences_beyond_learned_positions_are_refused(tmp_path: Path, stage: str, kind: str) -> None:
    changes: dict[str, Any] = {"max_completion_length": 9} if stage in SAMPLES else {}
    model = small(kind)
    with pytest.raises(
        ModelError, match=r"train_dataset: row \d+ .*has \d+ tokens, and \w+ has 8 positions: (set|lower) max"
    ):
        made(stage, tmp_path, model, **changes)


def small(kind: str) -> Any:
    sizes: dict[str, Any] = {
        "gpt2": {"n_positions": 8},
        "opt": {"max_position_embeddings": 8, "ffn_dim": 32, "word_embed_proj_dim": 32, "dropout": 0.0},
        "gptj": {"max_position_embeddings": 8, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    }
    return tiny.model(kind, **sizes[kind])


@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo"])
def test_longer_sequences_than_a_rotary_model_was_made_for_are_told_of(
    tmp_path: Path, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    changes: dict[str, Any] = {"max_completion_length": 9} if stage in SAMPLES else {}
    made(stage, tmp_path, tiny.model(max_position_embeddings=8), **changes).train()
    assert "LlamaForCausalLM was made for max_position_embeddings = 8" in caplog.text
    caplog.clear()
    scaling = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 8, "factor": 32.0,
        "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
    }  # fmt: skip
    made(stage, tmp_path, tiny.model("phi3", rope_parameters=scaling, original_max_position_embeddings=8), **changes)
    assert "changes its rotary frequencies (longrope) beyond 8 tokens" in caplog.text


def test_engines_streams_and_evaluations_meet_the_limit_too(tmp_path: Path) -> None:
    model = small("gpt2")
    engine = make_engine(model, tiny.tokenizer())
    with pytest.raises(
        ModelError, match=r"a prompt with its completion has 9 tokens, and GPT2LMHeadModel has 8 positions"
    ):
        engine.generate([Request([3, 4, 5], 1, SamplingParams(6))], seed=0, step=0)
    assert len(engine.generate([Request([3, 4, 5], 1, SamplingParams(5))], seed=0, step=0)[0][0].token_ids) <= 5
    rows = [{"prompt": "1", "completion": "2"}, {"prompt": "1+1=2+2=4", "completion": "2"}]
    for train, evaluates in ((iter(rows), False), (rows[:1] * 4, True)):
        trainer = made("sft", tmp_path, small("gpt2"), rows=train, per_device_train_batch_size=1, max_steps=2)
        with pytest.raises(ModelError, match="a sequence has 11 tokens, and GPT2LMHeadModel has 8 positions"):
            trainer.evaluate(rows) if evaluates else trainer.train()


# Tokens


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_tokens_that_the_tokenizer_lacks_are_not_sampled(kind: str) -> None:
    """A vocabulary padded to 96, of which the head likes the padding best."""
    tokenizer = tiny.tokenizer()
    size = len(tokenizer)
    assert size < 96
    model = tiny.model(kind, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[size:] *= 50
    engine = make_engine(model, tokenizer)
    for temperature in (0.0, 1.0):
        params = SamplingParams(8, temperature=temperature)
        found = engine.generate([Request([3, 4, 5], 8, params)], seed=0, step=0)
        assert all(token < size for completion in found[0] for token in completion.token_ids)
    # A token that ends completions may be one that the tokenizer does not know.
    ends = SamplingParams(8, eos_token_ids=(95,))
    found = engine.generate([Request([3, 4, 5], 32, ends)], seed=0, step=0)
    assert {token for completion in found[0] for token in completion.token_ids if token >= size} == {95}


# Adapters


OUTSIDE = {
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "adaption": peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2),
}


@pytest.mark.parametrize("kind", OUTSIDE)
def test_adapters_outside_the_weights_are_refused(tmp_path: Path, kind: str) -> None:
    for stage in STAGES:
        # Before any weight is read: there is no such model.
        with pytest.raises(ConfigError, match=r"^peft_config: adapters of type [A-Z_]+ add virtual tokens"):
            made(stage, tmp_path, str(tmp_path / "none"), peft_config=OUTSIDE[kind])
    wrapped = get_peft_model(tiny.model(), OUTSIDE[kind])
    with pytest.raises(ConfigError, match=r"^model = PeftModelForCausalLM: adapters of type"):
        made("sft", tmp_path, wrapped)
    wrapped.save_pretrained(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"^model = '.*saved': adapters of type"):
        made("sft", tmp_path, str(tmp_path / "saved"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules_to_save": ["zzz"]}, r"modules_to_save = 'zzz': LlamaForCausalLM has nothing of that name"),
        ({"target_parameters": ["zzz"]}, r"target_parameters = 'zzz'"),
        ({"rank_pattern": {"zzz": 3}}, r"rank_pattern = 'zzz'"),
        ({"alpha_pattern": {"zzz": 3}}, r"alpha_pattern = 'zzz'"),
        ({"layers_to_transform": [0, 99]}, r"layers_to_transform = 99: .* layers 0 to 1"),
        ({"trainable_token_indices": [1000]}, r"trainable_token_indices = 1000: .* tokens 0 to 95"),
        ({"trainable_token_indices": {"embed_tokens": [-1]}}, r"trainable_token_indices = -1"),
    ],
)
def test_names_that_mean_nothing_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    adapters = LoraConfig(r=2, target_modules=["q_proj"], **changes)
    with pytest.raises(ConfigError, match=rf"^peft_config\.{message}"):
        made("sft", tmp_path, tiny.model(), peft_config=adapters)


def test_of_a_general_list_what_matches_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapters = LoraConfig(
        r=2, target_modules=["q_proj", "c_attn"], modules_to_save=["lm_head"], rank_pattern={"q_.*": 3}
    )
    made("sft", tmp_path, tiny.model(), peft_config=adapters).train()
    assert "peft_config.target_modules = 'c_attn'" in caplog.text


# Depth, experts


def deeper(kind: str, *, copied: bool = True) -> Any:
    """Depth up-scaling (2312.15166): the layers twice."""
    model = tiny.model(kind)
    layers = list(model.model.layers)
    again = copy.deepcopy(layers) if copied else layers
    model.model.layers = torch.nn.ModuleList([*layers, *again])
    model.config.num_hidden_layers = len(model.model.layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = list(model.config.layer_types) * 2
    return model


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_deep_copied_layers_attend_by_the_layout(tmp_path: Path, kind: str) -> None:
    groups = [Group([5, 6, 7, 8, 9], [Completion([9, 10, 11]), Completion([12, 13, 14, 15, 0])])]
    model, plain = deeper(kind), deeper(kind)
    prepare_for_scoring(model)
    with torch.no_grad():
        got = score(model, pack(groups)).logprobs.split([3, 5])
        for completion, values in zip(groups[0].completions, got, strict=True):
            ids = torch.tensor([groups[0].prompt_ids + completion.token_ids])
            logprobs = plain(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            expected = logprobs[range(4, ids.shape[1] - 1), completion.token_ids]
            torch.testing.assert_close(values, expected, rtol=0, atol=1e-4)
    made("grpo", tmp_path, deeper(kind)).train()  # whose own check compares sampler and trainer


def test_one_layer_at_two_depths_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.layers: layers 0 and 2 are one module"):
        made("sft", tmp_path, deeper("llama", copied=False))


@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_of_routers_is_refused(tmp_path: Path, stage: str) -> None:
    with pytest.raises(ConfigError, match=r"^output_router_logits = True .* which is not added here"):
        made(stage, tmp_path, tiny.model("mixtral", output_router_logits=True))


def test_rollouts_of_a_model_that_asks_for_router_logits_share_prompts() -> None:
    """The loss of routers, which nobody reads in a rollout, must neither fail nor cost the shared prompt."""
    tokenizer = tiny.tokenizer()
    requests = [Request([3, 4, 5], 2, SamplingParams(max_new_tokens=6))]
    found: list[list[list[int]]] = []
    for asked in (False, True):
        model = tiny.model("mixtral", output_router_logits=asked)
        engine = make_engine(model, tokenizer)
        assert isinstance(engine, NativeEngine)
        for sampler in (engine, LockstepEngine(model, tokenizer)):
            found.append([completion.token_ids for completion in sampler.generate(requests, seed=0, step=0)[0]])
        assert model.config.output_router_logits is asked
    assert all(tokens == found[0] for tokens in found)
