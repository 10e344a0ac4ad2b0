"""`burnish pairs FILE`: preference pairs and best-of-n demonstrations from samples of a model, graded by a rubric."""

from __future__ import annotations

import argparse

from burnish.cli.config import load_run_file
from burnish.data import disjoint, load_rows
from burnish.progress import say
from burnish.runs.processes import refuse_ranks

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Check the run file, sample the remaining prompts and write the rows."""
    refuse_ranks("pairs")
    file = load_run_file(args.file, args.overrides, "pairs")
    assert file.data.train is not None and file.rubric is not None and file.pairs is not None
    rows = load_rows(file.data.train, "data.train")
    if file.data.eval is not None:
        rows, counts = disjoint(rows, load_rows(file.data.eval, "data.eval"))
        say(f"pairs: {len(rows)} prompts; {counts.num_in_evaluation} left out because they are held out")
    from burnish.cli.stages import make_pairs

    counts = make_pairs(file.model, rows, file.rubric, file.pairs, model_init=file.model_init)
    for name, count in counts.items():
        print(f"{count} rows in {name}")
