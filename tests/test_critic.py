"""The critic: packed values equal plain ones, an update is the gradient step it says, and the policy never notices."""

from __future__ import annotations

import copy
import io
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import tiny
from burnish.errors import CheckFailed, ModelError
from burnish.model.classifier import prepare_for_rewards, to_reward_model
from burnish.model.critic import load_value_model, share_base
from burnish.model.masters import MasterWeights
from burnish.model.packing import pack
from burnish.model.scoring import causal_lm, prepare_for_scoring, score
from burnish.training.critic import Critic
from burnish.types import Completion, Group
from live_bytes import LiveBytes

PAD = 1
FORMS = ["model", "adapters"]
# RMS norms compute in fp32 whatever the model's dtype, so float64 is exact to fp32 rounding only.
TOLERANCE = {"gpt2": 1e-12}


def groups(seed: int = 0) -> list[Group]:
    """Shared prompts, an empty prompt (whose first token nothing predicts), a mask with a hole."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(2, 90, (length,), generator=generator).tolist()

    return [
        Group(ids(9), [Completion(ids(n)) for n in (5, 3, 6)]),
        Group(ids(7), [Completion(ids(4)), Completion(ids(1))]),
        Group([], [Completion(ids(8))]),
        Group(ids(3), [Completion(ids(6), loss_mask=[True, False, True, True, False, True])]),
    ]


def with_returns(seed: int = 0) -> list[Group]:
    """Old values and returns around 0, as a rollout would have them."""
    made, generator = groups(seed), torch.Generator().manual_seed(seed + 1)
    for completion in (c for group in made for c in group.completions):
        values, returns = torch.randn(2, len(completion.token_ids), generator=generator).tolist()
        completion.token |= {"values": values, "returns": returns}
    return made


def lora(**changes: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], **changes})


def adapted(base: Any, config: Any = None) -> Any:
    """A policy with adapters that are not the identity."""
    from peft import get_peft_model

    made = get_peft_model(base, config or lora(task_type="CAUSAL_LM"), autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data = (0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    prepare_for_scoring(made)
    return made.eval()


def made(form: str, kind: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, Any]:
    """A value model far from its start, and the policy that it shares a base with, if it does."""
    policy = tiny.model(kind, dtype=dtype)
    if form == "model":
        model, policy = load_value_model(policy, bf16=False, seed=3, pad_token_id=PAD, **changes)[0], None
    else:
        layers = {"target_modules": ["c_attn"], "fan_in_fan_out": True} if kind == "gpt2" else {}
        policy = adapted(policy, lora(task_type="CAUSAL_LM", **layers))
        model = share_base(policy, seed=3, pad_token_id=PAD, **changes)
    generator = torch.Generator().manual_seed(6)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("score" in name or "lora_B" in name):
            parameter.data = (0.2 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return model, policy


def critic(model: Any, **changes: Any) -> Critic:
    def sgd(own: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(own)

    base: dict[str, Any] = {"learning_rate": 0.1, "make_optimizer": sgd, "max_grad_norm": None}
    return Critic(model, **{**base, **changes})


def plain_model(model: Any) -> Any:
    """The same network without our forward, on eager attention of its own."""
    plain = copy.deepcopy(model)
    classifier = causal_lm(plain)
    del classifier.forward
    classifier.set_attn_implementation("eager")
    return plain


def plain_values(plain: Any, rows: list[Group]) -> list[list[torch.Tensor | None]]:
    """One forward of the decoder a sequence, then the score at the token before each scored one."""
    classifier = causal_lm(plain)
    decoder = getattr(classifier, classifier.base_model_prefix)
    result: list[list[torch.Tensor | None]] = []
    for group, completion in ((g, c) for g in rows for c in g.completions):
        ids = torch.tensor([group.prompt_ids + completion.token_ids])
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
        scored = completion.loss_mask or [True] * len(completion.token_ids)
        places = [len(group.prompt_ids) + j - 1 for j in range(len(scored))]
        seen = [scored[j] and place >= 0 for j, place in enumerate(places)]
        result.append([classifier.score(hidden[p])[0] if s else None for p, s in zip(places, seen, strict=True)])
    return result


def known(values: list[list[torch.Tensor | None]]) -> torch.Tensor:
    return torch.stack([value for row in values for value in row if value is not None])


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def completions(rows: list[Group]) -> list[Completion]:
    return [completion for group in rows for completion in group.completions]


@pytest.mark.parametrize("token_budget", [None, 20])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("form", FORMS)
def test_values_are_those_of_one_plain_forward_per_completion(form: str, kind: str, token_budget: int | None) -> None:
    model, _ = made(form, kind, torch.float64)
    rows = groups()
    critic(model, token_budget=token_budget).values(rows)
    expected = plain_values(plain_model(model), rows)
    assert float(known(expected).detach().std()) > 0.05
    for completion, wanted in zip(completions(rows), expected, strict=True):
        right = [0.0 if value is None else value.item() for value in wanted]
        assert completion.token["values"] == pytest.approx(right, abs=TOLERANCE.get(kind, 5e-6))
    first, second = (completion.token["values"][0] for completion in completions(rows)[:2])
    assert first == second, "the state before both is their prompt"


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("form", FORMS)
def test_an_update_is_one_step_along_the_gradient_of_an_independent_script(form: str, clip: float | None) -> None:
    model, _ = made(form, "gpt2", torch.float64)
    plain, rows = plain_model(model), with_returns()
    own = critic(model, learning_rate=0.5)
    before = trained(model)
    metrics = own.update(rows, clip=clip, vf_coef=0.3, lr_factor=0.5)

    values = plain_values(plain, rows)
    errors: list[torch.Tensor] = []
    clipped, old, targets = 0, [], []
    for completion, row in zip(completions(rows), values, strict=True):
        for value, before_it, target in zip(row, completion.token["values"], completion.token["returns"], strict=True):
            if value is None:
                continue
            old.append(before_it)
            targets.append(target)
            plain_error = (value - target) ** 2
            if clip is None:
                errors.append(plain_error)
                continue
            moved = (before_it + (value - before_it).clamp(-clip, clip) - target) ** 2
            clipped += bool(moved > plain_error + 1e-12)  # within the bounds they differ by rounding
            errors.append(torch.maximum(plain_error, moved))
    loss = torch.stack(errors).mean() / 2
    (0.3 * loss).backward()
    for name, parameter in plain.named_parameters():
        if name in before:
            assert parameter.grad is not None, name
            step = (before[name] - dict(model.named_parameters())[name].detach()) / 0.25
            scale = float(parameter.grad.abs().max())
            assert scale > 1e-6, name
            # The packed batch carries old values and returns in fp32.
            torch.testing.assert_close(step, parameter.grad, rtol=0, atol=1e-6 * scale, msg=name)

    count = len(errors)
    assert metrics["value/loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert metrics["value/clip_ratio"] == pytest.approx(clipped / count)
    assert (metrics["value/clip_ratio"] > 0) == (clip is not None)
    assert metrics["value/mean"] == pytest.approx(sum(old) / count, abs=1e-6)
    wide = torch.tensor([old, targets], dtype=torch.float64)
    explained = 1 - (wide[1] - wide[0]).var(correction=0) / wide[1].var(correction=0)
    assert metrics["value/explained_variance"] == pytest.approx(float(explained), abs=1e-6)
    squares = [
        float((p.grad**2).sum()) for name, p in plain.named_parameters() if name in before and p.grad is not None
    ]
    assert metrics["value/grad_norm"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-6)


@pytest.mark.parametrize("split", [{"token_budget": 20}, {"num_batches": 3}, {"token_budget": 15, "num_batches": 2}])
@pytest.mark.parametrize("form", FORMS)
def test_an_update_is_independent_of_the_split(form: str, split: dict[str, int]) -> None:
    results = []
    for changes in ({}, split):
        model, _ = made(form, dtype=torch.float64)
        own = critic(model, token_budget=changes.get("token_budget"))
        metrics = own.update(with_returns(), clip=0.2, num_batches=changes.get("num_batches", 1))
        results.append((trained(model), metrics))
    for name, value in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], value, rtol=0, atol=1e-7, msg=name)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-6)


def test_denominators_and_averages_of_two_ranks_cancel() -> None:
    """Two ranks with the same tokens count twice as many, and average two gradients instead of adding them."""
    first, second = made("model")[0], made("model")[0]
    alone = critic(first).update(with_returns(), clip=None)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        both = critic(second, sum_over_ranks=lambda value: 2 * value).update(with_returns(), clip=None)
    finally:
        distributed.destroy_process_group()
    assert alone == pytest.approx(both, rel=1e-5)
    for name, value in trained(second).items():
        torch.testing.assert_close(trained(first)[name], value, rtol=0, atol=1e-6, msg=name)


def test_the_policy_never_notices() -> None:
    policy = adapted(tiny.model())
    policy.train()
    policy.base_model.model.model.layers[1].eval()
    modes = [module.training for module in policy.modules()]
    flags = {name: p.requires_grad for name, p in policy.named_parameters()}
    tensors = {name: t.clone() for name, t in policy.state_dict().items()}
    policy.eval()
    before = score(policy, pack(groups())).logprobs
    for module, mode in zip(policy.modules(), modes, strict=True):
        module.training = mode

    model = share_base(policy, seed=3, pad_token_id=PAD)
    own = Critic(model, learning_rate=1e-2)
    start, rows = trained(model), with_returns()
    for _ in range(3):
        own.values(rows)
        own.update(rows, clip=0.2)

    assert [module.training for module in policy.modules()] == modes
    assert {name: p.requires_grad for name, p in policy.named_parameters()} == flags
    assert all(p.grad is None for p in policy.parameters())
    assert policy.active_adapter == "default"
    assert list(policy.peft_config) == ["default"]
    assert policy.peft_config["default"].task_type == "CAUSAL_LM"
    assert policy.config.pad_token_id == 0
    after = policy.state_dict()
    assert after.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(after[name], tensor), name
    policy.eval()
    assert torch.equal(score(policy, pack(groups())).logprobs, before)
    assert {name.split(".")[-2 if "score" in name else -3] for name in start} == {"lora_A", "lora_B", "default"}
    for name, value in trained(model).items():
        assert not torch.equal(value, start[name]), name


def test_the_critic_does_not_notice_the_policy() -> None:
    """Updates of the policy's adapters, and adapters off for the reference, change no value."""
    policy = adapted(tiny.model())
    own = Critic(share_base(policy, seed=3, pad_token_id=PAD), learning_rate=1e-2)
    rows, again = groups(), groups()
    own.values(rows)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.data += 1.0
    with policy.disable_adapter():
        own.values(again)
    assert [c.token["values"] for c in completions(rows)] == [c.token["values"] for c in completions(again)]


