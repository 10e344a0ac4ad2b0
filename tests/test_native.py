"""The in-process engines against transformers' own forward and generate, on tiny random models in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from burnish.errors import ConfigError, EngineError
from burnish.rollout import native
from burnish.rollout.collect import collect
from burnish.rollout.engine import Request, SamplingParams
from burnish.rollout.engines import cache_tokens, make_engine
from burnish.rollout.lockstep import LockstepEngine
from burnish.rollout.native import NativeEngine
from burnish.rollout.packed_linears import packed_linears, siblings
from burnish.rollout.stop_strings import StopMatcher
from burnish.types import Completion, Group, StopReason

VOCABULARY = 257
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.3}
CONFIGS: dict[str, Any] = {
    "llama": lambda: tf.LlamaConfig(**SMALL),
    "gpt2": lambda: tf.GPT2Config(**GPT2, bos_token_id=None, eos_token_id=None),
    "mistral": lambda: tf.MistralConfig(**SMALL, sliding_window=5),
    "gemma2": lambda: tf.Gemma2Config(
        **SMALL,
        sliding_window=5,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **SMALL, sliding_window=5, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt_oss": lambda: tf.GptOssConfig(
        **SMALL, sliding_window=5, num_local_experts=2, num_experts_per_tok=1, attention_dropout=0.0
    ),
    "mamba": lambda: tf.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token per byte, so a character may need several tokens; 256 is a special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def build(name: str) -> Any:
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def plain_logits(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    """[T, V] logits of the whole sequence by an eager forward of transformers, without cache."""
    used = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
    model.set_attn_implementation(used)
    return logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2", "gemma3", "gpt_oss"])
def test_greedy_equals_generate(name: str, tokenizer: Any) -> None:
    model = build(name)
    model.set_attn_implementation("eager")
    asked = prompts(9, 3, 12)
    expected = [
        model.generate(
            torch.tensor([p]), attention_mask=torch.ones(1, len(p)), do_sample=False, max_new_tokens=20, pad_token_id=0
        )[0, len(p) :].tolist()
        for p in asked
    ]
    params = SamplingParams(20, temperature=0.0)
    got = NativeEngine(model, tokenizer, max_running=4).generate([Request(p, 2, params) for p in asked], seed=0, step=0)
    assert [[c.token_ids for c in group] for group in got] == [[tokens, tokens] for tokens in expected]
    assert all(c.sampler_logprobs == [0.0] * 20 for group in got for c in group)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_logprobs_are_those_of_a_plain_forward(name: str, tokenizer: Any) -> None:
    model = build(name)
    requests = [
        Request(prompts(9)[0], 5, SamplingParams(17, temperature=0.8), 0),
        Request(prompts(4)[0], 3, SamplingParams(70, temperature=1.3), 1),
    ]
    got = NativeEngine(model, tokenizer, max_running=6).generate(requests, seed=3, step=1)
    for request, group in zip(requests, got, strict=True):
        for completion in group:
            logits = plain_logits(model, [*request.prompt_ids, *completion.token_ids])[len(request.prompt_ids) - 1 : -1]
            logprobs = (logits / request.params.temperature).log_softmax(-1)
            expected = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            assert completion.sampler_logprobs == completion.policy_logprobs
            # 2e-5: logits of size 10 divided by the temperature, through two orders of summation in fp32.
            torch.testing.assert_close(torch.tensor(completion.policy_logprobs), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("most_copied", [8, 128])
def test_prompts_that_begin_alike_are_read_once(
    name: str, most_copied: int, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts of one task after some turns are sampled as if each were computed apart."""
    monkeypatch.setattr(native, "_COPIED_PROMPT_TOKENS", most_copied)
    start, *ends = prompts(40, 3, 9, 17)
    contexts = [[*start, *end] for end in ends]
    engine, params = NativeEngine(build(name), tokenizer), SamplingParams(12)
    requests = [Request(ids, 1, params, index=7, first_sample=i) for i, ids in enumerate(contexts)]
    together = engine.generate(requests, seed=1, step=0)
    assert engine.last_stats.prompt_tokens == 40 + 3 + 9 + 17
    apart = [engine.generate([request], seed=1, step=0)[0] for request in requests]
    for [a], [b] in zip(together, apart, strict=True):
        assert a.token_ids == b.token_ids
        torch.testing.assert_close(a.policy_logprobs, b.policy_logprobs, atol=2e-5, rtol=0)


