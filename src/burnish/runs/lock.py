"""One run per folder: a lock that the kernel releases when its process ends, however it ends."""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from burnish.errors import FileError
from burnish.runs.files import writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["LOCK", "is_locked", "locked"]

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""File of the lock, which a run that ends by itself removes."""

_held: dict[tuple[int, Path], int] = {}
"""How often this process entered a folder, keyed by process too: a fork inherits the table but not the lock."""


@contextmanager
def locked(folder: str | Path, field: str = "output_dir") -> Generator[None]:
    """Keep other processes from running in a folder; the process that holds it may enter it again.

    Args:
        folder: made where it is missing.
        field: what names it in the configuration, for the message.

    Raises:
        FileError: another process runs there, or the folder cannot be written.
    """
    key = (os.getpid(), Path(folder).resolve())
    if fcntl is None or key in _held:
        _held[key] = _held.get(key, 0) + 1
        stream = None
    else:
        stream = _acquire(Path(folder), field)
        _held[key] = 1
    try:
        yield
    finally:
        _held[key] -= 1
        if not _held[key]:
            del _held[key]
        if stream is not None:
            with suppress(OSError):
                (Path(folder) / LOCK).unlink()
            stream.close()


def is_locked(folder: str | Path) -> bool | None:
    """Return whether any process runs in a folder; None if that cannot be known."""
    # This process's locks first: closing any descriptor of the file would release them.
    if (os.getpid(), Path(folder).resolve()) in _held:
        return True
    if fcntl is None:
        return None
    try:
        stream = (Path(folder) / LOCK).open(encoding="utf-8")
    except OSError as error:
        return False if isinstance(error, FileNotFoundError) else None
    with stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return True if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return False


def _acquire(folder: Path, field: str) -> IO[str]:
    path = folder / LOCK
    while True:
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            stream = path.open("a+", encoding="utf-8")
        try:
            _lock(stream, path)
        except BlockingIOError:
            holder = _holder(stream)
            stream.close()
            raise FileError(
                f"{field} = {str(folder)!r}: {holder} writes there; two runs would overwrite each other. Wait for it, "
                f"end it, or give another {field}."
            ) from None
        # A run that ended between the two calls has removed the file that was opened here.
        if _is_at(stream, path):
            break
        stream.close()
    with writing(path):
        stream.truncate(0)
        own = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        stream.write(json.dumps({**own, "command": shlex.join(sys.argv)}))
        stream.flush()
    for draft in folder.glob("*.draft"):  # of a process that was killed as it wrote
        with suppress(OSError):
            draft.unlink()
    return stream


def _lock(stream: IO[str], path: Path) -> None:
    """Take the lock of the process, which its forks do not inherit and so cannot hold on to.

    Raises:
        BlockingIOError: another process has it.
    """
    assert fcntl is not None
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError from error
        logger.warning("%s: this file system has no locks (%s): nothing stops a second run here", path, error.strerror)


def _holder(stream: IO[str]) -> str:
    """Describe the process that holds the lock."""
    stream.seek(0)
    try:
        found: dict[str, Any] = json.loads(stream.read())
        return f"process {found['pid']} on {found['host']} ({found['command']}, since {found['since']})"
    except (ValueError, KeyError, TypeError):  # it has not written them yet
        return "another process"


def _is_at(stream: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except OSError:
        return False
