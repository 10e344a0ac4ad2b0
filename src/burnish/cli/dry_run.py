"""`--dry-run`: what a run would learn from, in its own tokens, before any weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from burnish.data import (
    EncodeStats,
    encode_rows,
    errors_of,
    preference_group,
    prompt_group,
    reward_group,
    sft_groups,
    unpair,
    unpaired_group,
)
from burnish.data.tokens import decode_text
from burnish.errors import DataError
from burnish.rewards import Rubric, check_gold
from burnish.rewards.answers import extract_answer, render_answer
from burnish.rewards.verifiers import AnswerVerifier
from burnish.training.checkpoint import start
from burnish.training.checks import resolve_tokenizer
from burnish.training.run_length import describe_run_length
from burnish.types import Completion, Group

__all__ = ["dry_run", "encoded"]

_NUM_SHOWN = 3
_LONGEST = 4000
"""Characters of one sequence that are shown."""

_ENCODERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "sft": (sft_groups, ("max_length", "truncation_mode", "completion_only_loss", "assistant_only_loss")),
    "reward": (reward_group, ("step_separator",)),
    "dpo": (preference_group, ("max_length",)),
    "kto": (unpaired_group, ("max_length",)),
}
"""Stage -> its encoder and the fields that the encoder reads; the others sample from prompts."""

_LABELS = {"dpo": ("chosen", "rejected"), "reward": ("best", "worse"), "kto": ("completion",), "sft": ("",)}


def dry_run(
    kind: str,
    config: Any,
    model: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    rubric: Rubric | None = None,
    eval_rows: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Print rows as they are trained on, what the rubric reads, lengths, steps and files; write nothing.

    Args:
        kind: the stage.
        config: of its trainer.
        model: whose tokenizer is loaded, and nothing else.
        rows: to train on.
        rubric: the reward of an online stage.
        eval_rows: held out.

    Raises:
        ConfigError, DataError, ModelError: as training would.
    """
    console = Console(soft_wrap=True, highlight=False, markup=False)
    start(config, config.resume_from_checkpoint, model=model, check_only=True)
    tokenizer = resolve_tokenizer(model, None, config)
    stats = EncodeStats()
    groups = encoded(kind, config, tokenizer, rows, "train_dataset", stats)
    if rubric is not None:
        with errors_of("train_dataset"):
            rubric.check_columns(groups)
    for group in groups[:_NUM_SHOWN]:
        _show_group(console, kind, group, tokenizer)
        if rubric is not None:
            _show_answers(console, group.row, rubric)
    if rubric is not None and (failures := check_gold(rubric, [group.row for group in groups])):
        first = failures[0]
        console.print(
            f"gold answers: {len(failures)} of {len(groups)} are not accepted, first row {first.index} by "
            f"{first.criterion}: {first.reason}"
        )
    lengths = [
        len(group.prompt_ids) + max((len(c.token_ids) for c in group.completions), default=0) for group in groups
    ]
    left_out = stats.num_skipped_rows + stats.num_dropped_rows
    console.print(
        f"rows: {stats.num_rows} read, {len(groups)} to train on, {left_out} left out, {stats.num_cut_rows} truncated"
    )
    what = "a sequence" if kind in _ENCODERS else "a prompt"
    console.print(
        f"lengths: {min(lengths)} to {max(lengths)} tokens {what}, {sum(lengths) / len(lengths):.0f} on average"
    )
    if eval_rows is not None:
        held_out = encoded(kind, config, tokenizer, eval_rows, "eval_dataset", EncodeStats())
        console.print(f"held out: {len(held_out)} rows")
    console.print(f"plan: {describe_run_length(config, first_step=0, max_steps=_num_steps(kind, config, len(groups)))}")
    console.print(f"writes: {'; '.join(_files(config))}")
    console.print("dry run: no weights were loaded, nothing was written")


