"""Passes without gradients: a group cut into pieces has the scores of the whole, and its prompt is computed once."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from burnish import GRPOConfig
from burnish.model.classifier import prepare_for_rewards, to_reward_model
from burnish.model.loading import load_model
from burnish.model.packing import split_by_tokens, unpack
from burnish.model.reward_model import RewardModel
from burnish.model.scoring import causal_lm, keeps_prompts, prepare_for_scoring, score
from burnish.training.critic import Critic
from burnish.training.stage import Stage
from burnish.types import Completion, Group
from live_bytes import LiveBytes
from test_critic import made as value_model
from test_kept_prompt import GROUPS, KINDS, group, prepared
from test_scoring import DEFAULT_TOLERANCE, TOLERANCE
from test_trainers import grpo

CHECKPOINTING = (
    "activation_checkpointing" if hasattr(GRPOConfig, "activation_checkpointing") else "gradient_checkpointing"
)
SMALL, WHOLE = 85, 4096
"""Token budgets: two groups in pieces, and all in one row."""
LORA: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def completions(groups: list[Group]) -> list[Completion]:
    return [completion for group in groups for completion in group.completions]


def num_tokens(groups: list[Group], budget: int) -> int:
    """Tokens of a pass with kept prompts."""
    parts = split_by_tokens(groups, budget, keep_prompts=True)
    kept = {id(prompt): prompt.num_tokens for part in parts if (prompt := part[0].kept_prompt) is not None}
    return sum(group.num_tokens for part in parts for group in part) + sum(kept.values())


def seen_rows(model: Any) -> list[int]:
    """Tokens of each row that passes a layer, from now on."""
    rows: list[int] = []
    lm = causal_lm(model)
    layers = lm.transformer.h if hasattr(lm, "transformer") else lm.model.layers
    layers[1].register_forward_hook(lambda module, args, output: rows.append(args[0].shape[1]))
    return rows


@torch.no_grad()
def logprobs(model: Any, groups: list[Group], budget: int) -> list[list[float]]:
    stage = Stage(SimpleNamespace(token_budget=budget, device="cpu"), tiny.tokenizer())
    stage.run = SimpleNamespace(keeps_prompts=keeps_prompts)  # type: ignore[assignment]
    found: dict[int, list[float]] = {}
    for part, batch in stage.scored_parts(groups, model):
        values = unpack(part, score(model, batch, temperature=0.7).logprobs.tolist())
        found |= {id(one): own for one, own in zip(completions(part), values, strict=True)}
    return [found[id(one)] for one in completions(groups)]


def assert_close(found: list[list[float]], expected: list[list[float]], tolerance: float) -> None:
    for own, other in zip(found, expected, strict=True):
        assert own == pytest.approx(other, rel=0, abs=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_pieces_are_those_of_whole_groups(kind: str) -> None:
    """Long prompts, one of a single token and an empty one."""
    model = prepared(kind).eval()
    expected = logprobs(model, GROUPS, WHOLE)
    rows = seen_rows(model)
    assert_close(logprobs(model, GROUPS, SMALL), expected, 10 * TOLERANCE.get(kind, DEFAULT_TOLERANCE))
    assert sum(rows) == num_tokens(GROUPS, SMALL)


def test_a_prompt_is_scored_once() -> None:
    model = prepared().eval()
    rows = seen_rows(model)
    logprobs(model, [group(150, *[30] * 8)], 180)
    assert rows == [149] + [31] * 8


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_weights(quantization: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny.model(hidden_size=64, head_dim=16, intermediate_size=64).save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), bf16=False, init_kwargs={"quantization_config": quantization})
    prepare_for_scoring(model)
    model.eval()
    expected = logprobs(model, GROUPS, WHOLE)
    # In 8 bits the inputs of a layer are rounded too, and a last digit may decide how.
    assert_close(logprobs(model, GROUPS, SMALL), expected, 1e-4 if quantization == "nf4" else 0.1)


def test_what_is_kept_goes_with_its_group() -> None:
    """The bytes of several groups are those of one, and none are left, with the parts still there."""
    model = prepared().eval()

    def peak(number: int) -> int:
        groups = [group(150, *[30] * 4, seed=seed) for seed in range(number)]
        gc.collect()
        with LiveBytes() as live:
            logprobs(model, groups, 180)
        assert live.live == 0
        return live.peak

    peak(1)  # caches of the first run
    assert peak(6) < 1.02 * peak(1)


REFERENCES = ["a copy", "adapters off", "adapters as given", "a model of its own"]
SAVING = {CHECKPOINTING: True, "activation_offloading": True, "mlp_tiles": 3}


def trainer_of(folder: Path, reference: str, **changes: Any) -> Any:
    """A trainer whose policy has left its reference, in float64."""
    model, keywords = tiny.model(dtype=torch.float64), {}
    if reference == "adapters off":
        keywords["peft_config"] = LoraConfig(**LORA)
    elif reference == "adapters as given":
        model = get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False)).double()
    elif reference == "a model of its own":
        keywords["ref_model"] = tiny.model(dtype=torch.float64, seed=1)
    trainer = grpo(folder, model, beta=0.1, token_budget=SMALL, **keywords, **changes)
    tiny.move(trainer.model, 0.05)
    return trainer


@pytest.mark.parametrize(
    ("reference", "saving"), [(name, {}) for name in REFERENCES] + [("adapters off", SAVING), ("a copy", SAVING)]
)
def test_policy_and_reference_have_prompts_of_their_own(tmp_path: Path, reference: str, saving: dict[str, Any]) -> None:
    trainer = trainer_of(tmp_path, reference, **saving)
    rows = seen_rows(trainer.model)
    pieces, whole = copy.deepcopy(GROUPS), copy.deepcopy(GROUPS)
    trainer.stage.fill_logprobs(pieces, old=pieces)
    passes = 2 if reference.startswith("adapters") else 1
    assert sum(rows) == passes * num_tokens(GROUPS, SMALL)
    trainer.args.token_budget = WHOLE
    trainer.stage.fill_logprobs(whole, old=whole)
    for name in ("old_logprobs", "ref_logprobs"):
        found, expected = ([one.token[name] for one in completions(groups)] for groups in (pieces, whole))
        assert_close(found, expected, 10 * DEFAULT_TOLERANCE)
    assert max(abs(a - b) for one in completions(whole) for a, b in zip(*one.token.values(), strict=True)) > 0.05


def test_sharded_weights_keep_no_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path, "a copy")
    assert trainer.keeps_prompts(trainer.model)
    rows = seen_rows(trainer.model)
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", "FSDP")
    groups = copy.deepcopy(GROUPS)
    trainer.stage.fill_logprobs(groups, old=groups)
    assert sum(rows) == sum(group.num_tokens for part in split_by_tokens(GROUPS, SMALL) for group in part)


def test_quantiles_and_evaluations_are_those_of_whole_groups(tmp_path: Path) -> None:
    """The passes for entropies, and for the loss of held-out samples."""
    prompts = [{"prompt": str(n) * 75} for n in range(3)]

    def found(budget: int) -> tuple[list[float], dict[str, float]]:
        trainer = grpo(
            tmp_path / str(budget), beta=0.1, token_budget=budget, top_entropy_quantile=0.5, eval_dataset=prompts,
            num_generations=4,
        )  # fmt: skip
        return trainer.stage.algorithm._entropies(GROUPS), trainer.evaluate()

    (entropies, metrics), (whole, expected) = found(SMALL), found(WHOLE)
    assert sorted(entropies) == pytest.approx(sorted(whole), abs=1e-5)
    assert metrics["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("form", ["model", "adapters"])
@pytest.mark.parametrize("saves", [False, True])
def test_a_critic(form: str, saves: bool) -> None:
    """Values, and the update on them."""
    results: list[tuple[list[list[float]], dict[str, float], dict[str, torch.Tensor]]] = []
    for budget in (WHOLE, SMALL):
        model, _ = value_model(form, dtype=torch.float64)
        groups = copy.deepcopy(GROUPS)
        critic = Critic(
            model, learning_rate=0.1, make_optimizer=torch.optim.SGD, max_grad_norm=None, token_budget=budget,
            keeps_prompts=keeps_prompts(model), checkpointing=saves, offloads=saves,
        )  # fmt: skip
        rows = seen_rows(model)
        critic.values(groups)
        assert sum(rows) == num_tokens(GROUPS, budget)
        values = [one.token["values"] for one in completions(groups)]
        for one in completions(groups):
            one.token["returns"] = [0.5] * len(one.token_ids)
        metrics = critic.update(groups, clip=0.2)
        assert saves or sum(rows) == 2 * num_tokens(GROUPS, budget)
        results.append((values, metrics, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}))
    (expected, whole, weights), (found, pieces, moved) = results
    assert_close(found, expected, 1e-5)
    assert pieces == pytest.approx(whole, abs=1e-6)
    for name, value in weights.items():
        torch.testing.assert_close(moved[name], value, rtol=0, atol=1e-7, msg=name)


def test_a_reward_model() -> None:
    model = to_reward_model(tiny.model(), seed=0)
    prepare_for_rewards(model)
    prompts = [str(n) * 75 for n in (3, 4) for _ in range(3)]
    answers = ["12", "123456", "7", "88", "9" * 12, "1"]
    expected = RewardModel(model, tiny.tokenizer(), token_budget=None)(prompts, answers)
    rows = seen_rows(model)
    assert RewardModel(model, tiny.tokenizer(), token_budget=SMALL)(prompts, answers) == pytest.approx(
        expected, abs=1e-5
    )
    assert rows.count(74) == 2
    assert max(rows) == 74
