"""Check the paths of a configuration before anything is read or written."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from burnish.config.predicates import text_problem

__all__ = [
    "expanded",
    "file_problem",
    "folder_problem",
    "is_file",
    "is_folder",
    "is_only_a_path",
    "missing",
    "path_problem",
]

_LONGEST_NAME_BYTES = 255
_LONGEST_PATH_BYTES = 4095
_MOST_NAMES = 10_000
"""Maximum entries of a folder to compare with a missing name."""

_HUB_NAME = re.compile(r"(?!.*(--|\.\.))\w([\w.-]*\w)?(/\w([\w.-]*\w)?)?", re.ASCII)
"""`name` or `organisation/name`, in the hub's syntax."""


def expanded(path: str | Path) -> Path:
    """Expand `~` if possible; unlike `Path.expanduser`, does not raise for unknown users."""
    return Path(os.path.expanduser(path))


def is_file(path: str | Path) -> bool:
    """Return True if the file exists; unlike `Path.is_file`, False if the path cannot be looked up."""
    return os.path.isfile(path)


def is_folder(path: str | Path) -> bool:
    """Return True if the folder exists; unlike `Path.is_dir`, False if the path cannot be looked up."""
    return os.path.isdir(path)


def is_only_a_path(name: str | Path) -> bool:
    """Return True for a name that cannot be on the hub: a path, whether it exists or not."""
    text = str(name)
    if isinstance(name, Path) or not _HUB_NAME.fullmatch(text):
        return True
    return "/" in text and is_folder(os.path.dirname(text))


def missing(path: str | Path) -> str:
    """Describe how much of a missing path exists, and the similar names there."""
    whole = Path(os.path.abspath(expanded(path)))
    there = next((parent for parent in whole.parents if is_folder(parent)), whole)
    parts = whole.relative_to(there).parts
    wanted = parts[0] if parts else ""
    if os.path.isfile(there / wanted):
        return f"{there / wanted} is a file"
    try:
        with os.scandir(there) as entries:
            names = sorted(entry.name for entry in islice(entries, _MOST_NAMES))
    except OSError as error:
        return f"{there} cannot be listed ({error.strerror or error})"
    lower = {name.lower(): name for name in names}
    similar = [lower[name] for name in get_close_matches(wanted.lower(), lower, n=3)]
    has = f"has {', '.join(map(repr, similar))}" if similar else "has nothing with a similar name"
    return f"{there} has no {wanted!r}; it {has}"


def path_problem(path: str) -> str | None:
    """Return why a text cannot be a path, with the fix, or None."""
    if not path.strip():
        return "it is empty; give a path"
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        return text_problem(path)
    if b"\0" in encoded:
        return text_problem(path)
    longest = max((len(os.fsencode(part)) for part in Path(path).parts), default=0)
    if longest > _LONGEST_NAME_BYTES or len(encoded) > _LONGEST_PATH_BYTES:
        return f"a name in it has {longest} bytes; use names of at most {_LONGEST_NAME_BYTES}"
    return None


def folder_problem(path: str, *, writable: bool = False) -> str | None:
    """Return why a folder cannot be created, with the fix, or None; `writable` also checks the permission."""
    problem = path_problem(path)
    if problem is not None:
        return problem
    folder = Path(path)
    there = next((one for one in (folder, *folder.parents) if os.path.lexists(one)), None)
    if there is None:
        return None
    if not is_folder(there):
        return "it is a file; name a folder" if there == folder else f"{there} is a file; name another folder"
    if writable and not os.access(there, os.W_OK | os.X_OK):
        return f"{there} is not writable; change its permissions, or name another folder"
    return None


def file_problem(path: str) -> str | None:
    """Return why a file cannot be written, with the fix, or None."""
    problem = path_problem(path)
    if problem is not None:
        return problem
    if is_folder(path):
        return "it is a folder; name a file"
    parent = str(Path(path).parent)
    problem = folder_problem(parent, writable=True)
    return f"{parent} is a file; name another folder" if is_file(parent) else problem
