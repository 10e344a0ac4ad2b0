"""Scoring: packed rows with shared prompts equal one plain forward per sequence, values and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import tiny
from burnish.errors import CheckFailed
from burnish.model.packing import pack
from burnish.model.scoring import causal_lm, eval_mode, noisy_embeddings, prepare_for_scoring, score
from burnish.types import Completion, Group
from live_bytes import LiveBytes

# RMS norms of these compute in fp32 whatever the model's dtype, so float64 is exact to fp32 rounding only.
TOLERANCE = {"gpt2": 1e-13}
DEFAULT_TOLERANCE = 2e-6


def groups(seed: int = 0) -> list[Group]:
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(1, 90, (length,), generator=generator).tolist()

    return [
        Group(ids(9), [Completion(ids(n)) for n in (5, 3, 6)]),
        Group(ids(7), [Completion(ids(4)), Completion(ids(1))]),
        Group([], [Completion(ids(8))]),
        Group(ids(3), [Completion(ids(6), loss_mask=[True, False, True, True, False, True])]),
    ]


def plain_logprobs(model: Any, rows: list[Group], temperature: float) -> tuple[torch.Tensor, ...]:
    """Log-probabilities, entropies, accuracy and log collision: one eager forward of the model per sequence."""
    logprobs, entropies, correct, collisions = [], [], [], []
    for group in rows:
        for completion in group.completions:
            ids = torch.tensor([group.prompt_ids + completion.token_ids])
            logits = model(input_ids=ids, use_cache=False).logits[0] / temperature
            log_all = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32).log_softmax(-1)
            for j, token in enumerate(completion.token_ids):
                place = len(group.prompt_ids) + j
                if place > 0 and (completion.loss_mask is None or completion.loss_mask[j]):
                    logprobs.append(log_all[place - 1, token])
                    entropies.append(-(log_all[place - 1].exp() * log_all[place - 1]).sum())
                    correct.append(log_all[place - 1].argmax() == token)
                    collisions.append((log_all[place - 1].exp() ** 2).sum().log())
    return torch.stack(logprobs), torch.stack(entropies), torch.stack(correct), torch.stack(collisions).detach()


def likeliest(model: Any, group: Group, completion: int, place: int) -> int:
    ids = torch.tensor([group.prompt_ids + group.completions[completion].token_ids[:place]])
    return int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())


def compare(plain: Any, packed: Any, tolerance: float, temperature: float = 0.7) -> None:
    rows = groups()
    # An accuracy of zero would not tell a mistake: some tokens become what the model expects.
    rows[0].completions[0].token_ids[2] = likeliest(plain, rows[0], 0, 2)
    rows[3].completions[0].token_ids[3] = likeliest(plain, rows[3], 0, 3)
    weights = torch.linspace(-1, 1, sum(c.num_scored_tokens for g in rows for c in g.completions) - 1).double()
    expected, entropy, correct, collision = plain_logprobs(plain, rows, temperature)
    ((expected * weights).sum() + 0.3 * (entropy * weights.flip(0)).sum()).backward()
    got = score(packed, pack(rows), temperature=temperature, with_entropy=True, with_collision=True)
    assert got.entropy is not None
    assert got.log_collision is not None
    ((got.logprobs * weights).sum() + 0.3 * (got.entropy * weights.flip(0)).sum()).backward()
    torch.testing.assert_close(got.logprobs, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(got.entropy, entropy, rtol=0, atol=tolerance)
    torch.testing.assert_close(got.log_collision, collision, rtol=0, atol=tolerance)
    assert not got.log_collision.requires_grad
    assert torch.equal(got.correct, correct)
    assert int(correct.sum()) >= 2
    reference = {name: p.grad for name, p in plain.named_parameters()}
    assert reference
    for name, parameter in packed.named_parameters():
        if reference[name] is None:
            assert parameter.grad is None
            continue
        assert parameter.grad is not None, name
        scale = float(reference[name].abs().max()) + 1.0
        torch.testing.assert_close(parameter.grad, reference[name], rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("kind", sorted(tiny.ARCHITECTURES))
def test_packed_equals_one_plain_forward_per_sequence(kind: str) -> None:
    plain = tiny.model(kind, dtype=torch.float64, attn_implementation="eager")
    packed = copy.deepcopy(plain)
    prepare_for_scoring(packed)
    compare(plain, packed, TOLERANCE.get(kind, DEFAULT_TOLERANCE))


def test_models_without_prefix_attention_run_one_row_per_completion(caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "expand": 2}
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    plain = MambaForCausalLM(MambaConfig(**sizes)).eval()
    packed = copy.deepcopy(plain)
    prepare_for_scoring(packed)
    assert sum("one row per completion" in record.message for record in caplog.records) == 1
    compare(plain, packed, DEFAULT_TOLERANCE)


def test_lora_on_attention_and_head() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False)
    base = tiny.model("llama", dtype=torch.float64)
    torch.manual_seed(3)
    packed = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).eval()
    plain = copy.deepcopy(packed)
    prepare_for_scoring(packed)
    compare(plain, packed, DEFAULT_TOLERANCE)
    assert any("lm_head.lora_A" in name and p.grad is not None for name, p in packed.named_parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    plain = tiny.model("llama", dtype=torch.float64)
    packed = copy.deepcopy(plain)
    enable = getattr(packed, "activation_checkpointing_enable", None) or packed.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    packed.enable_input_require_grads()
    packed.train()
    prepare_for_scoring(packed)
    compare(plain, packed, DEFAULT_TOLERANCE)


def test_a_head_that_is_no_plain_function_of_its_weight_runs_unfused(caplog: pytest.LogCaptureFixture) -> None:
    plain = tiny.model("llama", dtype=torch.float64)
    original = type(plain).forward

    class Shifted(type(plain)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = original(self, *args, **kwargs)
            out.logits = out.logits * 1.3
            return out

    plain.__class__ = Shifted
    packed = copy.deepcopy(plain)
    prepare_for_scoring(packed)
    assert any("full logits" in record.message for record in caplog.records)
    compare(plain, packed, DEFAULT_TOLERANCE)


def test_plain_forward_and_generate_still_work() -> None:
    plain = tiny.model("llama")
    packed = copy.deepcopy(plain)
    prepare_for_scoring(packed)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(packed(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert torch.equal(
        packed.generate(ids, max_new_tokens=5, do_sample=False), plain.generate(ids, max_new_tokens=5, do_sample=False)
    )


def test_nothing_scored_has_a_gradient_of_zero() -> None:
    model = tiny.model("llama")
    prepare_for_scoring(model)
    scores = score(model, pack([Group([3], [Completion([4], loss_mask=[False])])]))
    assert scores.logprobs.shape == (0,)
    scores.logprobs.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_what_was_not_asked_for_is_none() -> None:
    model = tiny.model("llama")
    prepare_for_scoring(model)
    scores = score(model, pack(groups()))
    assert scores.entropy is None
    assert scores.log_collision is None
    assert scores.correct.dtype == torch.bool
    scores = score(model, pack(groups()), with_entropy=True)
    logprobs, entropy = scores.logprobs, scores.entropy
    assert logprobs is not None
    assert entropy is not None


NOISY = [
    Group([3, 4, 5], [Completion([6])]),
    Group([], [Completion([7, 8, 9, 10, 11, 12, 13])]),
    Group([1] * 20, [Completion([2] * 12)]),
]


def noise_of(model: Any, alpha: float) -> list[torch.Tensor]:
    """What each sequence's embeddings had added to them, one [L, d] tensor a sequence."""
    seen: list[torch.Tensor] = []
    plain = model.get_input_embeddings().weight
    with noisy_embeddings(model, pack(NOISY), alpha):
        # Runs after the noise: what the decoder gets, less what the table holds.
        handle = model.get_input_embeddings().register_forward_hook(lambda _, i, out: seen.append(out - plain[i[0]]))
        score(model, pack(NOISY))
        handle.remove()
    assert len(seen) == 1
    lengths = [group.num_tokens for group in NOISY]
    rows = seen[0].detach()
    return list(rows[0].split(lengths)) if rows.shape[0] == 1 else [r[:n] for r, n in zip(rows, lengths, strict=True)]


def mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=32, state_size=4, num_hidden_layers=1)).eval()


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_noise_is_scaled_by_each_sequence_and_reproducible(kind: str) -> None:
    model = tiny.model("llama") if kind == "packed" else mamba()
    prepare_for_scoring(model)
    clean = score(model, pack(NOISY)).logprobs
    torch.manual_seed(5)
    found = noise_of(model, alpha=5.0)
    for group, noise in zip(NOISY, found, strict=True):
        bound = 5.0 / (group.num_tokens * 32) ** 0.5
        # 128 uniform draws or more: the largest is within 10% of the bound but for one case in 10^5.
        assert 0.9 * bound < float(noise.abs().max()) <= bound * (1 + 1e-5)
        assert abs(float(noise.mean())) < 5 * bound / (3 * noise.numel()) ** 0.5
    assert torch.equal(score(model, pack(NOISY)).logprobs, clean), "outside there is no noise"
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(found, noise_of(model, alpha=5.0), strict=True))


def test_unprepared_models_are_refused() -> None:
    with pytest.raises(CheckFailed, match="prepare_for_scoring"):
        score(tiny.model("llama"), pack(groups()))


def test_eval_mode_gives_every_module_its_own_mode_back() -> None:
    model = tiny.model("llama").train()
    model.model.layers[0].eval()
    with eval_mode(model):
        assert not any(m.training for m in model.modules())
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training


def test_causal_lm_looks_through_wrappers() -> None:
    model = tiny.model("llama")
    wrapper = torch.nn.Module()
    wrapper.module = model
    assert causal_lm(wrapper) is model


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_live_bytes_grow_with_hidden_not_vocabulary(kind: str) -> None:
    """Peak live bytes of forward and backward: no tensor of N * V, and growth per token well below V."""
    vocabulary = 60_000
    model = tiny.model(kind, vocab_size=vocabulary)
    prepare_for_scoring(model)
    peaks = {}
    for length in (400, 800):
        ids = torch.randint(1, 90, (length,)).tolist()
        batch = pack([Group(ids[:8], [Completion(ids)])])
        with LiveBytes() as live:
            score(model, batch).logprobs.sum().backward()
        assert live.largest < length * vocabulary * 4 / 2
        peaks[length] = live.peak
        model.zero_grad(set_to_none=True)
    growth = (peaks[800] - peaks[400]) / 400
    assert growth < vocabulary * 4 / 8, f"{growth:.0f} bytes a token"