def test_the_base_is_shared_and_nothing_else() -> None:
    policy = adapted(tiny.model())
    model = share_base(policy, seed=3, pad_token_id=PAD)
    pointers = {p.data_ptr() for p in policy.parameters()}
    alone = {name for name, p in model.named_parameters() if p.data_ptr() not in pointers}
    assert all("lora_" in name or "score" in name for name in alone)
    base = causal_lm(policy)
    shared = sum(p.numel() for n, p in base.named_parameters() if "lora_" not in n and "lm_head" not in n)
    own = Critic(model, learning_rate=1e-2)
    own.update(with_returns(), clip=None)
    memory = own.memory_bytes(policy)
    rank, hidden, mlp = 4, 32, 48
    # q: 32 -> 32, v: 32 -> 16, down: 48 -> 32, in two layers.
    adapters = 2 * rank * ((hidden + 32) + (hidden + 16) + (mlp + hidden))
    assert memory == {
        "weights": 4 * (adapters + 2 * hidden),  # peft keeps the score that it copied
        "shared_weights": 4 * shared,
        "masters": 0,
        "gradients": 4 * (adapters + hidden),
        "optimizer": 8 * (adapters + hidden) + 4 * 13,  # 12 adapter matrices and the score count their steps
    }
    again = share_base(policy, seed=3, pad_token_id=PAD)
    other = share_base(policy, seed=4, pad_token_id=PAD)
    fresh = share_base(policy, seed=3, pad_token_id=PAD)
    for name, value in trained(again).items():
        assert torch.equal(value, trained(fresh)[name])
        assert ("lora_B" in name) == torch.equal(value, trained(other)[name])


