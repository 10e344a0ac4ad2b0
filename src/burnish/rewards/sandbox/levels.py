"""Levels of isolation, strongest first, and the commands that start a process at a level."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import site
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from burnish.errors import ConfigError
from burnish.rewards.jail.entry import DEVICES, FOLDER, INNER_USER
from burnish.rewards.jail.filters import build_filter

__all__ = [
    "ISOLATIONS",
    "LEVELS",
    "check_isolation",
    "clean_environment",
    "interpreter_view",
    "jailed_command",
    "worker_view",
]

LEVELS = ("bubblewrap", "namespaces", "landlock")
"""Levels of isolation, in the order in which `isolation = "auto"` tries them."""

ISOLATIONS = ("auto", *LEVELS, "none")

_REWARDS = Path(__file__).resolve().parents[1]
_BOOT = (
    "import sys; sys.path.insert(0, sys.argv[2]); from jail.entry import main; del sys.path[0]; "
    "sys.path_importer_cache.clear(); main()"
)
_WORKER_PROCESSES = 64
_SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/alternatives", "/etc/ld.so.cache", "/etc/localtime")
_GRADERS = ("math_verify", "reasoning_gym")


def check_isolation(isolation: str) -> None:
    """Check the name of an isolation.

    Raises:
        ConfigError: an unknown one.
    """
    if isolation not in ISOLATIONS:
        raise ConfigError(f"isolation = {isolation!r}: use one of {', '.join(ISOLATIONS)}.")


def clean_environment(folder: str) -> dict[str, str]:
    """Return the environment of model-written code: nothing of the user's, and hashes that repeat."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    own = {"HOME": folder, "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
    return kept | own | {"TMPDIR": folder, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def interpreter_view() -> list[str]:
    """List the paths that an interpreter and its libraries need."""
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.realpath(sys.prefix)}
    prefixes |= {os.path.realpath(sys.base_prefix), str(Path(os.path.realpath(sys.executable)).parents[1])}
    parts = [os.path.join(prefix, part) for prefix in prefixes for part in ("bin", "lib", "lib64", "pyvenv.cfg")]
    users = site.getusersitepackages()
    return _outermost([*_SYSTEM, *parts, str(_REWARDS / "jail"), *([users] if users in sys.path else [])])


def worker_view() -> list[str]:
    """List the paths that a worker needs: the interpreter's, and where this and the graders' packages are."""
    view = interpreter_view()
    # By path first: what this process has imported may be another one than a worker would.
    specs = [PathFinder.find_spec(name) or importlib.util.find_spec(name) for name in _GRADERS]
    homes = [str(Path(spec.origin).parents[1]) for spec in specs if spec is not None and spec.origin is not None]
    return _outermost([*view, str(_REWARDS.parents[1]), *homes])


def _outermost(paths: Sequence[str]) -> list[str]:
    """Sort existing paths and drop those below another, and any that would show a home folder or everything."""
    secret = {"/", os.path.expanduser("~"), os.path.dirname(os.path.expanduser("~"))}
    kept: list[str] = []
    for path in sorted({os.path.abspath(path) for path in paths if os.path.lexists(path)} - secret):
        if not any(path.startswith(f"{other}/") and not os.path.islink(other) for other in kept):
            kept.append(path)
    return kept


@functools.cache
def _filter(has_namespaces: bool) -> str:
    program = build_filter(has_namespaces=has_namespaces) if sys.platform == "linux" else None
    return "" if program is None else program.hex()


def jailed_command(
    level: str, *, view: Sequence[str], folder: str | None = None, command: Sequence[str] | None = None
) -> list[str]:
    """Build the command line of an isolated process.

    Args:
        level: one of `LEVELS`, or "none" for a zygote without isolation.
        view: paths to read.
        folder: folder to write to, for a worker; a zygote makes one for each run.
        command: command of a worker; None for a zygote.
    """
    spec = {
        "level": level,
        "view": list(view),
        "folder": folder,
        "command": None if command is None else list(command),
        "filter": _filter(level in ("bubblewrap", "namespaces")),
        "processes": _WORKER_PROCESSES,
    }
    start = [sys.executable, "-s", "-P", "-B", "-W", "ignore", "-c", _BOOT]
    inner = [*start, json.dumps(spec), str(_REWARDS)]
    if level != "bubblewrap":
        return inner
    outer = [*_bubblewrap(view, folder), "--", *inner]
    return [*start, json.dumps({"bubblewrap": outer}), str(_REWARDS)]


def _bubblewrap(view: Sequence[str], folder: str | None) -> list[str]:
    user = ["--unshare-user", "--uid", str(INNER_USER), "--gid", str(INNER_USER)] if os.geteuid() else []
    capabilities = ["--cap-add", "CAP_SYS_ADMIN"] if os.geteuid() else ["--cap-add", "ALL"]
    separate = ["pid", "net", "ipc", "uts", "cgroup-try"]
    arguments = [shutil.which("bwrap") or "bwrap", *user, *(f"--unshare-{name}" for name in separate), *capabilities]
    arguments += ["--die-with-parent", "--new-session"]
    # Bubblewrap makes parents that only user 0 can enter.
    parents = {str(parent) for path in (*view, folder or "/", "/dev/null") for parent in Path(path).parents} - {"/"}
    for path in sorted(parents):
        arguments += ["--perms", "0755", "--dir", path]
    for path in view:
        arguments += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    arguments += ["--bind", folder, folder] if folder is not None else ["--dir", FOLDER]
    if "/tmp" not in parents:  # nothing of the view lies there
        arguments += ["--symlink", folder or FOLDER, "/tmp"]
    for device in DEVICES:
        arguments += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    return [*arguments, "--symlink", folder or FOLDER, "/dev/shm", "--remount-ro", "/", "--chdir", "/"]