def test_truncated_logprobs_are_renormalised(tokenizer: Any) -> None:
    model = build("llama")
    prompt = prompts(6)[0]
    params = SamplingParams(12, top_k=7, top_p=0.9)
    (group,) = NativeEngine(model, tokenizer).generate([Request(prompt, 4, params)], seed=0, step=0)
    for completion in group:
        probs = plain_logits(model, [*prompt, *completion.token_ids])[len(prompt) - 1 : -1].softmax(-1)
        for row, token, sampler in zip(probs, completion.token_ids, completion.sampler_logprobs or [], strict=True):
            top = row.topk(7).values
            size = int((top.cumsum(-1) < 0.9 * top.sum()).sum()) + 1
            assert row[token] >= top[size - 1] - 1e-6
            assert sampler == pytest.approx(float((row[token] / top[:size].sum()).log()), abs=1e-4)


def test_samples_do_not_depend_on_their_batch(tokenizer: Any) -> None:
    model = build("llama")
    asked = prompts(9, 3, 12, 40)
    requests = [Request(p, 4, SamplingParams(24), i) for i, p in enumerate(asked)]

    def sample(order: Sequence[int], **bounds: Any) -> dict[int, list[list[int]]]:
        engine = NativeEngine(model, tokenizer, **bounds)
        got = engine.generate([requests[i] for i in order], seed=5, step=2)
        return {i: [c.token_ids for c in group] for i, group in zip(order, got, strict=True)}

    whole = sample(range(4))
    others = [sample([3, 1, 2, 0]), sample([2]), sample(range(4), max_running=3), sample([0, 1], max_cache_tokens=96)]
    pairs = [(whole[i][k], part[i][k]) for part in others for i in part for k in range(4)]
    # Sums in another order may move a border of the cumulative distribution past a uniform: about 1e-6 per token.
    assert sum(a != b for a, b in pairs) <= 1
    assert len({tuple(tokens) for group in whole.values() for tokens in group}) == 16


def test_samples_can_be_split_over_ranks_and_change_with_seed_and_step(tokenizer: Any) -> None:
    engine = NativeEngine(build("llama"), tokenizer)
    request = Request(prompts(5)[0], 4, SamplingParams(8), 11)

    def tokens(asked: Request, seed: int = 0, step: int = 0) -> list[list[int]]:
        return [c.token_ids for c in engine.generate([asked], seed=seed, step=step)[0]]

    whole = tokens(request)
    assert tokens(request) == whole
    assert tokens(replace(request, num_samples=2)) + tokens(replace(request, num_samples=2, first_sample=2)) == whole
    assert whole != tokens(request, seed=1) != tokens(request, step=1) != whole


def test_completions_end_at_their_eos(tokenizer: Any) -> None:
    model = build("llama")
    requests = [Request(p, 4, SamplingParams(30), i) for i, p in enumerate(prompts(5, 9))]
    engine = NativeEngine(model, tokenizer, max_running=5)
    free = engine.generate(requests, seed=0, step=0)
    ends = (free[0][0].token_ids[3], free[1][2].token_ids[0])
    cut = engine.generate([replace(r, params=replace(r.params, eos_token_ids=ends)) for r in requests], seed=0, step=0)
    for before, after in zip((c for g in free for c in g), (c for g in cut for c in g), strict=True):
        places = [i for i, token in enumerate(before.token_ids) if token in ends]
        length = places[0] + 1 if places else 30
        assert after.token_ids == before.token_ids[:length]
        assert after.stop_reason == (StopReason.EOS if places else StopReason.LENGTH)
        assert len(after.sampler_logprobs or []) == len(after.policy_logprobs or []) == length


