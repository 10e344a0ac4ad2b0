"""Our online losses, advantages and updates equal TRL's on one rollout. Slow: TRL runs in its own environment.

`python tests/test_trl_online_parity.py` prints the tables of docs/algorithms_measured.md.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from burnish import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from burnish.rollout import Request
from burnish.types import Completion, StopReason

ROOT = Path(__file__).parent.parent
TRL = ROOT / ".venv-trl" / "bin" / "python"

SIZE, LIMIT = 4, 8
PROMPTS = ["2+3=", "17-4=", "8*6+1=", "0"]


def completions() -> list[list[int]]:
    """Sixteen of 2 to 8 tokens, longer ones later; the last of each prompt is cut at the limit, the others end."""
    draw = random.Random(3)
    made: list[list[int]] = []
    for number in range(SIZE * len(PROMPTS)):
        cut = number % SIZE == SIZE - 1
        length = LIMIT if cut else draw.randint(2, 3 + number // SIZE)
        made.append([draw.randint(2, 60) for _ in range(length - (not cut))] + [0] * (not cut))
    return made


COMPLETIONS = completions()
REWARDS: list[list[float | None]] = [
    # Of four functions: one without spread in the third group, one of another size, one that does not always apply,
    # and one that applies nowhere to three completions.
    [
        (7 * i % 11) / 10 if i // SIZE != 2 else 0.5,
        3.0 * (i % 3),
        None if i in (1, 6, 7) else (5 * i % 7) / 4,
        None if i in (2, 5, 14) else (3 * i % 5) / 2,
    ]
    for i in range(len(COMPLETIONS))
]


def texts() -> list[str]:
    """Prompt and completion of each sample, by which its rewards are looked up."""
    decoded = tiny.tokenizer().batch_decode(COMPLETIONS, skip_special_tokens=True)
    found = [PROMPTS[number // SIZE] + text for number, text in enumerate(decoded)]
    assert len(set(found)) == len(found)
    return found


@cache
def logprobs(noise: float, seed: int) -> list[list[float]]:
    """The initial policy's log-probabilities with noise: those of an older policy, or of another engine."""
    model, tokenizer = tiny.model(), tiny.tokenizer()
    generator = torch.Generator().manual_seed(seed)
    made: list[list[float]] = []
    for number, ids in enumerate(COMPLETIONS):
        prompt = tokenizer(PROMPTS[number // SIZE])["input_ids"]
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        exact = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0].detach()
        made.append((exact + noise * torch.randn(len(ids), generator=generator)).tolist())
    return made


def old_logprobs() -> list[list[float]]:
    return logprobs(0.25, 1)


def sampler_logprobs() -> list[list[float]]:
    return logprobs(0.3, 2)


@dataclass(frozen=True)
class Case:
    """A configuration in TRL's words, and in ours.

    Attributes:
        theirs: TRL's fields.
        ours: our fields; None: the same.
        trainer: grpo or rloo.
        rewards: which of the reward functions.
        old: whether old log-probabilities are given; otherwise each trainer computes its own.
        steps: updates; without given old log-probabilities only a second one has ratios other than 1.
        prompts: how many of the prompts there are.
    """

    theirs: dict[str, Any]
    ours: dict[str, Any] | None = None
    trainer: str = "grpo"
    rewards: tuple[int, ...] = (0,)
    old: bool = True
    steps: int = 1
    prompts: int = len(PROMPTS)

    def fields(self) -> dict[str, Any]:
        """What both sides set."""
        return {
            "max_steps": self.steps, "num_iterations": 2, "learning_rate": 1.0, "optim": "sgd",
            "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "num_generations": SIZE,
            "per_device_train_batch_size": SIZE * self.prompts, "max_completion_length": LIMIT,
        }  # fmt: skip


def row(name: str, theirs: dict[str, Any], **changes: Any) -> Case:
    """A row of our table beside the fields that it stands for."""
    return Case({**theirs, **changes}, {"algorithm": name, **changes})


NARROW = {"epsilon": 0.1, "epsilon_high": 0.12}
KL = {"loss_type": "dapo", "beta": 0.3}
SEQUENCE = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
TWO_REWARDS = {"loss_type": "dapo", "reward_weights": [1.0, 0.3]}


def corrected(kind: str, loss: str) -> Case:
    low = None if kind.endswith("truncate") else 0.7
    shared = {"loss_type": loss, "beta": 0.1}
    theirs = {f"vllm_importance_sampling_{k}": v for k, v in (("mode", kind), ("clip_max", 1.4), ("clip_min", low))}
    ours = {"sampling_correction": kind, "sampling_correction_max": 1.4, "sampling_correction_min": low}
    return Case({**shared, **theirs}, {**shared, **ours})


CASES: dict[str, Case] = {
    "`grpo`": row("grpo", {"loss_type": "grpo", "beta": 0.04}),
    "`bnpo`": row("bnpo", {"loss_type": "bnpo"}),
    "`dapo`, without refills": Case(
        {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28},
        {"algorithm": "dapo", "overlong_buffer": None, "max_sampling_rounds": 1},
    ),
    "`dr_grpo`": row("dr_grpo", {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "`gspo`": row("gspo", SEQUENCE, **NARROW),
    "`luspo`": row("luspo", {**SEQUENCE, "loss_type": "luspo"}, **NARROW),
    "`cispo`": row("cispo", {"loss_type": "cispo"}, epsilon_high=1.1),
    "`sapo`": row("sapo", {"loss_type": "sapo"}),
    "`vespo`": row("vespo", {"loss_type": "vespo"}),
    "`vespo`, KL": Case({"loss_type": "vespo", "beta": 0.3}),
    "`vespo_k_pos`, `_neg`, `vespo_lambda_pos`, `_neg`": Case(
        {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_k_neg": 2.0, "vespo_lambda_pos": 1.5, "vespo_lambda_neg": 4.0}
    ),
    "`rloo`": Case({"beta": 0.05}, trainer="rloo"),
    "`grpo`, a second pass": replace(row("grpo", {"loss_type": "grpo", "beta": 0.04}), old=False, steps=2),
    "`gspo`, a second pass": replace(row("gspo", SEQUENCE, **NARROW), old=False, steps=2),
    "`rloo`, a second pass": Case({"beta": 0.05}, trainer="rloo", old=False, steps=2),
    "`delta`, two-sided clip": Case({"loss_type": "grpo", "delta": 1.25}),
    "k3 times the ratio": Case({**KL, "use_bias_correction_kl": True}),
    "k3 times the ratio, `cispo`": Case({"loss_type": "cispo", "beta": 0.3, "epsilon_high": 1.1}),
    "k3 times the sequence's ratio": Case({**SEQUENCE, "beta": 0.3}),
    "k3 alone": Case({**KL, "use_bias_correction_kl": False}),
    "`top_entropy_quantile`": Case({"loss_type": "dapo", "top_entropy_quantile": 0.3}),
    "`top_entropy_quantile`, KL": Case({**KL, "top_entropy_quantile": 0.3}),
    "`entropy_coef`": Case({"loss_type": "grpo", "entropy_coef": 0.1}),
    "`entropy_coef`, `top_entropy_quantile`": Case(
        {"loss_type": "dapo", "entropy_coef": 0.1, "top_entropy_quantile": 0.3}
    ),
    "`use_adaptive_entropy`": Case(
        {
            "loss_type": "grpo",
            "use_adaptive_entropy": True,
            "entropy_coef": 0.1,
            "entropy_coef_delta": 0.05,
            "entropy_target": 9.0,
            "entropy_coef_max": 0.18,
        },
        steps=2,
        old=False,
    ),
    "`use_adaptive_entropy`, above its target": Case(
        {
            "loss_type": "grpo",
            "use_adaptive_entropy": True,
            "entropy_coef": 0.1,
            "entropy_target": 0.5,
            "top_entropy_quantile": 0.5,
        },
        steps=2,
        old=False,
    ),
    "`temperature`": Case({"loss_type": "dapo", "temperature": 0.7, "beta": 0.1}),
    "`scale_rewards` batch": Case({"loss_type": "dapo", "scale_rewards": "batch"}),
    "`scale_rewards` none": Case({"loss_type": "dapo", "scale_rewards": "none"}),
    "two rewards, summed": Case(TWO_REWARDS, rewards=(0, 1)),
    "two rewards, one not everywhere": Case(TWO_REWARDS, rewards=(0, 2)),
    "two rewards, `normalize_then_sum`": Case(
        {**TWO_REWARDS, "multi_objective_aggregation": "normalize_then_sum"}, rewards=(0, 1)
    ),
    "`normalize_then_sum`, one not everywhere": Case(
        {**TWO_REWARDS, "multi_objective_aggregation": "normalize_then_sum"}, rewards=(0, 2)
    ),
    "`mask_truncated_completions`, `grpo`": Case({"loss_type": "grpo", "mask_truncated_completions": True}),
    "`mask_truncated_completions`, `dapo`": Case({**KL, "mask_truncated_completions": True}),
    "`mask_truncated_completions`, `dr_grpo`": Case({"loss_type": "dr_grpo", "mask_truncated_completions": True}),
    "`sapo_temperature_pos`, `_neg`": Case(
        {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0}
    ),
    **{
        f"`sampling_correction` {kind}, `{loss}`": corrected(kind, loss)
        for kind in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
        for loss in ("grpo", "dapo")
    },
    "`sampling_correction` token_truncate, `vespo`": corrected("token_truncate", "vespo"),
    "`sampling_correction` token_mask, `vespo`": corrected("token_mask", "vespo"),
    "`rloo`, no KL": Case({"beta": 0.0}, trainer="rloo"),
    "`rloo`, `normalize_advantages`": Case({"beta": 0.05, "normalize_advantages": True}, trainer="rloo"),
    "`rloo`, `reward_clip_range`": Case({"beta": 0.05, "reward_clip_range": [0.2, 0.7]}, trainer="rloo"),
    "`rloo`, two rewards": Case({"beta": 0.0, "reward_weights": [1.0, 0.3]}, trainer="rloo", rewards=(0, 1)),
}

# One optimizer step of the same rollout, in 1, 2 and 4 micro-batches. True: TRL's update depends on it.
SPLITS: dict[str, tuple[Case, bool]] = {
    "`grpo`": (Case({"loss_type": "grpo"}), False),
    "`dr_grpo`": (Case({"loss_type": "dr_grpo"}), False),
    "`dapo`": (Case({"loss_type": "dapo"}), False),
    "`rloo`": (Case({"beta": 0.05}, trainer="rloo"), False),
    "`bnpo`": (Case({"loss_type": "bnpo"}), True),
    "`grpo`, `entropy_coef` 0.1": (Case({"loss_type": "grpo", "entropy_coef": 0.1}), True),
    "`dapo`, `top_entropy_quantile` 0.5": (Case({"loss_type": "dapo", "top_entropy_quantile": 0.5}), True),
}


def split(case: Case, parts: int) -> Case:
    changes = {"per_device_train_batch_size": len(COMPLETIONS) // parts, "gradient_accumulation_steps": parts}
    return replace(case, theirs={**case.theirs, **changes})


HALF = {"loss_type": "dapo", "per_device_train_batch_size": 2 * SIZE}
OTHERS: dict[str, Case] = {
    "cispo by default": Case({"loss_type": "cispo"}, old=False),
    "cispo with a bound": Case({"loss_type": "cispo", "epsilon_high": 5.0}, old=False),
    "masked, rloo": Case({"beta": 0.0, "mask_truncated_completions": True}, trainer="rloo"),
    "masked, rloo, KL": Case({"beta": 0.3, "mask_truncated_completions": True}, trainer="rloo"),
    "no reward, grpo": Case({"loss_type": "grpo"}, rewards=(3,)),
    "no reward, dapo": Case({"loss_type": "dapo"}, rewards=(3,)),
    "half, alone": Case(HALF, prompts=2),
    "half of a rollout": Case({**HALF, "steps_per_generation": 2}),
}


def all_cases() -> dict[str, Case]:
    parted = {
        f"{name} in {parts}": split(case, parts) for name, (case, _) in SPLITS.items() for parts in (1, 2, 4)
    }  # fmt: skip
    return {**CASES, **parted, **OTHERS}


@dataclass
class Found:
    """What a case gave.

    Attributes:
        losses: of the steps.
        advantages: of the completions, in order.
        weights: after the last step.
        logs: of the steps.
    """

    losses: list[float]
    advantages: list[float]
    weights: dict[str, torch.Tensor]
    logs: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    @property
    def update(self) -> torch.Tensor:
        """What the steps changed, all weights in one row."""
        start = dict(tiny.model().named_parameters())
        return torch.cat([(self.weights[name] - value).detach().flatten() for name, value in start.items()])


def by_trl(cases: dict[str, Case], folder: Path) -> dict[str, Found]:
    if not TRL.is_file():
        pytest.skip("TRL's environment is not there: make trl")
    for name, seed in (("policy", 0), ("reference", 5)):
        tiny.model(seed=seed).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    names = {name: f"case{number}" for number, name in enumerate(cases)}
    given = {
        "prompts": PROMPTS,
        "completions": COMPLETIONS,
        "old_logprobs": old_logprobs(),
        "sampler_logprobs": sampler_logprobs(),
        "rewards": dict(zip(texts(), REWARDS, strict=True)),
        "cases": {
            names[name]: {
                "trainer": case.trainer, "rewards": case.rewards, "old": case.old, "prompts": case.prompts,
                "config": {**case.fields(), **case.theirs},
            }
            for name, case in cases.items()
        },
    }  # fmt: skip
    (folder / "cases.json").write_text(json.dumps(given))
    done = subprocess.run(
        [TRL, "-W", "ignore", Path(__file__).parent / "trl_online_worker.py", folder],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "found.json").read_text())
    weights = {name: torch.load(folder / f"{file}.pt", weights_only=True) for name, file in names.items()}
    return {name: Found(**found[file], weights=weights[name]) for name, file in names.items()}


class Fixed:
    """An engine whose completions are given, and with `old` their old log-probabilities."""

    def __init__(self, old: bool) -> None:
        self.old = old

    def generate(self, requests: Sequence[Request], *, seed: int, step: int) -> list[list[Completion]]:
        starts = [SIZE * (request.index % len(PROMPTS)) + request.first_sample for request in requests]
        return [
            [self.completion(number) for number in range(start, start + request.num_samples)]
            for start, request in zip(starts, requests, strict=True)
        ]

    def completion(self, number: int) -> Completion:
        ids = COMPLETIONS[number]
        return Completion(
            list(ids),
            text=tiny.tokenizer().decode(ids, skip_special_tokens=True),
            stop_reason=StopReason.EOS if ids[-1] == 0 else StopReason.LENGTH,
            sampler_logprobs=list(sampler_logprobs()[number]),
            token={"old_logprobs": list(old_logprobs()[number])} if self.old else {},
        )

    def sync(self, version: int) -> None: ...

    def close(self) -> None: ...


def reward(place: int) -> Any:
    table = dict(zip(texts(), REWARDS, strict=True))

    def scores(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return [table[p + c][place] for p, c in zip(prompts, completions, strict=True)]

    scores.__name__ = f"reward_{place}"
    return scores


def by_burnish(case: Case, folder: Path) -> Found:
    shared = {
        "output_dir": str(folder), "bf16": False, "use_cpu": True, "report_to": [], "logging_steps": 1,
        "save_strategy": "no", "progress": False, "shuffle_dataset": False,
    }  # fmt: skip
    trainer_class, config_class = (RLOOTrainer, RLOOConfig) if case.trainer == "rloo" else (GRPOTrainer, GRPOConfig)
    args = config_class(**{**shared, **case.fields(), **(case.theirs if case.ours is None else case.ours)})
    trainer = trainer_class(
        tiny.model(),
        [reward(place) for place in case.rewards],
        args,
        [{"prompt": prompt} for prompt in PROMPTS[: case.prompts]],
        processing_class=tiny.tokenizer(),
        engine=Fixed(case.old),
        ref_model=tiny.model(seed=5) if args.beta > 0 else None,
    )
    advantages: list[float] = []
    algorithm: Any = trainer.stage.algorithm
    assign = algorithm.assign_advantages

    def assigned(shards: Any) -> Any:
        metrics = assign(shards)
        advantages.extend(c.sequence["advantages"] for shard in shards for c in shard.group.completions)
        return metrics

    algorithm.assign_advantages = assigned
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    weights = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    return Found([log["loss"] for log in logs], advantages, weights, logs)


def apart(left: Sequence[float], right: Sequence[float]) -> float:
    return max(abs(x - y) for x, y in zip(left, right, strict=True))


def updates_apart(left: Found, right: Found) -> float:
    """The largest difference of a weight, of the largest change."""
    return float((left.update - right.update).abs().max() / left.update.abs().max())


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    return by_trl(all_cases(), tmp_path_factory.mktemp("trl"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_loss_advantages_and_update_are_trl_s(tmp_path: Path, trl: dict[str, Found], name: str) -> None:
    ours, theirs = by_burnish(CASES[name], tmp_path), trl[name]
    assert apart(ours.losses, theirs.losses) < 1e-5
    assert apart(ours.advantages, theirs.advantages) < 1e-5
    # Updates are differences of weights, which round at 1e-7 of a weight: 1e-5 of changes of 0.01 and more.
    assert updates_apart(theirs, ours) < 3e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["`dapo`, without refills", "`delta`, two-sided clip", "`rloo`"])
def test_ratios_are_clipped_on_both_sides(tmp_path: Path, name: str) -> None:
    log = by_burnish(CASES[name], tmp_path).logs[-1]
    assert log["clip_ratio/high_mean"] > 0.02
    assert log["clip_ratio/low_mean"] > 0.02


@pytest.mark.slow
def test_metrics_of_the_same_name_are_the_same(tmp_path: Path, trl: dict[str, Found]) -> None:
    ours = by_burnish(CASES["k3 alone"], tmp_path).logs[-1]
    theirs = trl["k3 alone"].logs[-1]
    for name in (
        "kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "reward",
        "frac_reward_zero_std", "rewards/reward_0/mean", "rewards/reward_0/std", "completions/mean_length",
        "completions/clipped_ratio",
    ):  # fmt: skip
        assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if "adaptive" in name or name == "`vespo`, KL"])
def test_metrics_of_an_adaptive_bonus_and_of_vespo_are_trl_s(tmp_path: Path, trl: dict[str, Found], name: str) -> None:
    ours, theirs = by_burnish(CASES[name], tmp_path).logs, trl[name].logs
    metric = "vespo/phi_seq_mean" if "vespo" in name else "entropy_coef"
    found = [log[metric] for log in ours]
    assert found == pytest.approx([log[metric] for log in theirs], abs=1e-6)
    assert len(set(found)) > (metric == "entropy_coef")


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLITS)
def test_trl_s_split_changes_some_updates_and_ours_none(tmp_path: Path, trl: dict[str, Found], name: str) -> None:
    case, depends = SPLITS[name]
    whole = by_burnish(split(case, 1), tmp_path)
    assert updates_apart(trl[f"{name} in 1"], whole) < 3e-5
    for parts in (2, 4):
        ours = by_burnish(split(case, parts), tmp_path)
        assert updates_apart(whole, ours) < 3e-5
        assert apart(whole.losses, ours.losses) < 1e-6
    moved = max(updates_apart(trl[f"{name} in 1"], trl[f"{name} in {parts}"]) for parts in (2, 4))
    # Rounding alone stays below 1e-5.
    assert (moved > 5e-4) == depends


@pytest.mark.slow
def test_trl_s_cispo_scales_every_gradient_by_its_default_epsilon(trl: dict[str, Found]) -> None:
    plain, bounded = (trl[name].update.norm() for name in ("cispo by default", "cispo with a bound"))
    assert float(plain / bounded) == pytest.approx(0.2, abs=1e-5)


@pytest.mark.slow
def test_masked_completions_count_as_a_constant_in_trl_s_rloo(tmp_path: Path, trl: dict[str, Found]) -> None:
    name = "masked, rloo"
    ours, theirs = by_burnish(OTHERS[name], tmp_path), trl[name]
    constant = -sum(ours.advantages[SIZE - 1 :: SIZE]) / len(COMPLETIONS)
    assert abs(constant) > 0.01
    assert theirs.losses[0] - ours.losses[0] == pytest.approx(constant, abs=1e-6)
    assert updates_apart(theirs, ours) < 3e-5
    # Their reward keeps the KL that all others lose, and with it the baseline of the others.
    with_kl = by_burnish(OTHERS["masked, rloo, KL"], tmp_path)
    assert apart(with_kl.advantages, trl["masked, rloo, KL"].advantages) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["grpo", "dapo"])
def test_completions_without_reward_count_in_trl_s_denominators(
    tmp_path: Path, trl: dict[str, Found], loss: str
) -> None:
    name = f"no reward, {loss}"
    ours, theirs = by_burnish(OTHERS[name], tmp_path), trl[name]
    failed = [values[3] is None for values in REWARDS]
    assert apart(ours.advantages, theirs.advantages) < 1e-5
    sizes = [1 if loss == "grpo" else len(ids) for ids in COMPLETIONS]
    fraction = sum(n for n, no in zip(sizes, failed, strict=True) if not no) / sum(sizes)
    assert theirs.losses[0] == pytest.approx(fraction * ours.losses[0], abs=1e-6)
    assert float(theirs.update.norm() / ours.update.norm()) == pytest.approx(fraction, abs=1e-4)


@pytest.mark.slow
def test_trl_s_dapo_divides_a_part_of_a_rollout_by_the_mean_part(tmp_path: Path, trl: dict[str, Found]) -> None:
    alone, part = trl["half, alone"], trl["half of a rollout"]
    assert apart(alone.advantages, part.advantages[: 2 * SIZE]) < 1e-6
    own, all_tokens = (sum(map(len, COMPLETIONS[:number])) for number in (2 * SIZE, 4 * SIZE))
    assert own != all_tokens / 2
    assert part.losses[0] / alone.losses[0] == pytest.approx(own / (all_tokens / 2), abs=1e-4)
    assert updates_apart(alone, by_burnish(OTHERS["half, alone"], tmp_path)) < 3e-5


def main() -> None:
    """Print the tables of docs/algorithms_measured.md."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        theirs = by_trl(all_cases(), folder)
        print("| case | loss | advantages | update |\n| --- | --- | --- | --- |")
        for name, case in CASES.items():
            ours = by_burnish(case, folder / "ours")
            values = (
                apart(ours.losses, theirs[name].losses),
                apart(ours.advantages, theirs[name].advantages),
                updates_apart(theirs[name], ours),
            )
            print(f"| {name} | " + " | ".join(f"{value:.1e}" for value in values) + " |", flush=True)
        print("\n| step | TRL in 1, 2, 4 | update | burnish | update |\n| --- | --- | --- | --- | --- |")
        for name, (case, _) in SPLITS.items():
            pair = (
                [theirs[f"{name} in {n}"] for n in (1, 2, 4)],
                [by_burnish(split(case, n), folder) for n in (1, 2, 4)],
            )
            cells = [
                cell
                for side in pair
                for cell in (
                    ", ".join(f"{one.losses[0]:.4f}" for one in side),
                    ", ".join(f"{updates_apart(side[0], one):.1e}" for one in side[1:]),
                )
            ]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        for name, case in OTHERS.items():
            found = [theirs[name]]
            if name != "cispo by default" and "half of" not in name:
                found.append(by_burnish(case, folder))
            print(name, [(one.losses[0], float(one.update.norm())) for one in found], flush=True)


if __name__ == "__main__":
    main()