def test_making_a_critic_draws_from_no_global_random_state() -> None:
    policy = adapted(tiny.model())
    torch.manual_seed(0)
    share_base(policy, seed=3, pad_token_id=PAD)
    load_value_model(tiny.model(), bf16=False, seed=3, pad_token_id=PAD, peft_config=lora())
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), drawn)


def test_a_bf16_critic_has_an_fp32_score_and_fp32_masters(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path)
    model, exact = load_value_model(tmp_path, bf16=True, seed=3, pad_token_id=PAD)
    wide = load_value_model(tmp_path, bf16=False, seed=3, pad_token_id=PAD)[0]
    assert {name for name, p in model.named_parameters() if p.dtype == torch.float32} == {"score.weight"}
    assert torch.equal(model.score.weight, wide.score.weight)
    own = Critic(model, learning_rate=1e-5, exact=exact)
    assert isinstance(own.optimizer, MasterWeights)
    masters = dict(zip(own.optimizer.trained, own.optimizer.masters, strict=True))
    for name, parameter in wide.named_parameters():
        assert torch.equal(masters[dict(model.named_parameters())[name]], parameter), name
    start, rows = trained(model), with_returns()
    own.update(rows, clip=0.2)
    assert all(p.grad is None for p in model.parameters())
    assert not own.optimizer.gradients
    assert not torch.equal(trained(model)["score.weight"], start["score.weight"])
    own.values(rows)
    values = torch.tensor([v for c in completions(rows) for v in c.token["values"]])
    assert not torch.equal(values, values.bfloat16().float()), "values are not rounded to bf16"
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(input_ids=ids).logits.flatten(), model(input_ids=ids).logits.float().flatten())