def test_stop_matcher_sees_across_tokens_and_bytes(tokenizer: Any) -> None:
    text = "añ→b 🙂 END of it"
    tokens: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    for stop, kept in ((("ND o",), "añ→b 🙂 E"), (("🙂",), "añ→b "), (("→b", "ñ→"), "a"), (("zzz",), None)):
        matcher, found, count = StopMatcher(tokenizer, stop), None, 0
        while found is None and count < len(tokens):
            found = matcher.push(tokens[count])
            count += 1
        assert found == kept
        if kept is not None:
            first_end = min(text.find(s) + len(s) for s in stop if s in text)
            assert count == len(text[:first_end].encode())  # one token per byte


def test_stop_strings_end_a_completion(tokenizer: Any) -> None:
    model = build("llama")
    request = Request(prompts(5)[0], 3, SamplingParams(40))
    engine = NativeEngine(model, tokenizer)
    (free,) = engine.generate([request], seed=0, step=0)
    for sample, completion in enumerate(free):
        ascii_pairs = [
            i for i, (a, b) in enumerate(zip(completion.text, completion.text[1:], strict=False)) if (a + b).isascii()
        ]
        stop = completion.text[ascii_pairs[-1] : ascii_pairs[-1] + 2]
        (cut,) = engine.generate([replace(request, params=replace(request.params, stop=(stop,)))], seed=0, step=0)
        assert cut[sample].stop_reason == StopReason.STOP
        assert cut[sample].text == completion.text[: completion.text.find(stop)]
        length = len(cut[sample].token_ids)
        assert cut[sample].token_ids == completion.token_ids[:length]
        assert stop in tokenizer.decode(cut[sample].token_ids)
        assert stop not in tokenizer.decode(cut[sample].token_ids[:-1])


@pytest.mark.parametrize("max_cache_tokens", [None, 64, 160])
def test_admission_keeps_the_bounds(tokenizer: Any, max_cache_tokens: int | None) -> None:
    model = build("llama")
    engine = NativeEngine(model, tokenizer, max_running=3, max_cache_tokens=max_cache_tokens)
    requests = [Request(p, 4, SamplingParams(9 + 5 * i), i) for i, p in enumerate(prompts(5, 30, 7, 11))]
    seen: list[tuple[int, int, int]] = []
    got = engine.generate(requests, seed=0, step=0, on_progress=lambda *state: seen.append(state))
    stats = engine.last_stats
    assert stats.peak_rows <= 3
    assert stats.prompt_tokens == 53
    assert stats.decoded_tokens == sum(len(c.token_ids) for group in got for c in group) == 4 * (9 + 14 + 19 + 24)
    assert seen[-1] == (16, 16, stats.decoded_tokens)
    assert [a[0] for a in seen] == sorted(a[0] for a in seen)
    if max_cache_tokens is not None:
        bytes_per_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head size, fp32
        assert stats.peak_cache_bytes <= max_cache_tokens * bytes_per_token


@pytest.mark.parametrize(("name", "bytes_per_token"), [("llama", 2 * 2 * 2 * 8 * 4), ("gpt2", 2 * 2 * 4 * 8 * 4)])
def test_a_bound_in_bytes_is_kept_by_waves(name: str, bytes_per_token: int, tokenizer: Any) -> None:
    model, params = build(name), SamplingParams(40)
    asked = [Request(prompt, 8, params, index=i) for i, prompt in enumerate(prompts(20, 33, 5))]
    fitting = 4 * 48 + 48  # four completions and a prompt, in steps of 16 tokens
    gib = fitting * bytes_per_token / 2**30
    tokens = cache_tokens(model, gib, prompt=33, completion=40)
    assert tokens == fitting
    free, bounded = NativeEngine(model, tokenizer), NativeEngine(model, tokenizer, max_cache_tokens=tokens)
    wanted, found = (engine.generate(asked, seed=1, step=0) for engine in (free, bounded))
    assert [c.token_ids for group in found for c in group] == [c.token_ids for group in wanted for c in group]
    assert bounded.last_stats.peak_cache_bytes <= gib * 2**30 < free.last_stats.peak_cache_bytes
    assert bounded.last_stats.peak_rows == 4
    with pytest.raises(
        ConfigError, match=r"max_completion_length = 400 after a prompt of 33 .* takes .* GiB; raise it"
    ):
        cache_tokens(model, gib, prompt=33, completion=400)


