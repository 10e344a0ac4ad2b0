"""What a command prints: burnish's own lines, without the remarks of libraries that a user can do nothing about.

Only the process of a command is set up so; `import burnish` changes neither warnings nor loggers.
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
    """Send burnish's remarks through `say`, and silence known remarks of other packages.

    Args:
        words: of the command line: what is said of quantised weights stays where they, or a file they name, ask for
            some.
    """
    logging.getLogger("burnish").addHandler(_Remarks())
    logging.getLogger("burnish.config").setLevel(logging.INFO)  # fields that are accepted and change nothing
    # Appended, so that PYTHONWARNINGS and -W go first.
    # Packages are compiled on first import; their source is not the user's to mend.
    warnings.filterwarnings("ignore", category=SyntaxWarning, module=r".*[/\\]site-packages[/\\]", append=True)
    renamed = r"`\w+` is deprecated and will be removed in v6"
    warnings.filterwarnings("ignore", renamed, FutureWarning, module=r"transformers\.", append=True)
    # Bars for single files would break through the lines of the run.
    for library in ("HF_DATASETS", "HF_HUB"):
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    if not any("quantization_config" in text for text in (*words, *map(_text_of, words))):
        logging.getLogger(_BITSANDBYTES).addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))


class _Remarks(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        say(f"{level}{record.getMessage()}")


def _text_of(word: str) -> str:
    path = Path(word)
    try:
        return path.read_text(encoding="utf-8") if path.suffix in (".toml", ".yaml", ".yml") else ""
    except (OSError, ValueError):
        return ""