@pytest.mark.parametrize("form", ["shared", "own"])
def test_adapters_compute_in_bf16_and_their_score_in_fp32(form: str) -> None:
    base = tiny.model(dtype=torch.bfloat16)
    if form == "shared":
        model, exact = share_base(adapted(base), seed=3, pad_token_id=PAD), {}
    else:
        model, exact = load_value_model(base, bf16=True, seed=3, pad_token_id=PAD, peft_config=lora())
    dtypes = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert all(dtype == (torch.float32 if "score" in name else torch.bfloat16) for name, dtype in dtypes.items())
    own, rows = Critic(model, learning_rate=1e-2, exact=exact), with_returns()
    own.update(rows, clip=None)
    own.values(rows)
    values = torch.tensor([v for c in completions(rows) for v in c.token["values"]])
    assert not torch.equal(values, values.bfloat16().float()), "values are not rounded to bf16"


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_resumed_is_uninterrupted(form: str, bf16: bool) -> None:
    dtype = torch.bfloat16 if bf16 else torch.float32

    def run(own: Critic, steps: range) -> list[dict[str, float]]:
        return [own.update(with_returns(step), clip=0.2, lr_factor=1 / (1 + step)) for step in steps]

    whole = Critic(made(form, dtype=dtype)[0], learning_rate=1e-3, weight_decay=0.1)
    metrics = run(whole, range(4))
    first = Critic(made(form, dtype=dtype)[0], learning_rate=1e-3, weight_decay=0.1)
    run(first, range(2))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = Critic(made(form, dtype=dtype)[0], learning_rate=1e-3, weight_decay=0.1)
    run(second, range(5, 6))
    second.load_state_dict(torch.load(file, weights_only=True))
    assert run(second, range(2, 4)) == metrics[2:]
    for name, value in trained(whole.model).items():
        assert torch.equal(value, trained(second.model)[name]), name
    for left, right in zip(tiny.exact_weights(whole.optimizer), tiny.exact_weights(second.optimizer), strict=True):
        assert torch.equal(left, right)


def test_the_state_of_another_critic_is_refused() -> None:
    state = critic(made("model")[0]).state_dict()
    with pytest.raises(CheckFailed, match="trains 21 tensors and this one 13"):
        critic(made("adapters")[0]).load_state_dict(state)


