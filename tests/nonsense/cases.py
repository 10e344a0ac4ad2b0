"""One bad input, and the judge of what comes of it."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.cli.main import main
from burnish.errors import BurnishError

SECONDS = 20.0
"""A hang, where nothing but a tiny model is loaded."""

LONGEST_MESSAGE = 3000


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        family: what is wrong with it, in a word or two.
        name: which member of the family.
        run: gives it to burnish; the working directory is empty and its own.
        refused: True where it must be refused, False where it is good after all, None where either may be.
        names: what the error must mention: the field, file or row.
    """

    family: str
    name: str
    run: Callable[[], object]
    refused: bool | None = True
    names: str = ""


class _Hang(BaseException):
    pass


@dataclass(frozen=True)
class Verdict:
    """`refused` or `accepted`; else `problem` says what is wrong with the answer."""

    outcome: str
    problem: str | None = None


def judge(case: Case, folder: Path) -> Verdict:
    """Run a case in an empty folder."""
    try:
        with _inside(folder), _limited(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("error")
            # peft asks for it; transformers renamed it.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            case.run()
    except _Hang:
        return Verdict("hang", f"no answer after {SECONDS:g} s")
    except BurnishError as error:
        return _read(case, str(error))
    except SystemExit as error:
        return Verdict("refused") if error.code == 2 else Verdict("exit", f"exit status {error.code}")
    except Exception as error:
        return Verdict("traceback", f"{type(error).__name__}: {error!s:.300}")
    return Verdict("accepted", "wrongly accepted" if case.refused else None)


def _read(case: Case, message: str) -> Verdict:
    if case.refused is False:
        return Verdict("refused", f"wrongly refused: {message}")
    if len(message) > LONGEST_MESSAGE:
        return Verdict("refused", f"a message of {len(message)} characters")
    if case.names not in message:
        return Verdict("refused", f"{case.names!r} is not in the message: {message}")
    return Verdict("refused")


def command(*words: str) -> None:
    """Run the command line.

    Raises:
        BurnishError: what it said, when it ended with status 2.
    """
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = main(list(words))
    if status == 2:
        raise BurnishError(said.getvalue())
    if status:
        raise AssertionError(f"exit status {status}")


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def end(*_: Any) -> None:
        raise _Hang

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
