"""`--dry-run`: the rows of a run as the model would see them, without loading weights or writing files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

import burnish
from burnish.config.stages import STAGES
from burnish.data import EncodeStats
from burnish.data.tokens import decode_text
from burnish.rewards import Rubric, check_gold
from burnish.rewards.answers import render_answer
from burnish.rewards.verifiers import AnswerVerifier
from burnish.stages.agents import Agents
from burnish.stages.algorithm import Algorithm
from burnish.stages.online import OnlineStage
from burnish.training.checkpoint import start
from burnish.training.checks import resolve_tokenizer
from burnish.training.run_length import describe_run_length
from burnish.training.stage import Stage
from burnish.types import Completion, Group

__all__ = ["dry_run", "make_stage"]

_NUM_SHOWN = 3
_LONGEST = 4000
"""Maximum number of characters shown of one sequence."""

_LABELS = {"dpo": ("chosen", "rejected"), "reward": ("best", "worse"), "kto": ("completion",)}


def dry_run(
    kind: str,
    config: Any,
    model: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    rubric: Rubric | None = None,
    environment: Any = None,
    eval_rows: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Print sample rows with their masks, parsed gold answers, sequence lengths, steps and output files.

    Args:
        kind: stage name.
        config: config of the stage's trainer.
        model: model whose tokenizer is loaded.
        rows: training rows.
        rubric: reward of an online stage.
        environment: `environment_factory` of an online stage.
        eval_rows: held-out rows.

    Raises:
        ConfigError, DataError, ModelError: where training would raise them.
    """
    console = Console(soft_wrap=True, highlight=False, markup=False)
    start(config, config.resume_from_checkpoint, model=model, check_only=True)
    tokenizer = resolve_tokenizer(model, None, config)
    stats, stage = EncodeStats(), make_stage(kind, config, tokenizer, rubric, model=model, environment=environment)
    if isinstance(stage, OnlineStage) and stage.environments is not None:
        _show_environments(console, stage)
    groups = stage.encode(rows, "train_dataset", stats)
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
    what = "a prompt" if STAGES[kind].online else "a sequence"
    console.print(
        f"lengths: {min(lengths)} to {max(lengths)} tokens {what}, {sum(lengths) / len(lengths):.0f} on average"
    )
    if eval_rows is not None:
        console.print(f"held out: {len(stage.encode(eval_rows, 'eval_dataset'))} rows")
    console.print(f"plan: {describe_run_length(config, first_step=0, max_steps=_num_steps(kind, config, len(groups)))}")
    console.print(f"writes: {'; '.join(_files(config))}")
    console.print("dry run: no weights were loaded, nothing was written")


def make_stage(
    kind: str,
    config: Any,
    tokenizer: Any,
    rubric: Rubric | None = None,
    *,
    model: str | None = None,
    environment: Any = None,
) -> Stage:
    """Create the stage of a trainer to encode rows with; no weights are loaded."""
    if STAGES[kind].online:
        return OnlineStage(
            config, tokenizer, Algorithm(config), rubric, agents=Agents(model, environment_factory=environment)
        )
    return getattr(burnish, f"{STAGES[kind].name}Trainer").stage_class(config, tokenizer)


def _show_environments(console: Console, stage: OnlineStage) -> None:
    """Print the environments of episodes, their tools and rewards, and what is proven of the chat template."""
    environments = stage.environments
    assert environments is not None
    for name, schemas in environments.schemas.items():
        tools = [schema["function"] for schema in schemas]
        signatures = [f"{tool['name']}({', '.join(tool['parameters'].get('properties', {}))})" for tool in tools]
        shown = f"environment {name!r}" if name is not None else "environment"
        console.print(f"{shown}: {environments.names[name]}; tools: {', '.join(signatures) or 'none'}")
    console.print(f"criteria: {', '.join(stage.rubric.names)}")
    certificate = environments.certificate
    same = "as the template renders them" if certificate.extends else "kept as sampled, unlike the template's rendering"
    kept = "kept" if certificate.keeps_reasoning else "kept here, but dropped by the template in earlier turns"
    console.print(
        f"chat template: turns end with {certificate.stop!r}, and can be extended token for token; earlier turns are "
        f"{same}; tools answer as {certificate.answer_role!r}; reasoning is {kept}"
    )
    console.print()


def _show_group(console: Console, kind: str, group: Group, tokenizer: Any) -> None:
    """Print the sequences of a row, scored tokens in green in a terminal and in brackets elsewhere."""
    completions = group.completions or [Completion([])]
    for position, completion in enumerate(completions):
        scored = completion.loss_mask if completion.loss_mask is not None else [True] * len(completion.token_ids)
        labels = _LABELS.get(kind, ("prompt",) if STAGES[kind].online else ("",))
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
    """Decode tokens and mark the scored ones."""
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
    """Print the answer that each verifier extracts from a completion that gives the row's gold answer."""
    for criterion in rubric.criteria:
        verifier = criterion.function
        if not isinstance(verifier, AnswerVerifier) or row.get(verifier.gold_column) is None:
            continue
        for answer in verifier.gold(dict(row)):
            text = render_answer(answer, tag=verifier.tag, sources=verifier.sources)
            read = verifier.extract(text)
            console.print(f"{criterion.name}: from {text!r} the rubric reads {read!r} (gold answer {answer!r})")
    console.print()


def _num_steps(kind: str, config: Any, num_groups: int) -> int:
    """Count optimizer steps as transformers does; batches of online stages hold completions."""
    if config.max_steps > 0:
        return config.max_steps
    batch = config.per_device_train_batch_size * config.world_size
    batches = math.ceil(num_groups / batch)
    if STAGES[kind].online:
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