@pytest.mark.parametrize("form", FORMS)
def test_it_fits_what_the_tokens_say(form: str) -> None:
    """Returns that depend on the token before: the loss falls, and the values explain the returns."""
    model, _ = made(form)
    own = Critic(model, learning_rate=2e-2, weight_decay=0.0)
    rows = groups()
    for group in rows:
        for c in group.completions:
            before = [*group.prompt_ids, 0][-1:] + c.token_ids[:-1]
            c.token["returns"] = [2.0 + (token % 2) for token in before]
    losses = []
    for _ in range(80):
        own.values(rows)
        losses.append(own.update(rows, clip=None))
    assert losses[-1]["value/loss"] < losses[0]["value/loss"] / 50
    assert losses[-1]["value/explained_variance"] > 0.7
    assert losses[0]["value/explained_variance"] < 0.5
    assert losses[-1]["value/mean"] == pytest.approx(2.5, abs=0.3)


def test_the_value_model_is_saved_as_a_sequence_classifier(tmp_path: Path) -> None:
    model, _ = made("model")
    own = critic(model)
    own.update(with_returns(), clip=None)
    own.save(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert loaded.config.pad_token_id == PAD
    rows = groups()
    own.values(rows)
    right = [
        v for c in completions(rows) for v, m in zip(c.token["values"], c.loss_mask or [True] * 9, strict=False) if m
    ]
    right.pop(sum(len(c.token_ids) for c in completions(rows)[:5]))  # the first token without a prompt
    torch.testing.assert_close(known(plain_values(loaded, rows)).detach(), torch.tensor(right), rtol=0, atol=1e-5)
    again, _ = load_value_model(tmp_path, bf16=False, seed=9, pad_token_id=PAD)
    assert torch.equal(again.score.weight, model.score.weight), "a trained score is kept"


def test_shared_critics_are_saved_as_adapters_with_their_score(tmp_path: Path) -> None:
    from peft import PeftModel

    tiny.model().save_pretrained(tmp_path / "base")
    policy = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    own = critic(share_base(policy, seed=3, pad_token_id=PAD))
    own.update(with_returns(), clip=None)
    own.save(tmp_path / "critic")
    assert sum(f.stat().st_size for f in (tmp_path / "critic").glob("*.safetensors")) < 20_000, "no base weights"
    base = to_reward_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), seed=77)
    loaded = PeftModel.from_pretrained(base, tmp_path / "critic").eval()
    for left, right in zip(completions(groups()), plain_values(loaded, groups()), strict=True):
        assert len(left.token_ids) == len(right)
    rows = groups()
    own.values(rows)
    torch.testing.assert_close(
        known(plain_values(loaded, rows)).detach(),
        known(plain_values(plain_model(own.model), rows)).detach(),
        rtol=0,
        atol=1e-5,
    )


def test_the_policy_is_saved_as_if_there_were_no_critic(tmp_path: Path) -> None:
    policy = adapted(tiny.model())
    policy.save_pretrained(tmp_path / "before")
    Critic(share_base(policy, seed=3, pad_token_id=PAD), learning_rate=1e-2).update(with_returns(), clip=None)
    policy.save_pretrained(tmp_path / "after")
    names = [sorted(p.name for p in (tmp_path / which).rglob("*")) for which in ("before", "after")]
    assert names[0] == names[1]
    assert (tmp_path / "before" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "after" / "adapter_model.safetensors"
    ).read_bytes()


def test_a_model_of_its_own_is_a_copy() -> None:
    """The policy and a reward model that gives the rewards stay what they are."""
    policy = tiny.model()
    prepare_for_scoring(policy)
    start = {name: p.clone() for name, p in policy.state_dict().items()}
    Critic(load_value_model(policy, bf16=False, seed=3, pad_token_id=PAD)[0], learning_rate=1e-2).update(
        with_returns(), clip=None
    )
    assert all(torch.equal(p, start[name]) for name, p in policy.state_dict().items())
    assert policy.config.pad_token_id == 0
    reward = to_reward_model(tiny.model(), seed=4)
    prepare_for_rewards(reward)
    start = {name: p.clone() for name, p in reward.state_dict().items()}
    model, _ = load_value_model(reward, bf16=False, seed=3, pad_token_id=PAD)
    assert torch.equal(model.score.weight, reward.score.weight), "a trained score is kept"
    Critic(model, learning_rate=1e-2).update(with_returns(), clip=None)
    assert all(torch.equal(p, start[name]) for name, p in reward.state_dict().items())


