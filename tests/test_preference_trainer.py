"""DPO and KTO: the plain formula, any split, one reference pass, checks that fire."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import tiny
from burnish import CheckFailed, ConfigError, DataError, DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from burnish.objectives.preference import PREFERENCE_LOSSES, PreferenceOptions, kto_losses, pairs_of
from burnish.training.sequence_scores import SequenceScores
from test_trainers import assert_same, settings, weights

PAIRS = [
    {"prompt": f"{i}+{i % 5}=" + "0" * (i % 3), "chosen": str(i) * (1 + i % 3), "rejected": "no" + "x" * (i % 4)}
    for i in range(12)
]
LABELLED = [{"prompt": f"{i}+{i % 5}=", "completion": str(7 * i) * (1 + i % 2), "label": i % 3 != 0} for i in range(12)]
PLAIN = [name for name in PREFERENCE_LOSSES if name != "exo_pair"]


def dpo(folder: Path, model: Any = None, rows: Any = None, **changes: Any) -> DPOTrainer:
    keywords = {name: changes.pop(name) for name in ("peft_config", "ref_model", "eval_dataset") if name in changes}
    args = DPOConfig(**settings(folder, **{"per_device_train_batch_size": 6, "optim": "sgd", **changes}))
    start = model if model is not None else tiny.model()
    return DPOTrainer(start, args=args, train_dataset=rows or PAIRS, processing_class=tiny.tokenizer(), **keywords)


def kto(folder: Path, **changes: Any) -> KTOTrainer:
    keywords = {name: changes.pop(name) for name in ("ref_model", "eval_dataset") if name in changes}
    args = KTOConfig(**settings(folder, **{"per_device_train_batch_size": 6, "optim": "sgd", **changes}))
    return KTOTrainer(tiny.model(), args=args, train_dataset=LABELLED, processing_class=tiny.tokenizer(), **keywords)


def plain_sum(model: Any, prompt: str, completion: str) -> torch.Tensor:
    """log pi of a completion and its end by one plain forward."""
    tokenizer = tiny.tokenizer()
    begin = tokenizer(prompt)["input_ids"]
    ids = begin + tokenizer(completion)["input_ids"] + [0]
    logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logprobs[j - 1, ids[j]] for j in range(len(begin), len(ids)))  # type: ignore[return-value]


def losses_of(trainer: Any) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_loss_and_step_equal_plain_forwards(tmp_path: Path, name: str) -> None:
    """One SGD step from a policy that is not its reference, against the same step by an independent script."""
    changes: dict[str, Any] = {"ref_model": tiny.model(seed=5)} if PREFERENCE_LOSSES[name].needs_reference else {}
    trainer = dpo(
        tmp_path, loss_type=name, label_smoothing=0.1, max_steps=1, max_grad_norm=0.0, learning_rate=0.1, beta=0.3,
        per_device_train_batch_size=12, lr_scheduler_type="constant", **changes,
    )  # fmt: skip
    trainer.train()
    policy, reference = tiny.model(), tiny.model(seed=5)
    sums = [plain_sum(policy, row["prompt"], row[side]) for row in PAIRS for side in ("chosen", "rejected")]
    with torch.no_grad():
        refs = [plain_sum(reference, row["prompt"], row[side]) for row in PAIRS for side in ("chosen", "rejected")]
    tokens = [float(len(row[side]) + 1) for row in PAIRS for side in ("chosen", "rejected")]
    pairs = pairs_of(torch.stack(sums), torch.stack(refs), torch.tensor(tokens))
    row = PREFERENCE_LOSSES[name]
    options = PreferenceOptions(beta=0.3, label_smoothing=0.1)
    loss = row.compute(pairs, options).sum() / (pairs.chosen_tokens.sum() if row.per_token else len(PAIRS))
    loss.backward()
    assert losses_of(trainer)[0] == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter -= 0.1 * parameter.grad
    expected = {name: p.detach() for name, p in policy.named_parameters()}
    scale = max(1.0, max(float(p.grad.abs().max()) for p in policy.parameters()))
    assert_same(weights(trainer), expected, 2e-6 * scale)


@pytest.mark.parametrize(
    "split",
    [{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, {"token_budget": 25}, {"token_budget": 5}],
)
@pytest.mark.parametrize("loss_type", ["sigmoid", "aot", "aot_unpaired", ["sigmoid", "aot", "sft"], "ipo"])
def test_dpo_is_independent_of_the_split(tmp_path: Path, split: dict[str, int], loss_type: Any) -> None:
    whole = dpo(tmp_path / "a", loss_type=loss_type, max_steps=3)
    whole.train()
    parts = dpo(tmp_path / "b", loss_type=loss_type, max_steps=3, **split)
    parts.train()
    assert_same(weights(whole), weights(parts), 2e-6)
    assert losses_of(whole) == pytest.approx(losses_of(parts), abs=1e-5)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize(
    "split", [{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, {"token_budget": 25}]
)
def test_kto_is_independent_of_the_split(tmp_path: Path, split: dict[str, int], loss_type: str) -> None:
    whole = kto(tmp_path / "a", loss_type=loss_type, ref_model=tiny.model(seed=5))
    whole.train()
    parts = kto(tmp_path / "b", loss_type=loss_type, ref_model=tiny.model(seed=5), **split)
    parts.train()
    assert_same(weights(whole), weights(parts), 2e-6)


def test_kto_by_plain_forwards(tmp_path: Path) -> None:
    reference = tiny.model(seed=5)
    trainer = kto(
        tmp_path, max_steps=1, learning_rate=0.0, per_device_train_batch_size=12, beta=0.5, desirable_weight=1.5,
        ref_model=tiny.model(seed=5), train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer.train()
    with torch.no_grad():
        policy = tiny.model()
        ratio = torch.stack(
            [plain_sum(m, r["prompt"], r["completion"]) for r in LABELLED for m in (policy, reference)]
        ).view(-1, 2)
        before = [LABELLED[-1], *LABELLED[:-1]]
        shifted = torch.stack(
            [
                plain_sum(m, r["prompt"], b["completion"])
                for r, b in zip(LABELLED, before, strict=True)
                for m in (policy, reference)
            ]
        ).view(-1, 2)
    kl = (shifted[:, 0] - shifted[:, 1]).mean().clamp(min=0)
    labels = torch.tensor([bool(r["label"]) for r in LABELLED])
    expected = kto_losses(ratio[:, 0] - ratio[:, 1], labels, kl, beta=0.5, desirable_weight=1.5).mean()
    log = trainer.state.log_history[0]
    assert log["kl"] == pytest.approx(float(kl), abs=1e-4)
    assert log["loss"] == pytest.approx(float(expected), abs=1e-5)


def test_kto_takes_preference_rows(tmp_path: Path) -> None:
    args = KTOConfig(**settings(tmp_path))
    trainer = KTOTrainer(tiny.model(), args=args, train_dataset=PAIRS, processing_class=tiny.tokenizer())
    assert len(trainer.train_dataset) == 2 * len(PAIRS)
    trainer.train()


def test_dpo_starts_at_log_2_and_learns_to_prefer(tmp_path: Path) -> None:
    trainer = dpo(tmp_path, max_steps=20, optim="adamw_torch", learning_rate=3e-3, eval_dataset=PAIRS[:5])
    before = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    trainer.train()
    first, *_, last = [log for log in trainer.state.log_history if "loss" in log]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert last["rewards/accuracies"] == 1.0
    assert trainer.evaluate()["eval_rewards/margins"] > 0.1


def test_dpo_resumed_is_uninterrupted(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    whole = dpo(tmp_path / "a", ref_model=tiny.model(seed=5), **changes)
    whole.train()
    resumed = dpo(tmp_path / "a", ref_model=tiny.model(seed=5), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert_same(weights(whole), weights(resumed), 0.0)


def test_a_resumed_run_has_the_first_run_s_reference(tmp_path: Path) -> None:
    """The reference is the model as it was given, not the checkpoint that training goes on from."""
    changes: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = dpo(tmp_path / "a", **changes)
    whole.train()
    resumed = dpo(tmp_path / "a", **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert_same(weights(whole), weights(resumed), 0.0)


def test_the_reference_is_computed_once_and_cached_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []
    original = SequenceScores.of_reference
    monkeypatch.setattr(SequenceScores, "of_reference", lambda s, g: asked.append(len(g)) or original(s, g))
    plain = dpo(tmp_path / "a", max_steps=5)
    plain.train()
    assert sum(asked) == len(PAIRS), "each pair once, over two and a half epochs"
    asked.clear()
    cached = dpo(tmp_path / "b", max_steps=5, precompute_ref_log_probs=True)
    cached.train()
    assert sum(asked) == len(PAIRS)
    assert cached.stage.reference is not None
    assert cached.stage.reference.model is None, "its weights have been freed"
    assert_same(weights(plain), weights(cached), 0.0)
    asked.clear()
    again = dpo(tmp_path / "b", max_steps=5, precompute_ref_log_probs=True)
    again.train()
    assert not asked
    assert_same(weights(plain), weights(again), 0.0)
    other = dpo(tmp_path / "b", tiny.model(seed=3), max_steps=1, precompute_ref_log_probs=True)
    other.train()
    assert sum(asked) == len(PAIRS)
    assert any("of another reference or other data" in record.message for record in caplog.records)


def test_a_wrong_cache_is_caught_before_the_first_update(tmp_path: Path) -> None:
    dpo(tmp_path, max_steps=1, precompute_ref_log_probs=True).train()
    file = tmp_path / "reference_log_probs_train.json"
    stored = json.loads(file.read_text())
    stored["values"] = {index: [v - 1 for v in values] for index, values in stored["values"].items()}
    file.write_text(json.dumps(stored))
    with pytest.raises(CheckFailed, match="reference differs from the policy"):
        dpo(tmp_path, max_steps=1, precompute_ref_log_probs=True).train()


def test_the_reference_moves_towards_the_policy(tmp_path: Path) -> None:
    trainer = dpo(
        tmp_path, sync_ref_model=True, ref_model_mixup_alpha=0.25, ref_model_sync_steps=2, max_steps=2,
        learning_rate=0.1, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    start = tiny.model()
    assert trainer.stage.reference is not None
    assert trainer.stage.reference.model is not None
    own = zip(start.parameters(), trainer.model.parameters(), trainer.stage.reference.model.parameters(), strict=True)
    for first, policy, reference in own:
        torch.testing.assert_close(reference, 0.75 * first + 0.25 * policy, rtol=0, atol=1e-6)
    assert 0 not in trainer.stage.scores.known["train"], "what the old reference said is forgotten"


def test_ld_dpo_weighs_the_tail_of_the_longer_completion(tmp_path: Path) -> None:
    rows = [{"prompt": "1=", "chosen": "ab", "rejected": "abcd"}, {"prompt": "2=", "chosen": "xyz", "rejected": "x"}]
    trainer = dpo(
        tmp_path, rows=rows, loss_type="cpo", ld_alpha=0.3, max_steps=1, learning_rate=0.0,
        per_device_train_batch_size=2,
    )  # fmt: skip
    trainer.train()
    model, tokenizer = tiny.model(), tiny.tokenizer()

    def weighted(prompt: str, completion: str, shorter: int) -> torch.Tensor:
        begin = tokenizer(prompt)["input_ids"]
        ids = begin + tokenizer(completion)["input_ids"] + [0]
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        own = [logprobs[j - 1, ids[j]] for j in range(len(begin), len(ids))]
        return sum(p * (1.0 if i < shorter else 0.3) for i, p in enumerate(own))  # type: ignore[return-value]

    with torch.no_grad():
        margins = [
            weighted(r["prompt"], r["chosen"], n) - weighted(r["prompt"], r["rejected"], n)
            for r, n in zip(rows, (3, 2), strict=True)
        ]
    expected = -torch.nn.functional.logsigmoid(0.1 * torch.stack(margins)).mean()
    assert losses_of(trainer)[0] == pytest.approx(float(expected), abs=1e-5)


def test_lora_s_reference_is_the_base_bit_for_bit(tmp_path: Path) -> None:
    from peft import LoraConfig

    trainer = dpo(
        tmp_path, max_steps=3, peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), learning_rate=0.1
    )
    groups = trainer.train_dataset[:4]
    base = dpo(tmp_path / "base").stage.scores.of_model(groups, tiny_prepared())
    trainer.train()
    assert trainer.stage.scores.of_reference(groups) == base
    assert trainer.stage.scores.of_policy(groups) != base


def tiny_prepared() -> Any:
    from burnish.model.scoring import prepare_for_scoring

    model = tiny.model()
    prepare_for_scoring(model)
    return model


def test_dropout_is_off(tmp_path: Path) -> None:
    from peft import LoraConfig

    class Watches(TrainerCallback):
        def on_step_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            seen.append({m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)})

    seen: list[set[float]] = []
    trainer = dpo(tmp_path, peft_config=LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj"]), max_steps=1)
    trainer.add_callback(Watches())
    trainer.train()
    assert seen == [{0.0}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "dpo"}, r"loss_type = 'dpo': use one of sigmoid, sigmoid_norm"),
        ({"loss_type": []}, r"loss_type = \[\]"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 weights for 2 losses"),
        ({"loss_type": "exo_pair"}, "label_smoothing = 0.0 with loss_type exo_pair"),
        ({"loss_type": "simpo", "precompute_ref_log_probs": True}, "does not use a reference"),
        ({"loss_type": "aot", "f_divergence_type": "forward_kl"}, "that loss is defined on log-ratios"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "set one of them"),
        ({"label_smoothing": 0.5}, r"label_smoothing = 0.5: use a number in \[0, 0.5\)"),
        ({"beta": 0.0}, "beta = 0.0: use a number above 0"),
        ({"ld_alpha": 1.5}, "ld_alpha = 1.5"),
        ({"loss_type": "aot", "use_weighting": True}, "sorted losses are not of single pairs; remove use_weighting"),
    ],
)
def test_bad_values_name_the_fix(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dpo(tmp_path, **changes)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "train_dataset = None: pass rows with `chosen` and `rejected`"),
        ([{"prompt": "a", "completion": "b"}], "row 0"),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], "chosen equals rejected"),
        ([PAIRS[0], {"messages": [{"role": "user", "content": "x"}]}], "row 1"),
    ],
)
def test_bad_rows_are_errors(tmp_path: Path, rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        DPOTrainer(
            tiny.model(), args=DPOConfig(**settings(tmp_path)), train_dataset=rows, processing_class=tiny.tokenizer()
        )


def test_a_reference_that_nobody_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not use a reference: remove ref_model"):
        dpo(tmp_path, loss_type="simpo", ref_model=tiny.model())


def test_the_model_given_as_policy_is_not_the_reference_object(tmp_path: Path) -> None:
    model = tiny.model()
    before = copy.deepcopy(model.state_dict())
    trainer = dpo(tmp_path, model, learning_rate=0.1)
    trainer.train()
    assert trainer.stage.reference is not None
    assert trainer.stage.reference.model is not None
    for name, value in trainer.stage.reference.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_metrics_of_ones_own_read_implicit_rewards(tmp_path: Path) -> None:
    """[P, 2] rewards, chosen and rejected, of all held-out pairs: what DPO's own metrics are means of."""
    seen: list[Any] = []

    def best_of_two(found: Any) -> dict[str, float]:
        seen.append(found)
        right = found.predictions.argmax(-1) == found.label_ids
        return {"best_of_two": right.mean(), "eval_margin": (found.predictions @ [1.0, -1.0]).mean()}

    args = DPOConfig(**settings(tmp_path, metric_for_best_model="best_of_two", beta=0.3))
    trainer = DPOTrainer(
        tiny.model(), tiny.model(seed=5), args, None, PAIRS, {"odd": PAIRS[1::2], "even": PAIRS[::2]},
        tiny.tokenizer(), best_of_two,
    )  # fmt: skip
    metrics = trainer.evaluate(PAIRS)
    assert seen[0].predictions.shape == (12, 2)
    assert seen[0].label_ids.tolist() == [0] * 12
    policy, reference = tiny.model(), tiny.model(seed=5)
    sides = [(row["prompt"], row[side]) for row in PAIRS[:2] for side in ("chosen", "rejected")]
    with torch.no_grad():
        ratios = [plain_sum(policy, *side) - plain_sum(reference, *side) for side in sides]
    by_hand = (0.3 * torch.stack(ratios)).view(2, 2).numpy()
    assert seen[0].predictions[:2] == pytest.approx(by_hand, abs=1e-4)  # fp32 sums
    assert metrics["eval_best_of_two"] == pytest.approx(metrics["eval_rewards/accuracies"])
    assert metrics["eval_margin"] == pytest.approx(metrics["eval_rewards/margins"])
    assert {"eval_odd_best_of_two", "eval_even_best_of_two"} <= trainer.evaluate().keys()


def test_metrics_of_ones_own_in_kto_read_rewards_and_labels(tmp_path: Path) -> None:
    def accuracy(found: Any) -> dict[str, float]:
        assert found.label_ids.tolist() == [int(row["label"]) for row in LABELLED]
        return {"desirable": found.predictions[found.label_ids == 1].mean()}

    args = KTOConfig(**settings(tmp_path))
    trainer = KTOTrainer(tiny.model(), tiny.model(seed=5), args, None, LABELLED, LABELLED, tiny.tokenizer(), accuracy)
    metrics = trainer.evaluate()
    assert metrics["eval_desirable"] == pytest.approx(metrics["eval_rewards/chosen"])