def test_a_model_without_keys_and_values_has_no_bound() -> None:
    assert cache_tokens(build("mamba"), 1e-9, prompt=100, completion=100) is None


def test_what_cannot_be_served_is_said(tokenizer: Any) -> None:
    model = build("llama")
    with pytest.raises(ConfigError, match="max_running = 0"):
        NativeEngine(model, tokenizer, max_running=0)
    engine = NativeEngine(model, tokenizer, max_cache_tokens=31)
    with pytest.raises(EngineError, match="max_cache_tokens = 31"):
        engine.generate([Request([1], 1, SamplingParams(4))], seed=0, step=0)
    with pytest.raises(EngineError, match=r"requests\[0\]\.prompt_ids"):
        engine.generate([Request([], 1, SamplingParams(4))], seed=0, step=0)
    with pytest.raises(EngineError, match="num_samples = 0"):
        engine.generate([Request([1], 0, SamplingParams(4))], seed=0, step=0)
    assert engine.generate([], seed=0, step=0) == []


def test_modes_come_back_and_training_still_works(tokenizer: Any) -> None:
    model = build("llama").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    NativeEngine(model, tokenizer).generate([Request(prompts(5)[0], 2, SamplingParams(4))], seed=0, step=0)
    assert [module.training for module in model.modules()] == before
    model(input_ids=torch.tensor(prompts(6)), use_cache=False).logits.sum().backward()
    assert model.model.embed_tokens.weight.grad is not None


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "mamba"])
def test_packed_weights_change_speed_only(name: str, tokenizer: Any) -> None:
    model = build(name).to(torch.bfloat16)
    requests = [Request(p, 4, SamplingParams(12), i) for i, p in enumerate(prompts(5, 150))]
    packed, plain = (
        NativeEngine(model, tokenizer, pack_weights=pack).generate(requests, seed=0, step=0) for pack in (True, False)
    )
    assert not any("forward" in module.__dict__ for module in model.modules())
    pairs = [(a, b) for x, y in zip(packed, plain, strict=True) for a, b in zip(x, y, strict=True)]
    for a, b in pairs:
        # Equal up to the first token where the two roundings to bf16 draw apart.
        shared = next((i for i, (s, t) in enumerate(zip(a.token_ids, b.token_ids, strict=True)) if s != t), 12)
        got, expected = torch.tensor(a.policy_logprobs)[:shared], torch.tensor(b.policy_logprobs)[:shared]
        # Logits of size 10 in bf16 are known to 0.03.
        torch.testing.assert_close(got, expected, atol=0.25, rtol=0)
    assert sum(a.token_ids == b.token_ids for a, b in pairs) >= 5


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft calls it
def test_layers_that_read_the_same_input_are_one_product(tokenizer: Any) -> None:
    adapter = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    model = peft.get_peft_model(build("llama").to(torch.bfloat16), adapter, autocast_adapter_dtype=False)
    names = {module: name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}

    def run() -> None:
        model(input_ids=torch.tensor(prompts(4)), use_cache=False)

    groups = [[names[layer].split("layers.")[-1] for layer in group] for group in siblings(list(names), run)]
    assert groups[:6] == [
        [f"0.self_attn.{name}" for name in (
            "q_proj.base_layer", "q_proj.lora_A.default", "k_proj", "v_proj.base_layer", "v_proj.lora_A.default",
        )],
        ["0.self_attn.q_proj.lora_B.default"],
        ["0.self_attn.v_proj.lora_B.default"],
        ["0.self_attn.o_proj"],
        ["0.mlp.gate_proj", "0.mlp.up_proj"],
        ["0.mlp.down_proj"],
    ]  # fmt: skip
    assert sorted(name for group in groups for name in group) == sorted(n.split("layers.")[-1] for n in names.values())


