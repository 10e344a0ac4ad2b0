"""Quiet output for scripts."""

from __future__ import annotations

import logging
import warnings

from rich.logging import RichHandler

__all__ = ["init_zero_verbose"]


def init_zero_verbose() -> None:
    """Show errors only, in colour: call it first in a script whose own output should stand alone.

    Changes the root logger and the filters of `warnings` for the whole process; a logger that has its own level keeps
    it.
    """
    logging.basicConfig(format="%(message)s", datefmt="[%X]", handlers=[RichHandler()], level=logging.ERROR, force=True)
    warnings.simplefilter("ignore")
