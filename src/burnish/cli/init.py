"""`burnish init DATA`: a commented run file for a data set, inferred from its rows."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from burnish.config.paths import file_problem
from burnish.config.tips import as_toml
from burnish.data import detect_format, load_rows, reward_kind
from burnish.data.columns import meant_columns
from burnish.data.instructions import instruction_columns
from burnish.errors import ConfigError, DataError
from burnish.rewards import check_gold, rubric_from_config
from burnish.runs.files import replacing

__all__ = ["run", "run_file"]

Row = Mapping[str, Any]

_FAMILIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("dpo", ("chosen", "rejected")),
    ("reward", ("prompt", "completions")),
    ("kto", ("prompt", "completion", "label")),
    ("sft", ("messages",)),
    ("sft", ("conversations",)),
    ("sft", ("prompt", "completion")),
    ("grpo", ("prompt", "answer")),
    ("sft", ("text",)),
)
"""Stage -> columns of its rows, most specific first."""

_RUBRICS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("a completion is right if its last number, or that in <answer> tags, equals the answer",
     {"kind": "numeric", "sources": ["tag", "last_number"]}),
    ("a completion is right if all of it, or the text in <answer> tags, equals the answer",
     {"kind": "exact", "sources": ["tag", "text"], "ignore_case": True}),
)  # fmt: skip
"""Description and criterion of a right completion; the first that accepts the gold answers of the data is used."""

_LONGEST_ANSWER = 60
"""Maximum number of characters of an answer that can be graded verbatim."""

_TEMPLATE = """\
# For {{ path|line }}: {{ num_rows }} rows with {{ found|line }}.
# Written by `burnish init`; every line is yours to change.
# Look first: `burnish {{ command }} {{ target|line }} --dry-run`. Train: `burnish {{ command }} {{ target|line }}`.
{% if command == "pipeline" %}
# It measures the model, fine-tunes, measures, reinforces, measures, and writes a report.
{% endif %}
model = {{ model|toml }}  # a folder, a name on the hub, a .gguf file, or a package that carries one

[data]
train = {{ source|toml }}
{% if command == "pipeline" %}
eval = {{ held_out|toml }}  # held out: its first rows, which are not trained on
{% endif %}

{% if rubric %}
[[rubric]]  # {{ meaning }}
{% for name, value in rubric.items() %}
{{ name }} = {{ value|toml }}
{% endfor %}

{% endif %}
{% if stage != "grpo" %}
[{{ "sft" if command == "pipeline" else "training" }}]  # `burnish {{ stage }} --help` lists every field
{% if command != "pipeline" %}
output_dir = {{ folder|toml }}
{% endif %}
num_train_epochs = 3  # how often every row is seen; `max_steps = 100` would count optimizer steps instead
per_device_train_batch_size = 8  # rows of an optimizer step
learning_rate = {{ {"sft": "2e-5", "reward": "1e-5"}.get(stage, "4e-6") }}
logging_steps = 1
{% if chat %}
assistant_only_loss = true  # learn the answers, not the questions
{% endif %}
{% endif %}
{% if rubric %}

[{{ "grpo" if command == "pipeline" else "training" }}]  # `burnish grpo --help` lists every field
{% if command != "pipeline" %}
output_dir = {{ folder|toml }}
{% endif %}
max_steps = 100
per_device_train_batch_size = 32  # completions of an optimizer step: 4 prompts, each sampled 8 times
num_generations = 8
max_completion_length = 64  # tokens; longer answers and reasoning need more
learning_rate = 4e-6
logging_steps = 1
{% endif %}
{% if command == "pipeline" %}

