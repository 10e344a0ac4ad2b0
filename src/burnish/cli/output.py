"""Set up the output of a command: burnish's own lines, without library noise that a user cannot act on.

Only commands do this; `import burnish` changes neither warnings nor loggers.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from burnish.progress import say

__all__ = ["set_up_output"]

_BITSANDBYTES = "bitsandbytes.backends.cpu.ops"


def set_up_output(words: Sequence[str] = ()) -> None:
    """Send burnish's log records through `say`, and silence known warnings of other packages.

    Args:
        words: the command line. Messages about quantised weights are kept if a word, or a run file that a word names,
            asks for quantisation.
    """
    logging.getLogger("burnish").addHandler(_SayHandler())
    # Accepted fields that change nothing; settings that memory_budget chooses, and the memory that a run took.
    for name in ("config", "training.memory_plan"):
        logging.getLogger(f"burnish.{name}").setLevel(logging.INFO)
    # Filters are appended, so PYTHONWARNINGS and -W take precedence.
    # SyntaxWarnings appear when a package is first compiled; the user cannot fix its source.
    warnings.filterwarnings("ignore", category=SyntaxWarning, module=r".*[/\\]site-packages[/\\]", append=True)
    renamed = r"`\w+` is deprecated and will be removed in v6"
    warnings.filterwarnings("ignore", renamed, FutureWarning, module=r"transformers\.", append=True)
    # Progress bars of single files would break up the run's own output.
    for library in ("HF_DATASETS", "HF_HUB"):
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    if not any("quantization_config" in text for text in (*words, *map(_text_of, words))):
        logging.getLogger(_BITSANDBYTES).addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))


class _SayHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        say(f"{level}{record.getMessage()}")


def _text_of(word: str) -> str:
    """Read the run file that a command-line word names; empty for any other word."""
    path = Path(word)
    try:
        return path.read_text(encoding="utf-8") if path.suffix in (".toml", ".yaml", ".yml") else ""
    except (OSError, ValueError):
        return ""
