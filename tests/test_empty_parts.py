"""Steps, parts and held-out sets that hold few rows or none: every stage runs them, or names what is missing."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import test_finite
import tiny
from burnish import DataError, RLOOConfig, RLOOTrainer
from burnish.model.packing import split_by_tokens

TRAINERS = {**test_finite.TRAINERS, "rloo": (RLOOTrainer, RLOOConfig)}
LABELLED = [
    {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0}
    for i, row in enumerate(test_finite.PAIRS)
]
ROWS = {**test_finite.ROWS, "kto": LABELLED}
STAGES = sorted(TRAINERS)


def make(kind: str, folder: Path, rows: list[Any], held_out: list[Any] | None = None, **changes: Any) -> Any:
    trainer, config = TRAINERS[kind]
    fields: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "learning_rate": 1e-3, "report_to": [],
        "save_strategy": "no", "progress": False, "logging_steps": 1, "max_dead_steps": 0,
    }  # fmt: skip
    own: dict[str, Any] = {}
    if kind not in ROWS:
        fields |= {"num_generations": 4, "max_completion_length": 4}
        own = {"reward_funcs": test_finite.digits}
        changes["per_device_train_batch_size"] = 4 * changes.get("per_device_train_batch_size", 1)
    return trainer(
        model=tiny.model(),
        args=config(**{**fields, **changes}),
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tiny.tokenizer(),
        **own,
    )


def rows_of(kind: str) -> list[Any]:
    return ROWS.get(kind, test_finite.PROMPTS)


def losses(trainer: Any) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize(
    ("num_rows", "changes"),
    [
        (3, {"per_device_train_batch_size": 2}),
        (2, {"per_device_train_batch_size": 1}),
        (3, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}),
    ],
    ids=["odd row left", "batch 1", "odd row left and an empty micro-batch"],
)
def test_steps_of_a_single_row(tmp_path: Path, kind: str, num_rows: int, changes: dict[str, Any]) -> None:
    trainer = make(kind, tmp_path, rows_of(kind)[:num_rows], rows_of(kind)[:1], num_train_epochs=1, **changes)
    trainer.train()
    assert losses(trainer)
    assert all(math.isfinite(loss) for loss in losses(trainer))
    assert math.isfinite(trainer.evaluate()["eval_loss"])  # one held-out row


@pytest.mark.parametrize("kind", sorted(ROWS))
def test_rows_that_are_cut_away_are_left_out_and_all_of_them_refused(tmp_path: Path, kind: str) -> None:
    rows = rows_of(kind)
    cut = [{**row, "prompt": "1" * 200} for row in rows[:3]]
    with pytest.raises(DataError, match=r"^train_dataset: .*(max_length|limits)"):
        make(kind, tmp_path, cut, max_length=100)
    with pytest.raises(DataError, match=r"^eval_dataset: .*(max_length|limits)"):
        make(kind, tmp_path, rows, cut, max_length=100)
    trainer = make(kind, tmp_path, [*cut, *rows[:3]], [*cut, rows[3]], max_length=100, per_device_train_batch_size=2)
    assert len(trainer.train_dataset) == 3
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))
    assert math.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("kind", [kind for kind in sorted(ROWS) if kind != "reward"])  # scores have no mask
@pytest.mark.parametrize("every", [1, 2])
def test_masked_rows_contribute_nothing(tmp_path: Path, kind: str, every: int) -> None:
    """Where all rows are masked no weight moves; where some are, the others train."""
    changes = {"per_device_train_batch_size": 1, "max_steps": 4, "weight_decay": 0.0}
    trainer = make(kind, tmp_path, rows_of(kind)[:4], **changes)
    for group in trainer.train_dataset[::every]:
        for completion in group.completions:
            completion.loss_mask = [False] * len(completion.token_ids)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainer.train()
    same = all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())
    assert same == (every == 1)
    assert all(math.isfinite(loss) for loss in losses(trainer))


@pytest.mark.parametrize("kind", sorted(TRAINERS.keys() - ROWS.keys()))
def test_masked_completions_contribute_nothing(tmp_path: Path, kind: str) -> None:
    rows = rows_of(kind)
    masked = {"mask_truncated_completions": True, "max_completion_length": 1}
    trainer = make(kind, tmp_path, rows[:3], rows[:1], max_steps=2, **masked)
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_kto_says_that_a_step_of_one_row_has_no_estimate_of_the_kl(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def warned(**changes: Any) -> bool:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            make("kto", tmp_path, LABELLED, **changes)
        return any("per_device_train_batch_size = 1" in message for message in caplog.messages)

    assert warned(per_device_train_batch_size=1)
    assert not warned(per_device_train_batch_size=1, gradient_accumulation_steps=2)
    assert not warned(per_device_train_batch_size=1, loss_type="apo_zero_unpaired")


@pytest.mark.parametrize("budget", [None, 100])
def test_nothing_is_split_into_no_parts(budget: int | None) -> None:
    assert split_by_tokens([], budget) == []
