"""`burnish rewards check FILE`: what a rubric says of gold answers, of cheap tricks, or of a run's transcripts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from burnish.cli.config import load_pipeline_file, load_run_file
from burnish.cli.plan import is_pipeline, stage_of
from burnish.config.files import read_file
from burnish.data import load_rows
from burnish.data.instructions import instruction_row
from burnish.errors import ConfigError, DataError
from burnish.rewards.check import RubricCheck, check_rubric, check_samples
from burnish.rewards.rubric import Rubric
from burnish.runs.files import write_json
from burnish.types import Completion

__all__ = ["draw_check", "read_transcripts", "run"]


def run(args: argparse.Namespace) -> None:
    """Score, print a table and findings, and write what is asked for."""
    if args.rows < 1:
        raise ConfigError(f"--rows = {args.rows}: use a number of at least 1.")
    rubric, rows = _rubric_and_rows(args.file, args.overrides)
    if args.transcripts is None:
        check = check_rubric(rubric, rows[: args.rows])
    else:
        check = check_samples(rubric, read_transcripts(args.transcripts, rows)[: args.rows])
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"{check.num_prompts} prompts, {len(check.criteria)} criteria")
    console.print(_table(check))
    for line in check.findings:
        console.print(f"- {line}")
    if not check.findings:
        console.print("no findings")
    if args.json is not None:
        write_json(args.json, check.as_dict())
    if args.svg is not None:
        draw_check(check, args.svg)


def _rubric_and_rows(path: Path, overrides: Sequence[str]) -> tuple[Rubric, Sequence[Mapping[str, Any]]]:
    """Read the rubric of a run file, and its training rows, or those of its evaluation where it has no others."""
    if is_pipeline(path):
        file: Any = load_pipeline_file(path, overrides)
    else:
        trains = "training" in read_file(path)
        file = load_run_file(path, overrides, stage_of(str(path), overrides) if trains else "eval")
    if file.rubric is None:
        raise ConfigError(f"{path}: there is no [[rubric]] to check; add one.")
    source, name = (file.data.eval, "data.eval") if file.data.train is None else (file.data.train, "data.train")
    rows: Any = load_rows(source, name)
    # Instructions and their answers become prompts, as they do in training.
    return file.rubric, [instruction_row(rows[i], i, as_messages=False) for i in range(len(rows))]


def read_transcripts(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], list[Completion]]]:
    """Read the completions of a run, grouped as they were sampled, each group with its row.

    Args:
        path: `transcripts.jsonl` of a run on these rows.
        rows: all rows that the run trained on.

    Raises:
        ConfigError: there is no such file.
        DataError: a line that is not a transcript, or a prompt that is not one of the rows.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        fix = "name the transcripts.jsonl of a run with log_completions = true"
        raise ConfigError(f"--transcripts = {str(path)!r}: {error.strerror}; {fix}.") from error
    groups: dict[tuple[int, int], list[Completion]] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            key = int(record["step"]), int(record["prompt_index"])
            completion = Completion([0] * int(record["num_tokens"]), text=str(record["completion"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}, line {number} is not a transcript ({error!r}): name the file of a run."
            ) from error
        if not 0 <= key[1] < len(rows):
            raise DataError(
                f"{path}, line {number}: prompt_index = {key[1]}, but there are {len(rows)} rows: name the run file of "
                "the same run."
            )
        groups.setdefault(key, []).append(completion)
    return [(rows[index], completions) for (_, index), completions in groups.items()]


def _table(check: RubricCheck) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("mean value on")
    for one in check.criteria:
        table.add_column(one.name, justify="right")
    table.add_column("total", justify="right", style="bold")
    for kind, total in check.totals.items():
        table.add_row(kind, *(_shown(one.values.get(kind)) for one in check.criteria), _shown(total))
    table.add_section()
    table.add_row("failed", *(f"{one.failed:.1%}" for one in check.criteria), "")
    table.add_row("prompts without a difference", *(f"{one.ties:.0%}" for one in check.criteria), f"{check.ties:.0%}")
    table.add_row("ms a completion", *(f"{one.milliseconds:.2g}" for one in check.criteria), "")
    return table


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def draw_check(check: RubricCheck, path: Path) -> None:
    """Draw the mean value of each criterion on each kind of text as a grid, each line coloured by its own range.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--svg needs the package matplotlib: pip install 'burnish[plot]'.") from error
    kinds = list(check.totals)
    lines = [(one.name, [one.values.get(kind) for kind in kinds]) for one in check.criteria]
    lines.append(("total", [check.totals[kind] for kind in kinds]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "burnish", "font.size": 9}):
        figure = Figure(figsize=(1.4 * len(kinds) + 2.5, 0.4 * len(lines) + 1.5), layout="constrained")
        axes: Any = figure.add_subplot()
        axes.imshow([_shades(values) for _, values in lines], cmap="YlGnBu", aspect="auto", vmin=0, vmax=1.4)
        axes.set_xticks(range(len(kinds)), kinds)
        axes.set_yticks(range(len(lines)), [name for name, _ in lines])
        for y, (_, values) in enumerate(lines):
            for x, value in enumerate(values):
                axes.text(x, y, _shown(value), ha="center", va="center")
        axes.xaxis.tick_top()
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        figure.savefig(path, format=path.suffix.removeprefix(".") or "svg", metadata={"Date": None})


def _shades(values: Sequence[float | None]) -> list[float]:
    present = [value for value in values if value is not None]
    low, high = min(present, default=0.0), max(present, default=0.0)
    return [0.0 if value is None or high == low else (value - low) / (high - low) for value in values]