def encoded(
    kind: str, config: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]], name: str, stats: EncodeStats
) -> list[Group]:
    """Groups of rows as the stage's trainer makes them."""
    encoder, names = _ENCODERS.get(kind, (prompt_group, ("max_prompt_length", "chat_template_kwargs")))
    options = {name: getattr(config, name) for name in names}
    if kind == "sft" and config.dataset_text_field != "text":
        rows = [{**row, "text": row.get(config.dataset_text_field)} for row in rows]
    elif kind == "kto":
        rows = [one for row in rows for one in (unpair(row) if {"prompt", "chosen", "rejected"} <= set(row) else [row])]
    elif kind == "reward":
        options["pad_token_id"] = tokenizer.pad_token_id
    groups = encode_rows(encoder, rows, tokenizer, stats=stats, name=name, **options)
    if kind == "reward" and config.max_length is not None:
        kept = [
            g for g in groups if all(len(g.prompt_ids) + len(c.token_ids) <= config.max_length for c in g.completions)
        ]
        stats.num_dropped_rows += len(groups) - len(kept)
        groups = kept
    if not groups:
        raise DataError(f"{name}: every row is longer than max_length = {config.max_length}; raise it.")
    return groups


def _show_group(console: Console, kind: str, group: Group, tokenizer: Any) -> None:
    """A row's sequences; what the loss is computed on is green in a terminal and in brackets elsewhere."""
    completions = group.completions or [Completion([])]
    for position, completion in enumerate(completions):
        scored = completion.loss_mask if completion.loss_mask is not None else [True] * len(completion.token_ids)
        labels = _LABELS.get(kind, ("prompt",))
        label = labels[min(position, len(labels) - 1)]
        kept = "read" if kind == "reward" else "in the loss"
        counts = f", {sum(scored)} {kept}" if completion.token_ids else ""
        console.print(
            f"row {group.index}{f', {label}' if label else ''}: {len(group.prompt_ids) + len(scored)} tokens{counts}"
        )
        text = _marked([*group.prompt_ids, *completion.token_ids], [False] * len(group.prompt_ids) + scored, tokenizer,
                       brackets=not console.is_terminal)  # fmt: skip
        console.print(text)
        console.print()


def _marked(ids: Sequence[int], scored: Sequence[bool], tokenizer: Any, *, brackets: bool) -> Text:
    """The text of tokens, with those that are scored marked."""
    text, done, end = Text(), 0, 0
    for is_scored, run in groupby(scored):
        end += len(list(run))
        whole = decode_text(tokenizer, ids[:end])
        piece, done = whole[done:], len(whole)
        text.append(f"[{piece}]" if is_scored and brackets else piece, style="bold green" if is_scored else "")
    if len(text) > _LONGEST:
        cut = len(text) - _LONGEST
        text.truncate(_LONGEST)
        text.append(f" ... ({cut} more characters)")
    return text


def _show_answers(console: Console, row: Mapping[str, Any], rubric: Rubric) -> None:
    """What each verifier reads from the row's own answer, written as a completion would write it."""
    for criterion in rubric.criteria:
        verifier = criterion.function
        if not isinstance(verifier, AnswerVerifier) or row.get(verifier.gold_column) is None:
            continue
        for answer in verifier.gold(dict(row)):
            text = render_answer(answer, tag=verifier.tag, sources=verifier.sources)
            read = extract_answer(text, tag=verifier.tag, sources=verifier.sources)
            console.print(f"{criterion.name}: from {text!r} the rubric reads {read!r} (gold answer {answer!r})")
    console.print()


def _num_steps(kind: str, config: Any, num_groups: int) -> int:
    """Optimizer steps as transformers counts them; online stages count completions."""
    if config.max_steps > 0:
        return config.max_steps
    batch = config.per_device_train_batch_size * config.world_size
    if kind in _ENCODERS:
        batches = math.ceil(num_groups / batch)
    else:
        batches = num_groups * config.num_generations * getattr(config, "num_iterations", 1) // batch
    return math.ceil(config.num_train_epochs * max(math.ceil(batches / config.gradient_accumulation_steps), 1))


def _files(config: Any) -> list[str]:
    strategy = str(getattr(config.save_strategy, "value", config.save_strategy))
    every = {"steps": f"every {config.save_steps:g} steps", "epoch": "every epoch", "best": "of the best evaluation"}
    folders = {"metrics.jsonl": config.log_metrics, "transcripts.jsonl": getattr(config, "log_completions", False)}
    return [
        f"the model and its tokenizer in {config.output_dir}",
        *([f"checkpoint-STEP in it {every[strategy]}"] if strategy in every else []),
        *(f"{name} in {config.output_dir if where is True else where}" for name, where in folders.items() if where),
    ]