def test_a_product_is_computed_again_for_another_or_a_changed_input() -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 32, bias=bias, dtype=torch.bfloat16) for bias in (True, False)]
    model, hidden = torch.nn.ModuleList(layers), torch.randn(3, 64, dtype=torch.bfloat16)
    plain = [layer.forward for layer in layers]

    def run() -> None:
        for layer in layers:
            layer(hidden)

    with torch.no_grad(), packed_linears(model, 3, run):
        for change in (lambda: hidden, lambda: hidden.clone().mul_(2), lambda: hidden.add_(1)):
            given = change()
            for layer, forward in zip(layers, plain, strict=True):
                torch.testing.assert_close(layer(given), forward(given), atol=0.02, rtol=0.01)  # bf16 rounds sums
        # The second layer alone, after the first has been computed for a tensor that changed since.
        layers[0](hidden)
        hidden.mul_(3)
        torch.testing.assert_close(layers[1](hidden), plain[1](hidden), atol=0.05, rtol=0.01)
    assert [layer.forward for layer in layers] == plain


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft calls it
def test_adapters_stay_active(tokenizer: Any) -> None:
    torch.manual_seed(1)
    adapter = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build("llama"), adapter)
    prompt, params = prompts(6)[0], SamplingParams(12)
    (group,) = NativeEngine(model, tokenizer).generate([Request(prompt, 2, params)], seed=0, step=0)
    for completion in group:
        row = [*prompt, *completion.token_ids]

        def logprobs(row: list[int] = row, tokens: list[int] = completion.token_ids) -> torch.Tensor:
            logits = plain_logits(model.get_base_model(), row)[len(prompt) - 1 : -1]
            return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]

        got = torch.tensor(completion.policy_logprobs)
        torch.testing.assert_close(got, logprobs(), atol=2e-5, rtol=0)
        with model.disable_adapter():
            assert (got - logprobs()).abs().max() > 0.01


def test_a_state_space_model_runs_in_lockstep(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = build("mamba")
    engine = make_engine(model, tokenizer, max_running=4)
    assert isinstance(engine, LockstepEngine)
    assert "one row per completion" in caplog.text
    assert isinstance(make_engine(build("llama"), tokenizer), NativeEngine)
    end = 77
    requests = [Request(p, 3, SamplingParams(12, eos_token_ids=(end,)), i) for i, p in enumerate(prompts(5, 5, 8))]
    got = engine.generate(requests, seed=0, step=0)
    for request, group in zip(requests, got, strict=True):
        for completion in group:
            logits = plain_logits(model, [*request.prompt_ids, *completion.token_ids])[len(request.prompt_ids) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.policy_logprobs), expected, atol=2e-5, rtol=0)


def test_lockstep_and_native_draw_the_same(tokenizer: Any) -> None:
    model = build("llama")
    requests = [Request(p, 5, SamplingParams(16), i) for i, p in enumerate(prompts(5, 5, 8))]
    native = NativeEngine(model, tokenizer, max_running=6).generate(requests, seed=0, step=0)
    ends = (native[0][0].token_ids[2], native[1][1].token_ids[5], native[2][2].token_ids[1])
    requests = [replace(r, params=replace(r.params, eos_token_ids=ends)) for r in requests]
    pairs: list[tuple[Completion, Completion]] = []
    for a, b in zip(
        NativeEngine(model, tokenizer).generate(requests, seed=0, step=0),
        LockstepEngine(model, tokenizer, max_running=6).generate(requests, seed=0, step=0),
        strict=True,
    ):
        pairs += zip(a, b, strict=True)
    assert sum(a.token_ids != b.token_ids or a.text != b.text for a, b in pairs) <= 1  # a near-tie, as above


def test_collect_fills_groups(tokenizer: Any) -> None:
    groups = [Group(p, [], index=i) for i, p in enumerate(prompts(5, 8))]
    engine = NativeEngine(build("llama"), tokenizer)
    collect(engine, groups, num_generations=3, params=SamplingParams(6), seed=0, step=4)
    assert [len(group.completions) for group in groups] == [3, 3]
    assert all(c.stop_reason == StopReason.LENGTH and len(c.token_ids) == 6 for g in groups for c in g.completions)
