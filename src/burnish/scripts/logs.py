"""Quiet output for scripts."""

from __future__ import annotations

import logging
import warnings

from rich.logging import RichHandler

__all__ = ["init_zero_verbose"]


def init_zero_verbose() -> None:
    """Show errors only, in colour; call it first in a script to keep library output out of the script's own.

    Changes the root logger and the `warnings` filters of the whole process; loggers with an explicit level keep it.
    """
    logging.basicConfig(format="%(message)s", datefmt="[%X]", handlers=[RichHandler()], level=logging.ERROR, force=True)
    warnings.simplefilter("ignore")
