"""`burnish eval FILE`: pass@k of a model on held-out prompts."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from burnish.cli.config import load_run_file
from burnish.config.paths import is_file, missing
from burnish.data import load_rows
from burnish.errors import ConfigError
from burnish.evaluation.evaluate import Evaluation, compare
from burnish.runs.files import read_json, write_json
from burnish.runs.processes import refuse_ranks

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Check the run file, sample and score completions, and print the result as JSON."""
    refuse_ranks("eval")
    file = load_run_file(args.file, args.overrides, "eval")
    assert file.data.eval is not None and file.rubric is not None and file.evaluation is not None
    rows = load_rows(file.data.eval, "data.eval")
    from burnish.cli.stages import evaluate_model

    section = file.evaluation
    before = None
    if section.compare_with is not None:
        if not is_file(section.compare_with):
            raise ConfigError(
                f"[evaluation] compare_with = {section.compare_with!r}: no such file; evaluation.output writes one "
                f"({missing(section.compare_with)})."
            )
        before = Evaluation.from_dict(read_json(Path(section.compare_with), {}))
    shared: dict[str, Any] = {"model_init": file.model_init, "environment": file.environment}
    result = evaluate_model(file.model, rows, file.rubric, section, name=file.model, **shared)
    if section.output is not None:
        write_json(Path(section.output), result.to_dict())
    summary = asdict(result.summary())
    if before is not None:
        gains = {f"pass@{k}": str(compare(before, result, f"pass@{k}")) for k in result.pass_at_k}
        summary["gain_paired"] = {"over": before.name, **gains}
    print(json.dumps(summary, indent=1))
