"""Rows of token ids: the same loss as their texts, in every stage; and the page that lists all formats."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import burnish
import tiny
from burnish.data import (
    EncodeStats,
    encode_rows,
    preference_group,
    prompt_group,
    reward_group,
    sft_group,
    sft_groups,
    unpaired_group,
)
from burnish.errors import ConfigError, DataError
from burnish.types import Group
from test_trainers import settings

TOKENIZER = tiny.tokenizer()
NAMES = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "reward": "Reward"}


def ids(text: str, *, end: bool = True) -> list[int]:
    return [*TOKENIZER(text)["input_ids"], *([TOKENIZER.eos_token_id] if end else [])]


def questions() -> list[tuple[str, str, str]]:
    return [(f"{i}+{i}=", str(2 * i), "no" * i) for i in range(1, 5)]


def masked(prompt: str, answer: str, kind: str) -> dict[str, Any]:
    """A question and its answer as tokens, the answer scored."""
    sequence, skipped = ids(prompt + answer), len(ids(prompt, end=False))
    mask = [int(position >= skipped) for position in range(len(sequence))]
    labels = [token if scored else -100 for token, scored in zip(sequence, mask, strict=True)]
    return {"input_ids": sequence, kind: labels if kind == "labels" else mask}


CASES: list[tuple[str, Any, Any, dict[str, Any]]] = [
    ("sft", lambda q, a, _: {"text": q + a}, lambda q, a, _: {"input_ids": ids(q + a)}, {}),
    *(
        (
            "sft",
            lambda q, a, _: {"prompt": q, "completion": a},
            lambda q, a, _, kind=kind: masked(q, a, kind),
            {"assistant_only_loss": True} if kind == "assistant_masks" else {},
        )
        for kind in ("labels", "completion_mask", "assistant_masks")
    ),
    (
        "sft",
        lambda q, a, _: {"prompt": q, "completion": a},
        lambda q, a, _: masked(q, a, "completion_mask"),
        {"completion_only_loss": False},
    ),
    (
        "dpo",
        lambda q, a, b: {"prompt": q, "chosen": a, "rejected": b},
        lambda q, a, b: {"prompt_ids": ids(q, end=False), "chosen_ids": ids(a), "rejected_ids": ids(b)},
        {},
    ),
    (
        "kto",
        lambda q, a, b: {"prompt": q, "completion": a, "label": q[0] in "13"},
        lambda q, a, b: {"prompt_ids": ids(q, end=False), "completion_ids": ids(a), "label": q[0] in "13"},
        {},
    ),
    (
        "reward",
        lambda q, a, b: {"prompt": q, "chosen": a, "rejected": b},
        lambda q, a, b: {"chosen_ids": ids(q + a), "rejected_ids": ids(q + b)},
        {},
    ),
]


def losses(stage: str, folder: Path, rows: list[dict[str, Any]], **changes: Any) -> list[float]:
    fields = {"per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, **changes}
    args = getattr(burnish, f"{NAMES[stage]}Config")(**settings(folder, **fields))
    trainer = getattr(burnish, f"{NAMES[stage]}Trainer")(
        tiny.model(), args=args, train_dataset=rows, processing_class=tiny.tokenizer()
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("stage", "text", "tokens", "options"), CASES)
def test_tokens_have_the_loss_of_their_text(
    tmp_path: Path, stage: str, text: Any, tokens: Any, options: dict[str, Any]
) -> None:
    shared = {name: value for name, value in options.items() if name != "assistant_only_loss"}
    expected = losses(stage, tmp_path / "text", [text(*q) for q in questions()], **shared)
    found = losses(stage, tmp_path / "ids", [tokens(*q) for q in questions()], **options)
    assert len(expected) == 2
    assert found == pytest.approx(expected, rel=1e-6), "float32, other order of sums"


@pytest.mark.parametrize(("stage", "text", "tokens", "options"), [case for case in CASES if case[0] != "reward"])
def test_max_length_cuts_tokens_as_text(stage: str, text: Any, tokens: Any, options: dict[str, Any]) -> None:
    encoder = {"sft": sft_group, "dpo": preference_group, "kto": unpaired_group}[stage]
    for question in questions():
        found = encoder(tokens(*question), TOKENIZER, max_length=5, **options)
        shared = {name: value for name, value in options.items() if name != "assistant_only_loss"}
        expected = encoder(text(*question), TOKENIZER, max_length=5, **shared)
        assert found.num_tokens <= 5 * len(found.completions)
        assert scored(found) == scored(expected)


def scored(group: Group) -> list[list[tuple[int, bool]]]:
    """Whole sequences with what is scored of them."""
    prompt = [(token, False) for token in group.prompt_ids]
    masks = [c.loss_mask or [True] * len(c.token_ids) for c in group.completions]
    return [prompt + list(zip(c.token_ids, m, strict=True)) for c, m in zip(group.completions, masks, strict=True)]


def test_reward_rows_over_max_length_are_left_out(tmp_path: Path) -> None:
    rows = [{"chosen_ids": ids(q + a), "rejected_ids": ids(q + b)} for q, a, b in questions()]
    args = burnish.RewardConfig(**settings(tmp_path, max_length=9))
    made = burnish.RewardTrainer(tiny.model(), args, train_dataset=rows, processing_class=tiny.tokenizer())
    assert [group.index for group in made.train_dataset] == [0, 1]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end", "drop", "split"])
def test_truncation(mode: str) -> None:
    """Masks are cut with their tokens."""
    text, tokens = (
        sft_groups(row, TOKENIZER, max_length=4, truncation_mode=mode, stats=EncodeStats())
        for row in ({"text": "1+1=2"}, {"input_ids": ids("1+1=2")})
    )
    assert [[(c.token_ids, c.loss_mask) for c in g.completions] for g in tokens] == [
        [(c.token_ids, c.loss_mask) for c in g.completions] for g in text
    ]
    row = masked("1+1=", "2", "completion_mask")
    if mode == "split":
        with pytest.raises(ConfigError, match="truncation_mode = 'split', but row 0 has a prompt and a completion"):
            sft_groups(row, TOKENIZER, max_length=4, truncation_mode=mode)


def test_masks_are_met_together() -> None:
    row = {
        "input_ids": [5, 6, 7, 8, 9],
        "labels": [5, 6, 7, 8, -100],
        "completion_mask": [1, 1, 0, 1, 1],
        "assistant_masks": [1, 1, 1, 1, 1],
    }
    assert sft_group(row, TOKENIZER).completions[0].loss_mask == [False, True, False, True, False]
    off = sft_group(row, TOKENIZER, completion_only_loss=False)
    assert off.completions[0].loss_mask == [False, True, True, True, False]


def test_a_row_without_a_scored_token_is_skipped_and_counted() -> None:
    stats = EncodeStats()
    rows = [{"input_ids": [5, 6], "labels": [-100, -100]}, {"input_ids": [5, 6]}]
    assert [group.index for group in encode_rows(sft_group, rows, TOKENIZER, stats=stats)] == [1]
    assert stats.num_skipped_rows == 1
    assert stats.formats == {"tokenized language_modeling": 2}


PAIR = {"prompt_ids": [5], "chosen_ids": [6, 0], "rejected_ids": [7, 0]}
WHOLE = {"chosen_ids": [5, 6, 0], "rejected_ids": [5, 7, 0]}
SINGLE = {"prompt_ids": [5], "completion_ids": [6, 0], "label": True}
SEQUENCE = {"input_ids": [5, 6, 0]}


@pytest.mark.parametrize(
    ("encoder", "row", "message"),
    [
        *(
            (encoder, {**row, name: value}, rf"row 3: {name}.*use ")
            for encoder, row in (
                (sft_group, SEQUENCE),
                (preference_group, PAIR),
                (reward_group, WHOLE),
                (unpaired_group, SINGLE),
            )
            for name in row
            if name != "label"
            for value in ([], "abc", 5, [5, -1], [5, 2**40], [5.0], [True], ["a"], [None], [[5]])
        ),
        (sft_group, {**SEQUENCE, "text": "x"}, "row 3 fits more than one format"),
        (sft_group, {**SEQUENCE, "prompt": "x"}, "row 3 mixes token ids with text in prompt"),
        (preference_group, {**PAIR, "chosen": "x"}, "row 3 mixes token ids with text in chosen"),
        (
            preference_group,
            {"chosen": "x", "rejected": "y", "prompt_ids": [1]},
            "mixes text with token ids",
        ),
        (preference_group, WHOLE, r"needs chosen \+ rejected \| prompt_ids \+ chosen_ids \+ rejected_ids"),
        (preference_group, {**PAIR, "rejected_ids": [6, 0]}, "chosen and rejected are the same tokens"),
        (preference_group, {"chosen_input_ids": [1]}, "rename chosen_input_ids to chosen_ids"),
        (reward_group, {**WHOLE, "prompt": "x"}, "row 3 mixes token ids with text in prompt"),
        (reward_group, {**WHOLE, "rejected": "x"}, "row 3 mixes token ids with text in rejected"),
        (reward_group, PAIR, "row 3 has prompt_ids: here chosen_ids and rejected_ids are whole sequences"),
        (reward_group, {**WHOLE, "rejected_ids": [5, 6, 0]}, "two completions are the same tokens"),
        (unpaired_group, {**SINGLE, "prompt": "x"}, "row 3 mixes token ids with text in prompt"),
        (unpaired_group, {**SINGLE, "label": "yes"}, "label = 'yes': use true"),
        (prompt_group, {"prompt_ids": [5]}, "stage 'prompt' needs prompt"),
        (sft_group, {**SEQUENCE, "labels": [5, 6]}, "row 3: labels has 2 entries, input_ids has 3"),
        (sft_group, {**SEQUENCE, "labels": [5, 7, 0]}, r"row 3: labels\[1\] = 7 and input_ids\[1\] = 6"),
        (sft_group, {**SEQUENCE, "labels": "x"}, "row 3: labels = 'x': use a list as long as input_ids"),
        (sft_group, {**SEQUENCE, "completion_mask": [0, 1]}, "row 3: completion_mask has 2 entries"),
        (sft_group, {**SEQUENCE, "completion_mask": [0, 1, 2]}, r"row 3: completion_mask\[2\] = 2: use 1"),
        (sft_group, {**SEQUENCE, "assistant_masks": [0, 1]}, "row 3: assistant_masks has 2 entries"),
        (sft_group, {**SEQUENCE, "attention_mask": [1, 1, 0]}, "row 3: attention_mask hides tokens"),
        (sft_group, {**SEQUENCE, "seq_lengths": [1, 2]}, "row 3 has seq_lengths"),
        (sft_group, {**SEQUENCE, "position_ids": [0, 0, 1]}, "row 3 has position_ids"),
    ],
)
def test_malformed_rows(encoder: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        encoder(row, TOKENIZER, index=3)


@pytest.mark.parametrize("option", ["completion_only_loss", "assistant_only_loss"])
def test_a_loss_option_needs_its_mask(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} = True, but row 0 has input_ids without"):
        sft_group(SEQUENCE, TOKENIZER, **{option: True})


ENCODERS = {
    "SFT": sft_group,
    "DPO and other pairs": preference_group,
    "KTO": unpaired_group,
    "Reward models": reward_group,
    "GRPO, RLOO, PPO, online DPO": prompt_group,
}


def documented() -> list[tuple[str, str]]:
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return [
        (title, line)
        for title, body in sections
        for block in re.findall(r"```json\n(.*?)```", body, re.DOTALL)
        for line in block.splitlines()
    ]


def test_documented_rows_cover_every_stage() -> None:
    assert {title for title, _ in documented()} == ENCODERS.keys()


@pytest.mark.parametrize(("stage", "line"), documented())
def test_a_documented_row_is_accepted(stage: str, line: str) -> None:
    group = ENCODERS[stage](json.loads(line), TOKENIZER)
    assert group.prompt_ids or group.completions
    assert all(completion.num_scored_tokens for completion in group.completions)
