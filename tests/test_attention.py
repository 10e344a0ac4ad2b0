"""Shared-prefix attention against one plain eager forward per sequence, and the seam it stands on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from burnish.errors import CheckFailed, ModelError
from burnish.model import prefix
from burnish.model import self_test as support_module
from burnish.model.attention import IMPLEMENTATION, AttentionCall, SlidingWindow, install, math_attention, use_layout
from burnish.model.prefix import PrefixLayout, _mask_mod
from burnish.model.self_test import supports_prefix
from burnish.types import GroupSpan

# (prompt, completions): uneven lengths, one of a single token, a group of one, an empty prompt.
GROUPS = ((9, (5, 1, 11)), (6, (7,)), (0, (4, 3)))
SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "output_router_logits": False, "experts_implementation": "eager"}
SLIDING_FULL = ["sliding_attention", "full_attention"]


def gpt2() -> hf.PreTrainedConfig:
    sizes = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
    tokens = {"bos_token_id": None, "eos_token_id": None}
    return hf.GPT2Config(**sizes, **tokens, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)


CONFIGS: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**SMALL),
    "qwen3": lambda: hf.Qwen3Config(**SMALL),
    "gemma3": lambda: hf.Gemma3TextConfig(**SMALL, sliding_window=4, layer_types=SLIDING_FULL),
    "gemma2": lambda: hf.Gemma2Config(**SMALL, sliding_window=4, layer_types=SLIDING_FULL, attn_logit_softcapping=2.0),
    "mistral": lambda: hf.MistralConfig(**SMALL, sliding_window=4),
    "gpt2": gpt2,
    "mixtral": lambda: hf.MixtralConfig(**SMALL, **MOE, num_local_experts=4),
    "gpt_oss": lambda: hf.GptOssConfig(
        **SMALL, **MOE, num_local_experts=4, sliding_window=4, layer_types=SLIDING_FULL, rope_scaling=None
    ),
}


def build(name: str, **changes: Any) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    for field, value in changes.items():
        setattr(config, field, value)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().train()
    for parameter in model.parameters():  # biases, norms and sinks start at constants, which hides errors
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def packed_row(groups: tuple[tuple[int, tuple[int, ...]], ...] = GROUPS) -> tuple[Tensor, PrefixLayout, list[Tensor]]:
    """Random tokens [1, T], their layout, and the places in the row of every sequence (prompt, completion)."""
    spans: list[GroupSpan] = []
    sequences: list[Tensor] = []
    end = 0
    for prompt_length, lengths in groups:
        prompt = (end, prompt_length)
        end += prompt_length
        completions: list[tuple[int, int]] = []
        for length in lengths:
            completions.append((end, length))
            sequences.append(torch.cat((torch.arange(prompt[0], sum(prompt)), torch.arange(end, end + length))))
            end += length
        spans.append(GroupSpan(prompt, tuple(completions)))
    tokens = torch.randint(61, (1, end), generator=torch.Generator().manual_seed(1))
    return tokens, PrefixLayout(tuple(spans)), sequences


@pytest.mark.parametrize("window", [None, 1, 3, 4])
def test_the_mask_of_flex_attention_is_that_of_the_sequences(window: int | None) -> None:
    """A token sees what comes before it in its own sequence; the kernel that reads the mask needs a GPU."""
    tokens, layout, _ = packed_row()
    length = tokens.shape[1]
    expected = torch.zeros(length, length, dtype=torch.bool)
    for span in layout.spans:
        for start, size in span.completions or ((0, 0),):
            row = [*range(span.prompt[0], sum(span.prompt)), *range(start, start + size)]
            for place, query in enumerate(row):
                first = 0 if window is None else max(place - window + 1, 0)
                expected[query, row[first : place + 1]] = True
    index, zero = torch.arange(length), torch.zeros((), dtype=torch.long)
    rule = None if window is None else SlidingWindow(window)
    mask = _mask_mod(layout.spans, torch.device("cpu"), rule)(zero, zero, index[:, None], index[None])
    assert torch.equal(mask.expand(length, length), expected)


def packed_logits(model: nn.Module, tokens: Tensor, layout: PrefixLayout) -> Tensor:
    ones = torch.ones_like(tokens)
    with use_layout(layout, model):
        out = model(tokens, attention_mask=ones, position_ids=layout.position_ids, use_cache=False)
    return out.logits[0]


def gradients(model: nn.Module, losses: list[Tensor]) -> dict[str, Tensor]:
    torch.stack(losses).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads


def run_packed(model: nn.Module) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Logits of every sequence and the gradient of a loss over all of them, from one packed row."""
    tokens, layout, sequences = packed_row()
    logits = packed_logits(model, tokens, layout)
    rows = [logits[places] for places in sequences]
    return rows, gradients(model, [loss(row) for row in rows])