[evaluation]  # pass@k on data.eval
num_samples = 4
ks = [1, 4]
max_completion_length = 64
{% endif %}
"""


def run(args: argparse.Namespace) -> None:
    """Read the rows, choose a stage and write the run file; existing files are kept."""
    stem = Path(args.data).stem
    target: Path = args.output or Path(stem if re.fullmatch(r"[\w.-]+", stem) else "run").with_suffix(".toml")
    problem = "that file is there; give another name, or remove it" if target.exists() else file_problem(str(target))
    if problem is not None:
        raise ConfigError(f"--output = {str(target)!r}: {problem}.")
    options = {name: value for name in ("name", "split") if (value := getattr(args, name)) is not None}
    command, text = run_file({"path": args.data, **options}, args.model, target)
    with replacing(target) as stream:
        stream.write(text)
    print(f"wrote {target}. Look first: burnish {command} {target} --dry-run")


def run_file(source: dict[str, Any], model: str, target: str | Path) -> tuple[str, str]:
    """Choose the command for a data set and render its run file.

    Args:
        source: source table of `load_rows`.
        model: model to train.
        target: path of the run file.

    Returns:
        The command and the text.

    Raises:
        ConfigError, DataError: the source cannot be read, or no stage fits its rows.
    """
    rows = load_rows(source, "DATA")
    stage, columns = _stage(rows[0])
    meaning, rubric, graded = _graded(rows, columns)
    if rubric is not None:
        columns = graded
    elif stage == "grpo":  # no criterion can grade these answers, so SFT learns from them
        stage, columns = "sft", {**columns, "answer": "completion"}
    source = {**source, "columns": columns} if columns else source
    row = load_rows(source, "DATA")[0] if columns else rows[0]
    if rubric is not None and not instruction_columns(row):
        stage = "grpo"  # numbers and chats can be graded, but are not text for SFT
    command = "pipeline" if rubric and stage == "sft" else stage
    if stage == "reward":
        reward_kind(row)
    elif not instruction_columns(row):
        detect_format(row, stage={"dpo": "preference", "grpo": "prompt", "kto": "unpaired"}.get(stage, stage))
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    environment.filters |= {"line": lambda text: " ".join(str(text).split()), "toml": as_toml}
    return command, environment.from_string(_TEMPLATE).render(
        command=command,
        stage=stage,
        path=source["path"],
        num_rows=len(rows),
        found=", ".join(map(str, rows[0])),
        target=target,
        model=model,
        source=source["path"] if len(source) == 1 else source,
        held_out={**source, "limit": max(1, min(200, len(rows) // 5))},
        meaning=meaning,
        rubric=rubric,
        folder=f"outputs/{Path(target).stem}",
        chat=stage == "sft" and isinstance(row.get("messages", row.get("conversations")), list),
    )


def _stage(row: Row) -> tuple[str, dict[str, str]]:
    """Choose the stage for a row, and the columns to rename for it."""
    if instruction_columns(row):
        return "sft", {}
    present = {name for name, value in row.items() if value is not None}
    for stage, family in _FAMILIES:
        if present.issuperset(family):
            return stage, {}
    families = [family for _, family in _FAMILIES]
    columns = meant_columns(row, families, also=("prompt",))
    read = {columns.get(name, name) for name in present}
    stage = next((stage for stage, family in _FAMILIES if read.issuperset(family)), None)
    if stage is None:
        raise DataError(
            f"DATA: row 0 has the columns {sorted(map(str, present))}, which no stage uses; name them "
            f"{' | '.join(' + '.join(family) for family in families)}, or question + answer (docs/data.md)."
        )
    return stage, columns


def _graded(rows: Sequence[Row], columns: Mapping[str, str]) -> tuple[str, dict[str, Any] | None, dict[str, str]]:
    """Choose a criterion that accepts the gold answers, with its description and the columns to rename; None if none.

    SFT uses a question and its answer as prompt and completion, and verifiers use the answer as gold answer.
    """
    named = {columns.get(name, name): name for name, value in rows[0].items() if value is not None}
    native = instruction_columns(rows[0])
    asked, answer = named.get("prompt"), native[-1] if native else named.get("completion", named.get("answer"))
    if answer is None or not (native or asked) or "label" in named:
        return "", None, {}
    answers = [row.get(answer) for row in rows]
    if any(not isinstance(value, str | int | float) or len(str(value)) > _LONGEST_ANSWER for value in answers):
        return "", None, {}
    for meaning, criterion in _RUBRICS:
        if not check_gold(rubric_from_config([criterion]), [{"answer": value} for value in answers]):
            found = {answer: "answer"}
            if asked is not None:
                texts = isinstance(rows[0][asked], str) and all(isinstance(value, str) for value in answers)
                found[asked] = "question" if texts else "prompt"
            return meaning, criterion, {old: new for old, new in found.items() if old != new}
    return "", None, {}
