"""The tiled head against the plain formula, finite differences, peft and the models' own logits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tiny
from burnish.errors import ConfigError, ModelError
from burnish.model.head import head_logprobs, head_spec
from burnish.model.packing import pack
from burnish.model.scoring import prepare_for_scoring, score
from burnish.model.tiled_head import HeadSpec, tiled_logprobs
from burnish.rollout import Request, SamplingParams, make_engine
from burnish.types import Completion, Group
from live_bytes import LiveBytes
from plain_head import HIDDEN, NUM_TOKENS, TINY_TILE, VOCAB, operands, plain, targets

OPTIONS = list(itertools.product((False, True), (False, True), (1.0, 0.7), (HeadSpec(), HeadSpec(1.7, 3.0))))


@pytest.mark.parametrize(("bias", "low_rank", "temperature", "spec"), OPTIONS)
@pytest.mark.parametrize("outputs", ["logprob", "entropy", "both"])
def test_values_and_gradients_equal_the_plain_formula(
    bias: bool, low_rank: bool, temperature: float, spec: HeadSpec, outputs: str
) -> None:
    ops, target = operands(), targets()
    used = [ops["hidden"], ops["weight"]] + ([ops["bias"]] if bias else []) + ([ops["u"], ops["b"]] if low_rank else [])
    extra = {"temperature": temperature, "spec": spec, "low_rank": (ops["u"], ops["b"]) if low_rank else None}
    b = ops["bias"] if bias else None
    expected = plain(ops["hidden"], ops["weight"], target, bias=b, **extra)
    got = tiled_logprobs(
        ops["hidden"], ops["weight"], target, bias_V=b, with_entropy=outputs != "logprob", tile_bytes=TINY_TILE, **extra
    )
    weights = torch.randn(2, NUM_TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    picked = {"logprob": [0], "entropy": [1], "both": [0, 1]}[outputs]
    for i in picked:
        torch.testing.assert_close(got[i], expected[i], rtol=0, atol=1e-10)
    grads = [
        torch.autograd.grad(sum((weights[i] * pair[i]).sum() for i in picked), used)  # type: ignore[arg-type]
        for pair in (got, expected)
    ]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("bias", "low_rank", "temperature", "spec"), OPTIONS)
@pytest.mark.parametrize("tile_bytes", [1, 200, TINY_TILE, None])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_accuracy_and_collision_equal_the_plain_formula(
    bias: bool, low_rank: bool, temperature: float, spec: HeadSpec, tile_bytes: int | None, with_entropy: bool
) -> None:
    ops = operands(5)
    factors, b = (ops["u"], ops["b"]) if low_rank else None, ops["bias"] if bias else None
    extra = {"temperature": temperature, "spec": spec, "low_rank": factors}
    every = torch.stack(
        [plain(ops["hidden"], ops["weight"], torch.full((NUM_TOKENS,), v), bias=b, **extra)[0] for v in range(VOCAB)], 1
    )
    best = every.argmax(1)
    target = torch.where(torch.arange(NUM_TOKENS) % 2 == 0, best, (best + 1) % VOCAB)
    flags = {"with_entropy": with_entropy, "with_collision": True}
    got = tiled_logprobs(ops["hidden"], ops["weight"], target, bias_V=b, tile_bytes=tile_bytes, **flags, **extra)
    assert got.correct.tolist() == [True, False] * 3 + [True]
    assert got.log_collision is not None
    assert not got.log_collision.requires_grad
    torch.testing.assert_close(got.log_collision, (every.exp() ** 2).sum(1).log(), rtol=0, atol=1e-10)
    alone = tiled_logprobs(ops["hidden"], ops["weight"], target, bias_V=b, tile_bytes=tile_bytes, **extra)
    assert alone.entropy is None
    assert alone.log_collision is None
    assert torch.equal(alone.correct, got.correct)
    torch.testing.assert_close(alone.logprobs, got.logprobs, rtol=0, atol=1e-12)  # other statistics, other tiles


def test_accuracy_and_collision_of_extreme_logits() -> None:
    hidden, weight = torch.tensor([[300.0], [0.0]]), torch.tensor([[1.0], [-1.0], [0.0]])
    for tile_bytes in (1, None):
        got = tiled_logprobs(hidden, weight, torch.tensor([0, 2]), with_collision=True, tile_bytes=tile_bytes)
        assert got.correct.tolist() == [True, True], "the second row's logits are equal: none is likelier"
        assert got.log_collision is not None
        torch.testing.assert_close(got.log_collision, torch.tensor([0.0, -math.log(3)]))
        assert not tiled_logprobs(hidden, weight, torch.tensor([1, 1]), tile_bytes=tile_bytes).correct[0]


@pytest.mark.parametrize("frozen", ["none", "hidden", "weight", "low_rank"])
@pytest.mark.parametrize("spec", [HeadSpec(), HeadSpec(0.8, 2.5)])
def test_gradcheck_with_every_option(frozen: str, spec: HeadSpec) -> None:
    ops, target = operands(3), targets()
    for name in {"none": (), "hidden": ("hidden",), "weight": ("weight", "bias"), "low_rank": ("u", "b")}[frozen]:
        ops[name].requires_grad_(False)

    def run(hidden: Tensor, weight: Tensor, bias: Tensor, u: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        pair = tiled_logprobs(
            hidden, weight, target, bias_V=bias, low_rank=(u, b), temperature=1.3, spec=spec, with_entropy=True,
            tile_bytes=TINY_TILE,
        )  # fmt: skip
        assert pair[1] is not None
        return pair[0], pair[1]

    assert torch.autograd.gradcheck(run, tuple(ops.values()))


def test_hand_computed_uniform_head() -> None:
    hidden, weight = torch.ones(2, 3), torch.zeros(8, 3)
    logprob, entropy = tiled_logprobs(hidden, weight, torch.tensor([0, 7]), with_entropy=True, tile_bytes=64)[:2]
    assert entropy is not None
    expected = torch.full((2,), torch.tensor(8.0).log().item())
    torch.testing.assert_close(logprob, -expected)
    torch.testing.assert_close(entropy, expected)


@pytest.mark.parametrize("tile_bytes", [1, 200, 1000, 10**8])
def test_the_tile_size_changes_nothing(tile_bytes: int) -> None:
    ops, target = operands(4), targets()
    results = []
    for size in (None, tile_bytes):
        pair = tiled_logprobs(ops["hidden"], ops["weight"], target, with_entropy=True, tile_bytes=size)
        loss = (pair[0] + 0.3 * pair[1]).sum()  # type: ignore[operator]
        results.append((*pair[:2], *torch.autograd.grad(loss, [ops["hidden"], ops["weight"]])))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_large_logits_keep_the_statistics_finite() -> None:
    hidden, weight = torch.tensor([[300.0]]), torch.tensor([[1.0], [-1.0], [0.0]])
    logprob, entropy = tiled_logprobs(hidden, weight, torch.tensor([1]), with_entropy=True, tile_bytes=1)[:2]
    assert logprob.item() == -600.0
    assert entropy is not None
    assert entropy.item() == 0.0


def test_a_tied_weight_counts_both_uses() -> None:
    target, ids = targets(), torch.arange(NUM_TOKENS)
    grads = []
    for use in (
        lambda h, w: tiled_logprobs(h, w, target, tile_bytes=TINY_TILE)[0],
        lambda h, w: plain(h, w, target)[0],
    ):
        weight = operands(5)["weight"]
        hidden = weight[ids].tanh()
        loss = use(hidden, weight).sum() + use(hidden * 2, weight).square().sum()
        grads.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-10)


def test_backward_writes_no_grad_and_repeats_under_checkpointing() -> None:
    ops, target = operands(6), targets()

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        return tiled_logprobs(hidden, weight, target, tile_bytes=TINY_TILE)[0]

    direct = torch.autograd.grad(run(ops["hidden"], ops["weight"]).sum(), [ops["hidden"], ops["weight"]])
    again = checkpoint(run, ops["hidden"], ops["weight"], use_reentrant=False)
    recomputed = torch.autograd.grad(again.sum(), [ops["hidden"], ops["weight"]])
    assert ops["hidden"].grad is None
    assert ops["weight"].grad is None
    for one, other in zip(direct, recomputed, strict=True):
        assert torch.equal(one, other)


def test_rows_without_a_gradient_are_skipped_and_stay_zero() -> None:
    ops, target = operands(7), targets()
    weights = torch.tensor([0.0, 2.0, 0.0, 0.0, -1.0, 0.0, 0.5], dtype=torch.float64)
    low_rank = (ops["u"], ops["b"])
    used = list(ops.values())
    got = tiled_logprobs(ops["hidden"], ops["weight"], target, bias_V=ops["bias"], low_rank=low_rank)[0]
    expected = plain(ops["hidden"], ops["weight"], target, bias=ops["bias"], low_rank=low_rank)[0]
    mine, theirs = (torch.autograd.grad((weights * value).sum(), used) for value in (got, expected))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    zero = tiled_logprobs(ops["hidden"], ops["weight"], target)[0]
    assert not any(g.any() for g in torch.autograd.grad((0 * zero).sum(), used[:2]))


def test_no_tokens() -> None:
    weight = operands()["weight"]
    hidden = torch.zeros(0, HIDDEN, dtype=torch.float64, requires_grad=True)
    logprob, entropy = tiled_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long), with_entropy=True)[:2]
    assert entropy is not None
    assert logprob.shape == entropy.shape == (0,)
    assert not torch.autograd.grad(logprob.sum(), weight)[0].any()


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_products_with_fp32_statistics(weight_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(8)
    hidden = torch.randn(64, 32, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(500, 32, generator=generator).bfloat16().to(weight_dtype).requires_grad_()
    target = torch.randint(500, (64,), generator=generator)
    logprob, entropy = tiled_logprobs(hidden, weight, target, with_entropy=True, tile_bytes=20_000)[:2]
    assert entropy is not None
    exact = plain(hidden.double(), weight.double(), target)
    assert logprob.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprob.double(), exact[0], rtol=0, atol=0.08)  # a bf16 ulp of a logit near 16
    mine = torch.autograd.grad((logprob + 0.1 * entropy).sum(), [hidden, weight])
    theirs = torch.autograd.grad((exact[0] + 0.1 * exact[1]).sum(), [hidden, weight])
    for one, other, operand in zip(mine, theirs, (hidden, weight), strict=True):
        assert one.dtype == operand.dtype
        assert (one.double() - other).norm() < 0.01 * other.norm()  # bf16 keeps 8 bits


def live_bytes(num_tokens: int, frozen: bool) -> LiveBytes:
    hidden, vocab, tile_bytes = 8, 4_000, 40_000
    h = torch.randn(num_tokens, hidden, requires_grad=True)
    w = torch.randn(vocab, hidden, requires_grad=not frozen)
    target = torch.randint(vocab, (num_tokens,))
    with LiveBytes() as meter:
        logprob, entropy = tiled_logprobs(h, w, target, with_entropy=True, tile_bytes=tile_bytes)[:2]
        assert entropy is not None
        (logprob + entropy).sum().backward()
    assert meter.largest < num_tokens * vocab
    return meter


def test_memory_grows_with_the_hidden_states_only() -> None:
    small, large = live_bytes(256, frozen=True), live_bytes(512, frozen=True)
    # 256 more tokens: their fp32 and own-dtype gradients (8 * 8 bytes), statistics and a few vectors of the row.
    assert large.peak - small.peak <= 256 * (2 * 8 * 4 + 20 * 8)
    assert large.largest <= 40_000
    assert large.peak <= 512 * (2 * 8 * 4 + 20 * 8) + 3 * 40_000


def test_a_frozen_head_has_no_weight_gradient_in_memory() -> None:
    weight_bytes = 4_000 * 8 * 4
    frozen, trained = live_bytes(64, frozen=True), live_bytes(64, frozen=False)
    assert frozen.largest < weight_bytes / 4
    assert trained.largest == weight_bytes
    assert trained.peak - frozen.peak < 1.2 * weight_bytes  # one copy: no fp32 twin


def test_live_bytes_sees_what_the_plain_path_allocates() -> None:
    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(1000, 8)
    with LiveBytes() as meter:
        F.linear(hidden, weight).log_softmax(-1).sum().backward()
    assert meter.largest == 64 * 1000 * 4
    assert meter.peak >= 2 * meter.largest
    assert meter.live == hidden.numel() * 4  # the gradient


class Toy(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)


def lora_model(*, adapters: int = 1, **config: Any) -> Any:
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["lm_head"], **config)
    model: Any = peft.get_peft_model(Toy(bias=True).double(), settings)
    for i in range(1, adapters):
        model.add_adapter(f"extra{i}", settings)
    if adapters > 1:
        model.base_model.set_adapter(["default", *(f"extra{i}" for i in range(1, adapters))])
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)
    return model.double()


@pytest.mark.parametrize(
    ("adapters", "config"),
    [(1, {}), (2, {}), (1, {"lora_bias": True}), (1, {"lora_dropout": 0.5}), (1, {"use_rslora": True})],
)
def test_lora_equals_pefts_own_forward(adapters: int, config: dict[str, Any]) -> None:
    model = lora_model(adapters=adapters, **config).train()
    hidden, target = operands(9)["hidden"], targets()
    module = model.base_model.model.lm_head
    used = [hidden] + [p for p in module.parameters() if p.requires_grad]
    assert len(used) >= 1 + 2 * adapters
    torch.manual_seed(1)
    expected = model(hidden).log_softmax(-1).gather(1, target[:, None])[:, 0]
    torch.manual_seed(1)
    got = head_logprobs(module, hidden, target)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    for one, other in zip(*(torch.autograd.grad(v.square().sum(), used) for v in (got, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_lora_disabled_and_merged() -> None:
    model = lora_model().eval()
    module, hidden, target = model.base_model.model.lm_head, operands(9)["hidden"], targets()

    def expected() -> Tensor:
        return model(hidden).log_softmax(-1).gather(1, target[:, None])[:, 0]

    with_adapter = expected()
    with model.disable_adapter():
        base = head_logprobs(module, hidden, target)[0]
        torch.testing.assert_close(base, expected(), rtol=0, atol=1e-10)
    assert (base - with_adapter).abs().max() > 0.1
    module.merge()
    torch.testing.assert_close(head_logprobs(module, hidden, target)[0], with_adapter, rtol=0, atol=1e-10)
    with model.disable_adapter():
        torch.testing.assert_close(head_logprobs(module, hidden, target)[0], base, rtol=0, atol=1e-10)


def test_modules_to_save_uses_the_active_copy() -> None:
    class Body(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(HIDDEN, HIDDEN)

    config = peft.LoraConfig(target_modules=["body"], modules_to_save=["lm_head"])
    model: Any = peft.get_peft_model(Body().double(), config)
    module, hidden, target = model.base_model.model.lm_head, operands(9)["hidden"], targets()
    copy = module.modules_to_save["default"]
    copy.weight.data.mul_(3)
    got = head_logprobs(module, hidden, target)[0]
    torch.testing.assert_close(got, plain(hidden, copy.weight, target)[0], rtol=0, atol=1e-10)
    assert torch.autograd.grad(got.sum(), copy.weight)[0].any()
    with model.disable_adapter():
        got = head_logprobs(module, hidden, target)[0]
    torch.testing.assert_close(got, plain(hidden, module.original_module.weight, target)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("tied", "tokens"), [(True, [5, 9, 11]), (False, [5, 9, 11]), (False, {"embed_tokens": [5, 9], "lm_head": [9, 11]})]
)
def test_trained_tokens_score_as_in_the_models_own_forward(tied: bool, tokens: Any) -> None:
    """`trainable_token_indices` put rows in the embedding and, where it is tied, in the head."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens, init_lora_weights=False)
    # Tokens that the tokenizer lacks are scored and not sampled.
    base = tiny.model(vocab_size=len(tiny.tokenizer()), tie_word_embeddings=tied, dtype=torch.float64)
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "trainable_tokens" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    prepare_for_scoring(model)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])

    def packed() -> Tensor:
        return score(model, pack([Group([5, 6, 7, 8], [Completion([9, 10, 11])])])).logprobs

    def plain() -> Tensor:
        return model(input_ids=ids).logits[0, 3:6].log_softmax(-1).gather(-1, ids[0, 4:, None])[:, 0]

    found: list[dict[str, Tensor]] = []
    for values in (packed, plain):
        model.zero_grad()
        values().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any("trainable_tokens" in name for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(packed(), plain(), rtol=0, atol=1e-12)
        trained = packed()
        with model.disable_adapter():
            torch.testing.assert_close(packed(), plain(), rtol=0, atol=1e-12)
            assert float((packed() - trained).abs().max()) > 1e-3
        engine = make_engine(model, tiny.tokenizer())
        (sampled,) = engine.generate([Request([5, 6], 1, SamplingParams(6, temperature=1.0))], seed=0, step=0)
        scored = score(model, pack([Group([5, 6], sampled)])).logprobs
        torch.testing.assert_close(scored.tolist(), sampled[0].sampler_logprobs, rtol=0, atol=1e-5)
        merged = model.merge_and_unload()
        prepare_for_scoring(merged)
        merged_values = score(merged, pack([Group([5, 6, 7, 8], [Completion([9, 10, 11])])])).logprobs
        torch.testing.assert_close(merged_values, trained, rtol=0, atol=1e-12)


def test_unreadable_heads_are_refused_by_name() -> None:
    hidden, target = operands()["hidden"], targets()

    class Linear4bit(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return super().forward(input)

    cases = [
        (Linear4bit(HIDDEN, VOCAB), "Linear4bit.*exclude the head from quantisation"),
        (nn.Embedding(VOCAB, HIDDEN), "Embedding.*exclude"),
        (lora_model(use_dora=True).base_model.model.lm_head, "Dora.*plain LoRA"),
    ]
    for module, message in cases:
        with pytest.raises(ModelError, match=message):
            head_logprobs(module, hidden, target)
    assert isinstance(cases[2][0], LoraLinear)
    with pytest.raises(ConfigError, match=r"temperature = 0\.0"):
        tiled_logprobs(hidden, operands()["weight"], target, temperature=0.0)


def test_autocast_reads_the_hidden_states_in_its_dtype() -> None:
    linear, hidden, target = nn.Linear(HIDDEN, VOCAB), torch.randn(NUM_TOKENS, HIDDEN), targets()
    with torch.autocast("cpu", torch.bfloat16):
        got = head_logprobs(linear, hidden, target)[0]
        expected = linear(hidden).float().log_softmax(-1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(got, expected, rtol=0, atol=0.02)  # bf16 rounds the sum with the bias, we do not
    assert torch.autograd.grad(got.sum(), linear.weight)[0].dtype == torch.float32


TINY = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "fields", "spec"),
    [
        ("llama", {}, HeadSpec()),
        ("gpt2", {"n_embd": 16, "n_head": 2, "n_layer": 1}, HeadSpec()),
        ("gemma2", {"final_logit_softcapping": 0.5}, HeadSpec(1.0, 0.5)),
        ("gemma3_text", {"final_logit_softcapping": 0.5}, HeadSpec(1.0, 0.5)),
        ("gemma3_text", {"final_logit_softcapping": None}, HeadSpec()),
        ("cohere", {"logit_scale": 0.25}, HeadSpec(0.25)),
        ("cohere2", {"logit_scale": 0.25}, HeadSpec(0.25)),
        ("granite", {"logits_scaling": 8.0}, HeadSpec(0.125)),
        ("granitemoe", {"logits_scaling": 8.0, "num_local_experts": 2, "num_experts_per_tok": 1}, HeadSpec(0.125)),
        ("nanochat", {"final_logit_softcapping": 0.5}, HeadSpec(1.0, 0.5)),
        ("vaultgemma", {"final_logit_softcapping": 0.5}, HeadSpec(1.0, 0.5)),
        ("hyperclovax", {"logits_scaling": 8.0}, HeadSpec(8.0)),
    ],
)
def test_head_spec_reproduces_the_models_own_logits(name: str, fields: dict[str, Any], spec: HeadSpec) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **(TINY | fields))
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert head_spec(config) == spec
    seen: list[Tensor] = []
    head = model.get_output_embeddings()
    head.weight.data.normal_()
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ids = torch.randint(3, 40, (1, 6))
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
        target = torch.randint(40, (6,))
        logprob, entropy = head_logprobs(head, seen[0][0], target, spec=head_spec(config), with_entropy=True)[:2]
    logp = logits.log_softmax(-1)
    torch.testing.assert_close(logprob, logp.gather(1, target[:, None])[:, 0], rtol=0, atol=1e-5)  # fp32
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1), rtol=0, atol=1e-5)
