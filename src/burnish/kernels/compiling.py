"""Compile this package's C++ files on the machine that runs them.

A file takes a few seconds, is compiled for this very processor, and its library is kept in the user's cache.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from functools import partial
from pathlib import Path

__all__ = ["compiled"]

_logger = logging.getLogger(__name__)

_FLAGS = (
    "-O3", "-march=native", "-fopenmp", "-fPIC",
    # What lets sums be vectorised; -ffast-math itself would change how the whole process rounds tiny numbers.
    "-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros",
)  # fmt: skip
_X86_FLAGS = ("-mprefer-vector-width=512",)
_COMPILING_SECONDS = 120
_SOURCES = Path(__file__).parent


def compiled(name: str, user: str) -> ctypes.CDLL | None:
    """Load `name`.cpp, compiled where the cache has no library of it; None, with a warning, where that is impossible.

    Args:
        name: of the file.
        user: what uses torch's kernels then, for the warning, such as "Rollouts".
    """
    if platform.system() != "Linux":
        return None
    try:
        return ctypes.CDLL(str(_library(name)))
    # A missing compiler, one that fails, no home or one that cannot be written, a library of other OpenMP functions.
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        _logger.warning("%s use torch's kernels: %s. A C++ compiler (g++ or clang) makes them faster.", user, error)
        return None


def _library(name: str) -> Path:
    """Return the library for this processor, compiler and source."""
    source = _SOURCES / f"{name}.cpp"
    compiler = os.environ.get("CXX", "c++")
    flags = _FLAGS + (_X86_FLAGS if platform.machine() == "x86_64" else ())
    run = partial(subprocess.run, capture_output=True, check=True, timeout=_COMPILING_SECONDS)
    version = run([compiler, "--version"]).stdout
    # What tells this processor's instructions from another's: a home may be shared by several machines.
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    processor = b"\n".join(sorted({line for line in lines if line.startswith((b"model name", b"flags", b"Features"))}))
    texts = [file.read_bytes() for file in (source, *sorted(_SOURCES.glob("*.h")))]
    parts = [*texts, version, " ".join(flags).encode(), processor]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "burnish" / "kernels"
    library = home / f"{name}-{key}.so"
    if library.exists():
        return library
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as folder:
        made, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        # Linked without an OpenMP library of its own: its functions are found in the one that torch has loaded, whose
        # threads wait already. A second one would start more of them.
        for command in ([*flags, "-c", str(source), "-o", str(made)], ["-shared", str(made), "-o", str(linked)]):
            run([compiler, *command])
        linked.replace(library)  # whole or not at all, whoever else compiles
    return library