def run_separately(model: nn.Module) -> tuple[list[Tensor], dict[str, Tensor]]:
    tokens, _, sequences = packed_row()
    rows = [model(tokens[:, places], use_cache=False).logits[0] for places in sequences]
    return rows, gradients(model, [loss(row) for row in rows])


def loss(logits: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).reshape(logits.shape)
    return (logits.log_softmax(-1) * weights).sum()


def assert_same(got: tuple[list[Tensor], dict[str, Tensor]], wanted: tuple[list[Tensor], dict[str, Tensor]]) -> None:
    # RMS norms, rotary tables and eager's softmax compute in fp32 even in a float64 model: fp32 rounding remains.
    for ours, theirs in zip(got[0], wanted[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert got[1].keys() == wanted[1].keys()
    for name, theirs in wanted[1].items():
        error = (got[1][name] - theirs).norm() / (theirs.norm() + 1e-3)
        assert error < 2e-5, (name, float(error))


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_row_equals_separate_eager_forwards(name: str) -> None:
    model = build(name)
    wanted = run_separately(model)
    install(model)
    assert_same(run_packed(model), wanted)


def test_tiles_of_any_size_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gemma3")
    wanted = run_separately(model)
    install(model)
    monkeypatch.setattr(prefix, "_MAX_QUERIES", 3)
    monkeypatch.setattr(prefix, "_MAX_SCORES", 64)
    monkeypatch.setattr(prefix, "_MIN_BUCKET", 0)
    assert_same(run_packed(model), wanted)


@pytest.mark.parametrize("rule", [None, SlidingWindow(4)])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_tiles_equal_a_dense_mask_in_float64(
    rule: SlidingWindow | None, softcap: float | None, with_sinks: bool
) -> None:
    _, layout, sequences = packed_row()
    length = layout.position_ids.shape[1]
    torch.manual_seed(2)
    query, key, value = (torch.randn(1, heads, length, 8, dtype=torch.float64) for heads in (4, 2, 2))
    inputs = [query, key, value] + ([torch.randn(4, dtype=torch.float64)] if with_sinks else [])
    seen = torch.zeros(length, length, dtype=torch.bool)
    for places in sequences:
        positions = torch.arange(len(places))
        seen[places[:, None], places] = (rule or SlidingWindow(length))(positions, positions)
    weights = torch.randn(1, length, 4, 8, dtype=torch.float64)
    results: list[tuple[Tensor, ...]] = []
    for dense in (True, False):
        leaves = [x.clone().requires_grad_() for x in inputs]
        sinks = leaves[3] if with_sinks else None
        call = AttentionCall(nn.Module(), 0, leaves[0], leaves[1], leaves[2], 0.7, softcap, sinks, rule)
        out = math_attention(call, *leaves[:3], seen).transpose(1, 2) if dense else layout.attend(call)
        results.append((out, *torch.autograd.grad((out * weights).sum(), leaves)))
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)  # float64 throughout


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_with_the_layout(reentrant: bool) -> None:
    model = build("mistral")
    install(model)
    wanted = run_packed(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = run_packed(model)
    for name, theirs in wanted[1].items():
        assert torch.equal(got[1][name], theirs), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_lora_gradients_equal_separate_forwards() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    wanted = run_separately(model)
    install(model)
    assert_same(run_packed(model), wanted)


def test_autocast_serves_mixed_dtypes() -> None:
    model = build("llama").float()
    install(model)
    tokens, layout, _ = packed_row()
    with torch.autocast("cpu", torch.bfloat16):
        logits = packed_logits(model, tokens, layout)
    torch.testing.assert_close(logits.float(), packed_logits(model, tokens, layout), rtol=0, atol=0.3)  # bf16


def test_a_completion_does_not_see_its_siblings() -> None:
    model = build("llama")
    install(model)
    tokens, layout, _ = packed_row()
    before = packed_logits(model, tokens, layout)
    first, second = layout.spans[0].completions[:2]
    tokens[0, first[0] : sum(first)] += 1
    after = packed_logits(model, tokens % 61, layout)
    assert torch.equal(before[second[0] : sum(second)], after[second[0] : sum(second)])
    assert not torch.equal(before[first[0] : sum(first)], after[first[0] : sum(first)])


def test_a_layout_that_is_never_called_is_an_error() -> None:
    model = build("llama")
    tokens, layout, _ = packed_row()
    with pytest.raises(CheckFailed, match=r"LlamaForCausalLM never called"):
        packed_logits(model, tokens, layout)
    with pytest.raises(ZeroDivisionError), use_layout(layout, model):
        raise ZeroDivisionError


def test_layouts_nest_and_leave_nothing_behind() -> None:
    model = build("llama")
    install(model)
    tokens, layout, _ = packed_row()
    other_tokens, other, _ = packed_row(((3, (2, 2)),))
    plain = model(tokens).logits
    wanted = packed_logits(model, tokens, layout)
    with use_layout(layout, model):
        packed_logits(model, other_tokens, other)
        inner = model(tokens, torch.ones_like(tokens), position_ids=layout.position_ids, use_cache=False).logits[0]
    assert torch.equal(inner, wanted)
    assert torch.equal(model(tokens).logits, plain)


def test_dropout_unknown_tensors_and_padding_are_refused() -> None:
    tokens, layout, _ = packed_row()
    model = build("llama", attention_dropout=0.5)
    install(model)
    with pytest.raises(ModelError, match=r"dropout = 0\.5"):
        packed_logits(model, tokens, layout)
    packed_logits(model.eval(), tokens, layout)
    ones = torch.ones_like(tokens)
    with pytest.raises(ModelError, match="position_bias"), use_layout(layout):
        model(tokens, attention_mask=ones, use_cache=False, position_bias=torch.zeros(1))
    with pytest.raises(ModelError, match="zeros"), use_layout(layout):
        model(tokens, attention_mask=ones - torch.eye(1, ones.shape[1], dtype=torch.long), use_cache=False)
    with pytest.raises(ModelError, match="packed"), use_layout(layout):
        model(tokens, position_ids=layout.position_ids, use_cache=False)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_without_a_layout_it_is_sdpa(name: str) -> None:
    model = build(name).eval()
    model.set_attn_implementation("sdpa")
    tokens = torch.randint(61, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    sampling = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    wanted = model(tokens, attention_mask=mask).logits, model.generate(tokens, **sampling)
    install(model)
    got = model(tokens, attention_mask=mask).logits, model.generate(tokens, **sampling)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_without_a_layout_caps_and_sinks_equal_eager(name: str) -> None:
    # Eager masks with the dtype's minimum, which its fp32 softmax turns into NaN in a float64 model.
    model = build(name).float().eval()
    tokens = torch.randint(61, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    wanted = model(tokens, attention_mask=mask).logits
    install(model)
    got = model(tokens, attention_mask=mask).logits
    seen = mask.bool()
    torch.testing.assert_close(got[seen], wanted[seen], rtol=1e-4, atol=1e-4)  # fp32


def test_saved_model_does_not_name_the_implementation(tmp_path: Any) -> None:
    model = build("llama")
    install(model)
    model.save_pretrained(tmp_path)
    assert IMPLEMENTATION not in (tmp_path / "config.json").read_text()
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"


def test_install_refuses_what_is_no_transformers_model() -> None:
    with pytest.raises(ModelError, match="Linear"):
        install(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "mixtral"])
def test_self_test_accepts(name: str) -> None:
    model = build(name)
    state = torch.random.get_rng_state()
    support = supports_prefix(model)
    assert support.ok, support.reason
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.config._attn_implementation == "eager"
    assert model.training


def test_self_test_refuses_a_state_space_model() -> None:
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    support = supports_prefix(hf.MambaForCausalLM(hf.MambaConfig(**sizes)))
    assert not support.ok
    assert "Mamba" in support.reason


def test_self_test_refuses_convolutions_that_cross_completions() -> None:
    model = hf.Lfm2ForCausalLM(hf.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"], block_ff_dim=40))
    support = supports_prefix(model)
    assert not support.ok
    assert "nats" in support.reason


def test_self_test_uses_the_model_itself_where_no_tiny_one_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support_module, "_architecture", lambda model: {object()})
    model = build("mistral", sliding_window=32).float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert supports_prefix(model).ok
    assert model.config.sliding_window == 32
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
