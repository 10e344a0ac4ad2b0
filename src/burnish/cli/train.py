"""`burnish STAGE FILE`: train one stage."""

from __future__ import annotations

import argparse

from burnish.cli.config import load_run_file
from burnish.data import load_rows

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Check the run file, read the rows, train and save."""
    file = load_run_file(args.file, args.overrides, args.command)
    assert file.data.train is not None
    rows = load_rows(file.data.train, "data.train")
    eval_rows = load_rows(file.data.eval, "data.eval") if file.data.eval else None
    from burnish.cli.stages import train

    trainer = train(
        args.command,
        file.model,
        rows,
        file.training,
        rubric=file.rubric,
        environment=file.environment,
        eval_rows=eval_rows,
        model_init=file.model_init,
        peft=file.peft,
        only_look=args.dry_run,
    )
    if trainer is not None:
        print(f"saved to {trainer.args.output_dir}")
