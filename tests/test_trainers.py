"""Trainers: the split of a step changes nothing, a resumed run is the uninterrupted one, checks fire before updates."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from burnish import CheckFailed, ConfigError, DataError, GRPOConfig, GRPOTrainer, ModelError, SFTConfig, SFTTrainer
from burnish.rollout import Request
from burnish.training.sampler_check import SamplerCheck
from burnish.training.step import Loss
from burnish.types import Completion, Group, Score, StopReason

TEXTS = [{"prompt": f"{i}+{i}=", "completion": str(2 * i) * (1 + i % 3)} for i in range(24)]
PROMPTS = [{"prompt": f"{i}+{i % 7}=" + "0" * (i % 5), "answer": str(i)} for i in range(24)]


def digits(completions: list[str], **columns: Any) -> list[float]:
    """A reward with spread: the share of digits."""
    return [sum(c.isdigit() for c in text) / 8 for text in completions]


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "output_dir": str(folder),
        "bf16": False,
        "use_cpu": True,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "progress": False,
        "seed": 7,
    }
    return {**base, **changes}


def sft(folder: Path, model: Any = None, **changes: Any) -> SFTTrainer:
    args = SFTConfig(**settings(folder, **{"per_device_train_batch_size": 8, **changes}))
    return SFTTrainer(
        model if model is not None else tiny.model(), args, train_dataset=TEXTS, processing_class=tiny.tokenizer()
    )


def grpo(folder: Path, model: Any = None, rewards: Any = digits, **changes: Any) -> GRPOTrainer:
    defaults = {"per_device_train_batch_size": 12, "num_generations": 4, "max_completion_length": 8}
    keywords = {
        name: changes.pop(name) for name in ("peft_config", "ref_model", "eval_dataset", "engine") if name in changes
    }
    args = GRPOConfig(**settings(folder, **{**defaults, **changes}))
    return GRPOTrainer(
        model if model is not None else tiny.model(),
        rewards,
        args,
        PROMPTS,
        processing_class=tiny.tokenizer(),
        **keywords,
    )


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=tolerance, msg=name)


# Adam's first steps divide a gradient by its own size, so fp32 rounding of tiny gradients is amplified: SGD shows the
# gradient itself.
SPLITS = [
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    {"per_device_train_batch_size": 8, "token_budget": 20},
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "token_budget": 15},
]


def recorded(trainer: Any) -> list[list[Group]]:
    """Every group that each optimizer step is given, those without a gradient too."""
    steps: list[list[Group]] = []
    begin: Callable[..., Any] = trainer.stage.algorithm.begin_step
    trainer.stage.algorithm.begin_step = lambda groups, **k: steps.append(groups) or begin(groups, **k)
    return steps


@pytest.mark.parametrize("split", SPLITS)
def test_sft_is_independent_of_the_split(tmp_path: Path, split: dict[str, int]) -> None:
    whole = sft(tmp_path / "a", optim="sgd")
    whole.train()
    parts = sft(tmp_path / "b", optim="sgd", **split)
    parts.train()
    assert_same(weights(whole), weights(parts), 1e-6)
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_sft_loss_is_the_mean_over_completion_tokens(tmp_path: Path) -> None:
    trainer = sft(tmp_path, max_steps=1, per_device_train_batch_size=24, learning_rate=0.0)
    trainer.train()
    tokenizer, model = tiny.tokenizer(), tiny.model()
    total, count = 0.0, 0
    for row in TEXTS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = prompt + tokenizer(row["completion"])["input_ids"] + [0]
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1).detach()
        total -= float(sum(logprobs[j - 1, ids[j]] for j in range(len(prompt), len(ids))))
        count += len(ids) - len(prompt)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / count, abs=1e-4)


def test_sft_learns_evaluates_and_saves_what_transformers_loads(tmp_path: Path) -> None:
    args = SFTConfig(**settings(tmp_path, max_steps=30, learning_rate=3e-3))
    trainer = SFTTrainer(
        tiny.model(), args, train_dataset=TEXTS, eval_dataset=TEXTS[:6], processing_class=tiny.tokenizer()
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] - 0.5
    assert after["eval_entropy"] < before["eval_entropy"]
    assert after["eval_mean_token_accuracy"] > before["eval_mean_token_accuracy"] + 0.1
    assert before["eval_num_tokens"] == 0
    assert (
        after["eval_num_tokens"]
        == next(log for log in reversed(trainer.state.log_history) if "loss" in log)["num_tokens"]
    )
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation != "burnish"
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)


@pytest.mark.parametrize("bf16", [False, True])
def test_sft_resumed_is_uninterrupted(tmp_path: Path, bf16: bool) -> None:
    changes = {"max_steps": 4, "bf16": bf16, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    start = tiny.model(dtype=torch.bfloat16 if bf16 else torch.float32)
    whole = sft(tmp_path / "a", copy.deepcopy(start), **changes)
    whole.train()
    resumed = sft(tmp_path / "a", copy.deepcopy(start), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_same(weights(whole), weights(resumed), 0.0)


def test_bf16_keeps_fp32_masters(tmp_path: Path) -> None:
    trainer = sft(tmp_path, tiny.model(dtype=torch.bfloat16), bf16=True, learning_rate=1e-6)
    trainer.create_optimizer()
    masters = trainer.master_weights
    assert masters is not None
    before = [m.detach().clone() for m in masters.masters]
    trainer.train()
    assert trainer.master_weights is masters
    assert all(m.dtype == torch.float32 for m in masters.masters)
    moved = [float((m - b).detach().abs().mean()) for m, b in zip(masters.masters, before, strict=True)]
    assert 1e-7 < max(moved) < 1e-5, "steps below a bf16 gap are kept"


def test_optimizers_that_swap_weights_are_refused(tmp_path: Path) -> None:
    class ScheduleFree(torch.optim.SGD):
        def eval(self) -> None:
            """Put the average in place of the weights."""

    args = SFTConfig(**settings(tmp_path, bf16=True))
    made = SFTTrainer(
        tiny.model(dtype=torch.bfloat16), args, train_dataset=TEXTS, processing_class=tiny.tokenizer(),
        optimizer_cls_and_kwargs=(ScheduleFree, {"lr": 1e-3}),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="optimizer_cls_and_kwargs: ScheduleFree selects or swaps"):
        made.train()


def test_eight_bit_moments_resume(tmp_path: Path) -> None:
    """bitsandbytes' AdamW over masters, by its name among transformers' optimizers."""
    pytest.importorskip("bitsandbytes")
    start = tiny.model(dtype=torch.bfloat16, hidden_size=64)
    changes = {"bf16": True, "optim": "adamw_bnb_8bit", "max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
    whole = sft(tmp_path / "a", copy.deepcopy(start), **changes)
    whole.train()
    assert whole.master_weights is not None
    kinds = {t.dtype for state in whole.master_weights.state.values() for t in state.values() if torch.is_tensor(t)}
    assert torch.uint8 in kinds
    resumed = sft(tmp_path / "a", copy.deepcopy(start), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_same(weights(whole), weights(resumed), 0.0)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize(
    "split", [{"gradient_accumulation_steps": 4, "per_device_train_batch_size": 3}, {"token_budget": 30}]
)
def test_grpo_is_independent_of_the_split(tmp_path: Path, loss_type: str, split: dict[str, int]) -> None:
    changes: dict[str, Any] = {"optim": "sgd", "loss_type": loss_type, "beta": 0.1, "max_steps": 2}
    whole = grpo(tmp_path / "a", **changes)
    whole.train()
    parts = grpo(tmp_path / "b", **{**changes, **split})
    parts.train()
    assert_same(weights(whole), weights(parts), 2e-6)


@pytest.mark.parametrize("reuse", [{}, {"steps_per_generation": 2}, {"num_iterations": 2}])
@pytest.mark.parametrize("bf16", [False, True])
def test_grpo_resumed_is_uninterrupted(tmp_path: Path, reuse: dict[str, int], bf16: bool) -> None:
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3, "bf16": bf16, "learning_rate": 1e-3,
               "log_completions": True, "logprob_check_bound": 1.0, **reuse}  # fmt: skip
    start = tiny.model(dtype=torch.bfloat16 if bf16 else torch.float32)
    whole = grpo(tmp_path / "a", copy.deepcopy(start), **changes)
    whole.train()
    lines = (tmp_path / "a" / "transcripts.jsonl").read_text()
    resumed = grpo(tmp_path / "a", copy.deepcopy(start), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert resumed.state.global_step == 4
    assert_same(weights(whole), weights(resumed), 0.0)
    assert (tmp_path / "a" / "transcripts.jsonl").read_text() == lines


def test_grpo_learns(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, max_steps=30, learning_rate=1e-2, lr_scheduler_type="constant", eval_dataset=PROMPTS[:8])
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    assert trainer.evaluate()["eval_reward"] > 2 * before


def test_a_failed_reward_leaves_the_loss_and_scores_nothing(tmp_path: Path) -> None:
    def sometimes(completions: list[str], **columns: Any) -> list[float]:
        return [float("nan") if i % 4 == 0 else value for i, value in enumerate(digits(completions))]

    trainer = grpo(tmp_path, rewards=sometimes, max_steps=1, log_completions=True)
    groups: list[Any] = []
    stage: Any = trainer.stage
    original = stage.next_step
    stage.next_step = lambda *a: ((step := original(*a)) and groups.extend(step.groups)) or step
    trainer.train()
    assert all(c.score.total is not None for g in groups for c in g.completions)
    records = [json.loads(line) for line in (tmp_path / "transcripts.jsonl").read_text().splitlines()]
    failed = [r for r in records if r["reward"] is None]
    assert len(failed) == 3
    assert all("sometimes" in message for r in failed for message in r["errors"].values())
    assert trainer.state.log_history[0]["rewards/failed"] == 3


def test_groups_without_signal_cost_no_forward(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, rewards=lambda completions, **_: [1.0] * len(completions), max_steps=1)
    tokens: list[int] = []
    stage: Any = trainer.stage
    original = stage.loss

    def counted(model: Any, batch: Any, step: Any) -> Any:
        tokens.append(batch.num_scored_tokens)
        return original(model, batch, step)

    stage.loss = counted
    trainer.train()
    assert tokens == [0]
    assert trainer.state.log_history[0]["frac_reward_zero_std"] == 1.0


class Elsewhere:
    """An engine that samples at another temperature, or from other weights."""

    def __init__(self, engine: Any, temperature: float = 1.0) -> None:
        self.engine, self.temperature = engine, temperature

    def generate(self, requests: Sequence[Request], *, seed: int, step: int) -> list[list[Completion]]:
        import dataclasses

        hotter = [
            dataclasses.replace(r, params=dataclasses.replace(r.params, temperature=self.temperature)) for r in requests
        ]
        return self.engine.generate(hotter, seed=seed, step=step)

    def sync(self, version: int) -> None: ...

    def close(self) -> None: ...


def test_a_sampler_at_another_temperature_is_caught_before_the_update(tmp_path: Path) -> None:
    trainer = grpo(tmp_path)
    trainer.stage.sampler.engine = Elsewhere(trainer.stage.sampler.engine, temperature=1.2)
    before = weights(trainer)
    with pytest.raises(CheckFailed, match="sampler and trainer mismatch"):
        trainer.train()
    assert_same(before, weights(trainer), 0.0)


def test_agreement_is_the_divergence_from_sampler_to_trainer() -> None:
    """All outcomes of one draw, weighted by the sampler's probabilities: k3 is then the exact KL."""
    logits = [0.3 * torch.randn(6, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    sampler, trainer = (values.log_softmax(0) for values in logits)
    assert (sampler - trainer).abs().max() < 1, "nothing is clipped"
    exact = float((sampler.exp() * (sampler - trainer)).sum())
    counts = (sampler.exp() * 100_000).round().long()
    check = SamplerCheck(bound=exact * 1.01, mean_bound=1.0)
    check.add(trainer.repeat_interleave(counts), sampler.repeat_interleave(counts))
    metrics = check.flush(0, float, float)
    assert metrics["sampling/kl"] == pytest.approx(exact, rel=1e-3)
    assert metrics["sampling/logprob_difference/max"] == pytest.approx(float((sampler - trainer).abs().max()))
    assert check.flush(1, float, float) == {}
    check = SamplerCheck(bound=exact * 0.99, mean_bound=1.0)
    check.add(trainer.repeat_interleave(counts), sampler.repeat_interleave(counts))
    with pytest.raises(CheckFailed, match=r"step 7: .* their KL is"):
        check.flush(7, float, float)


def test_agreement_judges_2048_tokens_at_least_and_the_last_ones() -> None:
    """A tenth of 200 tokens off by 0.8 nats: k3 adds 8.5 a step; 2,048 tokens at the bound of 0.01 may have 20.5."""

    def steps(sizes: Sequence[int], difference: float, check: SamplerCheck) -> None:
        for number, size in enumerate(sizes):
            trainer = torch.zeros(size)
            trainer[: size // 10] = difference
            check.add(trainer, torch.zeros(size))
            check.flush(number, float, float)

    steps([200] * 2, 0.8, SamplerCheck(0.01))
    with pytest.raises(CheckFailed, match=r"step 2: "):
        steps([200] * 3, 0.8, SamplerCheck(0.01))
    check = SamplerCheck(0.01)
    steps([200] * 2, 0.8, check)
    steps([500] * 6, 0.0, check)
    steps([200] * 2, 0.8, check)


def test_agreement_forgets_what_is_2048_tokens_ago() -> None:
    """A difference of 0.2 nats is a divergence of 0.021: over the last two steps above the bound, over all below."""
    check = SamplerCheck(0.01, mean_bound=1.0)
    for step in range(6):
        check.add(torch.zeros(1024), torch.zeros(1024))
        check.flush(step, float, float)
    check.add(torch.full((1024,), 0.2), torch.zeros(1024))
    with pytest.raises(CheckFailed, match=r"step 6: .* over the last 2048 tokens"):
        check.flush(6, float, float)


def test_only_truncated_completions_are_masked(tmp_path: Path) -> None:
    algorithm = grpo(tmp_path, mask_truncated_completions=True).stage.algorithm
    for reason in StopReason:
        completion = Completion([1, 2], stop_reason=reason, score=Score(1.0))
        assert algorithm.in_loss(completion) is (reason not in (StopReason.LENGTH, StopReason.BUDGET))
    assert not algorithm.in_loss(Completion([1, 2], stop_reason=StopReason.EOS, score=Score(None)))


def test_one_token_far_off_is_no_mismatch() -> None:
    check = SamplerCheck(bound=0.01)
    far = torch.zeros(200)
    far[:3] = 5.0
    check.add(far, torch.zeros(200))
    assert check.flush(0, float, float)["sampling/logprob_difference/max"] == 5.0


@pytest.mark.parametrize(("bound", "mean"), [(1e-2, 0.1), (1e-6, 1e-3)])
def test_a_mean_difference_stops_the_first_small_step(bound: float, mean: float) -> None:
    """However few tokens there are: the window excuses single tokens, not all of them."""
    check = SamplerCheck(bound)
    check.add(torch.full((8,), 0.95 * mean), torch.zeros(8))
    check.flush(0, float, float)
    check.add(torch.full((8,), 1.05 * mean), torch.zeros(8))
    with pytest.raises(CheckFailed, match=r"step 1: "):
        check.flush(1, float, float)


def test_agreement_does_not_pass_what_is_not_a_number() -> None:
    check = SamplerCheck(bound=1.0)
    check.add(torch.tensor([float("nan"), 0.0]), torch.zeros(2))
    with pytest.raises(CheckFailed, match="not finite"):
        check.flush(0, float, float)


def test_a_sampler_with_other_weights_is_caught(tmp_path: Path) -> None:
    trainer = grpo(tmp_path)
    other = grpo(tmp_path / "other", tiny.model(seed=1))
    trainer.stage.sampler.engine = Elsewhere(other.stage.sampler.engine)
    with pytest.raises(CheckFailed, match="other weights"):
        trainer.train()


def test_the_reference_is_the_initial_policy_and_kl_starts_at_zero(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, beta=0.1, max_steps=2)
    trainer.train()
    kl = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert kl[1] > 1e-5
    broken = grpo(tmp_path / "b", beta=0.1)
    assert broken.stage.reference is not None
    assert broken.stage.reference.model is not None
    broken.stage.reference.model.load_state_dict(tiny.model(seed=3).state_dict())
    with pytest.raises(CheckFailed, match="reference differs from the policy"):
        broken.train()


def test_lora_trains_adapters_only_and_its_reference_is_the_base(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel

    base = tiny.model()
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = grpo(tmp_path, copy.deepcopy(base), peft_config=config, beta=0.1, max_steps=2, learning_rate=0.1)
    trainer.train()
    kl = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    assert kl[0] == 0.0
    assert kl[1] > 0
    trainer.save_model()
    ids = torch.tensor([[3, 4, 5]])
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(reloaded(ids).logits, trainer.model.eval()(ids).logits)
    with trainer.model.disable_adapter():
        assert torch.equal(trainer.model(ids).logits, base(ids).logits)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_bad_gradient_stops_the_run(tmp_path: Path, bf16: bool, max_grad_norm: float) -> None:
    model = tiny.model(dtype=torch.bfloat16 if bf16 else torch.float32)
    trainer = sft(tmp_path, model, bf16=bf16, max_grad_norm=max_grad_norm)
    stage: Any = trainer.stage
    original = stage.loss
    stage.loss = lambda *a: Loss(original(*a).value * float("nan"))
    with pytest.raises(CheckFailed, match="gradient norm is nan"):
        trainer.train()


def test_nonsense_is_refused_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_generations"):
        grpo(tmp_path, per_device_train_batch_size=5)
    with pytest.raises(DataError, match="fewer than"):
        grpo(tmp_path, per_device_train_batch_size=400)
    args = GRPOConfig(**settings(tmp_path, per_device_train_batch_size=8))
    with pytest.raises(DataError, match="train_dataset = None"):
        GRPOTrainer(tiny.model(), digits, args, processing_class=tiny.tokenizer())
    with pytest.raises(ModelError, match="no such folder"):
        SFTTrainer("./nowhere", SFTConfig(**settings(tmp_path)), train_dataset=TEXTS)


def test_tokens_count_once_when_they_are_sampled(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, max_steps=4, num_iterations=2)
    sampled: list[int] = []
    generate = trainer.stage.sampler.engine.generate

    def counting(requests: Sequence[Request], **options: Any) -> list[list[Completion]]:
        made = generate(requests, **options)
        sampled.extend(
            len(r.prompt_ids) + sum(len(c.token_ids) for c in cs) for r, cs in zip(requests, made, strict=True)
        )
        return made

    trainer.stage.sampler.engine.generate = counting  # type: ignore[method-assign]
    trainer.train()
    assert [log["num_tokens"] for log in trainer.state.log_history if "loss" in log][-1] == sum(sampled)


def test_a_penalty_of_repetitions_is_sampled_and_the_check_knows(tmp_path: Path) -> None:
    """The check of sampler against trainer compares the policy's log-probabilities, the correction what was sampled."""
    trainer = grpo(tmp_path, generation_kwargs={"repetition_penalty": 100.0}, sampling_correction="token_truncate")
    trainer.stage.sampler_check = SamplerCheck(1e-6)  # the correction would switch it off
    trainer.train()
    trainer.evaluate(PROMPTS[:2])
    plain = dataclasses.replace(trainer.stage.sampler.params, repetition_penalty=1.0)
    repeats: list[int] = []
    for params in (plain, trainer.stage.sampler.params):
        found = trainer.stage.sampler.engine.generate([Request([5, 6], 32, params)], seed=1, step=0)[0]
        repeats.append(sum(len(c.token_ids) - len(set(c.token_ids)) for c in found))
    assert repeats[1] < repeats[0] / 2