def test_adapters_on_a_base_of_its_own() -> None:
    reward = to_reward_model(tiny.model(), seed=4)
    model, exact = load_value_model(reward, bf16=False, seed=3, pad_token_id=PAD, peft_config=lora())
    assert not exact
    own = Critic(model, learning_rate=1e-2)
    rows = with_returns()
    own.values(rows)
    assert known(plain_values(reward, rows)).tolist() == pytest.approx(
        [v for c in completions(rows) for v in c.token["values"] if v], abs=1e-5
    ), "new adapters are the identity"
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    own.update(rows, clip=None)
    assert frozen
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


@pytest.mark.parametrize("form", FORMS)
def test_checkpointing_changes_nothing_and_is_used(form: str) -> None:
    results = []
    for checkpointing in (False, True):
        model, policy = made(form)
        own, calls = critic(model, checkpointing=checkpointing), []
        causal_lm(model).model.layers[0].mlp.register_forward_pre_hook(lambda *_, seen=calls: seen.append(1))
        if policy is not None:
            assert not any(getattr(m, "gradient_checkpointing", False) for m in policy.modules())
        own.update(with_returns(), clip=0.2)
        assert len(calls) == 1 + checkpointing
        results.append(trained(model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=1e-6, msg=name)


def test_updates_in_turn_need_the_memory_of_one() -> None:
    """After the critic's update neither activations nor gradients are alive when the policy's forward starts."""
    policy = adapted(tiny.model())
    own = Critic(share_base(policy, seed=3, pad_token_id=PAD), learning_rate=1e-2)
    ids = torch.randint(2, 90, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [Group(ids[:8], [Completion(ids, token={"values": [0.0] * 400, "returns": [1.0] * 400})])]
    own.update(rows, clip=0.2)  # the optimizer's states appear here

    def policy_step() -> None:
        score(policy, pack(rows)).logprobs.sum().backward()
        policy.zero_grad(set_to_none=True)

    peaks = {}
    for name, work in (("critic", [True]), ("policy", [False]), ("both", [True, False, True])):
        with LiveBytes() as live:
            for is_critic in work:
                own.update(rows, clip=0.2) if is_critic else policy_step()
            assert live.live < 100_000, "what is left is small beside a peak"
        peaks[name] = live.peak
    assert peaks["both"] < 1.05 * max(peaks["critic"], peaks["policy"])
    assert min(peaks["critic"], peaks["policy"]) > 1_000_000


def test_weights_below_the_base_may_be_quantised(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny.model(hidden_size=64, head_dim=16, intermediate_size=64).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    policy = adapted(base, lora(task_type="CAUSAL_LM"))
    model = share_base(policy, seed=3, pad_token_id=PAD)
    own = Critic(model, learning_rate=1e-2)
    start, rows = trained(model), with_returns()
    losses = [own.update(rows, clip=None)["value/loss"] for _ in range(20)]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(value, start[name]) for name, value in trained(model).items())
    pointers = {p.data_ptr() for p in policy.parameters()}
    assert all("lora_" in n or "score" in n for n, p in model.named_parameters() if p.data_ptr() not in pointers)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_one_rank_is_two_ranks(tmp_path: Path, form: str, dtype: str) -> None:
    worker = [str(Path(__file__).parent / "critic_worker.py"), form, dtype, str(tmp_path)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for words in (worker, [*launcher, *worker]):
        done = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, env=environment, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, *two = (torch.load(tmp_path / name) for name in ("1_0.pt", "2_0.pt", "2_1.pt"))
    for left, right in zip(two[0]["weights"], two[1]["weights"], strict=True):
        assert torch.equal(left, right), "the ranks hold one critic"
    assert two[0]["metrics"] == two[1]["metrics"]
    # bf16 rounds each rank's gradients before masters add them up.
    tolerance = 1e-5 if dtype == "float32" else 0.02
    for start, left, right in zip(one["start"], one["weights"], two[0]["weights"], strict=True):
        step = float((left - start).norm())
        assert step > 0
        assert float((left - right).norm()) < tolerance * step
    for left, right in zip(one["metrics"], two[0]["metrics"], strict=True):
        assert left == pytest.approx(right, rel=tolerance)


def test_no_groups_are_a_step_without_work() -> None:
    model, _ = made("model")
    own = Critic(model, learning_rate=1e-2)
    start = trained(model)
    own.values([])
    assert own.update([], clip=0.2) == {
        "value/loss": 0.0, "value/clip_ratio": 0.0, "value/explained_variance": 0.0, "value/mean": 0.0,
        "value/grad_norm": 0.0,
    }  # fmt: skip
    assert all(torch.equal(value, start[name]) for name, value in trained(model).items())


def test_a_rank_without_groups_runs_as_many_forwards_as_the_others() -> None:
    model, _ = made("model")
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    own = critic(model)
    own._max = lambda value: 3.0
    own.values([])
    own.update(with_returns()[:1], clip=None)
    assert len(calls) == 6


def test_what_is_not_finite_stops_before_the_step() -> None:
    model, _ = made("model")
    own = critic(model)
    start, rows = trained(model), with_returns()
    rows[0].completions[0].token["returns"] = [math.nan] * 5
    with pytest.raises(CheckFailed, match="gradient norm of the critic is nan; its step is not taken"):
        own.update(rows, clip=None)
    assert all(torch.equal(value, start[name]) for name, value in trained(model).items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    model.score.weight.data[0, 0] = math.inf
    with pytest.raises(CheckFailed, match="values are not finite"):
        own.values(groups())


def test_gradients_are_clipped_and_the_learning_rate_follows_its_factor() -> None:
    model, _ = made("model", dtype=torch.float64)
    own = critic(model, max_grad_norm=0.01, learning_rate=0.5)
    start = trained(model)
    norm = own.update(with_returns(), clip=None, lr_factor=0.1)["value/grad_norm"]
    assert norm > 0.01
    moved = math.sqrt(sum(float(((value - start[name]) ** 2).sum()) for name, value in trained(model).items()))
    assert moved == pytest.approx(0.01 * 0.05, rel=1e-3)  # clipping adds 1e-6 to the norm
    assert own.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_vectors_are_not_decayed() -> None:
    own = Critic(made("model")[0], learning_rate=1e-2, weight_decay=0.3)
    decay = {id(p): group["weight_decay"] for group in own.optimizer.param_groups for p in group["params"]}
    for name, parameter in own.model.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name else 0.3), name


def test_dropout_is_off_unless_asked_for() -> None:
    def probabilities(model: Any) -> set[float]:
        return {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}

    policy = adapted(tiny.model(), lora(task_type="CAUSAL_LM", lora_dropout=0.25))
    assert probabilities(share_base(policy, seed=3, pad_token_id=PAD)) == {0.0}
    assert 0.25 in probabilities(share_base(policy, seed=3, pad_token_id=PAD, dropout=True))
    assert 0.25 in probabilities(policy)


def test_critics_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(ModelError, match="no adapters on a base"):
        share_base(tiny.model(), seed=3, pad_token_id=PAD)
    policy = adapted(tiny.model())
    with pytest.raises(ModelError, match="init_lora_weights = 'pissa': it modifies the base"):
        share_base(policy, seed=3, pad_token_id=PAD, peft_config=lora(init_lora_weights="pissa"))
    with pytest.raises(ModelError, match="a sequence classifier"):
        share_base(policy, seed=3, pad_token_id=PAD, peft_config=lora(task_type="CAUSAL_LM"))
    with pytest.raises(ModelError, match="already has adapters"):
        load_value_model(policy, bf16=False, seed=3, pad_token_id=PAD)
    trains = adapted(tiny.model(), lora(task_type="CAUSAL_LM", modules_to_save=["embed_tokens"]))
    with pytest.raises(ModelError, match="it trains embed_tokens"):
        share_base(trains, seed=3, pad_token_id=PAD)
    head = adapted(tiny.model(), lora(task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    share_base(head, seed=3, pad_token_id=PAD)
    biased = adapted(tiny.model("qwen2"), lora(task_type="CAUSAL_LM", bias="lora_only"))
    with pytest.raises(ModelError, match=r"it trains layers.0.self_attn.q_proj.bias \(and 3 more\)"):
        share_base(biased, seed=3, pad_token_id=PAD)
