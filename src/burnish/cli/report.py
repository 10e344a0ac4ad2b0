"""`burnish report RUN_DIR`: write the HTML report of a run."""

from __future__ import annotations

import argparse

from burnish.report import write_report

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Write the report and print its path."""
    print(write_report(args.run_dir, args.output, max_transcripts=args.max_transcripts))
