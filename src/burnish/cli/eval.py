"""`burnish eval FILE`: pass@k of a model on held-out prompts."""

from __future__ import annotations

import argparse
import json

from burnish.cli.config import load_run_file
from burnish.data import load_rows

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Check the file, sample, score, print the result as JSON."""
    file = load_run_file(args.file, args.overrides, "eval")
    assert file.data.eval is not None and file.rubric is not None and file.evaluation is not None
    rows = load_rows(file.data.eval, "data.eval")
    from burnish.cli.stages import evaluate_model

    result = evaluate_model(file.model, rows, file.rubric, file.evaluation, name=file.model, model_init=file.model_init)
    print(json.dumps(result.summary(), indent=1))
