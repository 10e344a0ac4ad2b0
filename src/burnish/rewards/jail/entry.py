"""Entry of an isolated process: enters the namespaces, then serves runs or executes a worker's command."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from typing import Any

from . import kernel

__all__ = ["DEVICES", "FOLDER", "INNER_USER", "enter_user", "main", "readable"]

INNER_USER = 1000
"""User and group of everything inside; never 0, whose processes no limit counts."""

FOLDER = "/sandbox"
"""Where each run has a folder of its own, in memory."""

DEVICES = ("full", "null", "random", "urandom")
"""Devices to read; not zero, of which a shared mapping is memory that counts for no process."""

_NOBODY = 65534
_SEPARATE = (
    kernel.NEW_MOUNTS | kernel.NEW_PIDS | kernel.NEW_NETWORK | kernel.NEW_IPC | kernel.NEW_UTS | kernel.NEW_CGROUP
)
_BIND, _RECURSIVE, _PRIVATE, _NOSUID, _NODEV = 4096, 16384, 1 << 18, 2, 4


def enter_user() -> None:
    """Enter a user namespace.

    The superuser becomes nobody outside, since the kernel exempts user 0 from RLIMIT_NPROC; only a process outside may
    write such a map. User 0 stays mapped until the mounts are done: it alone can reach folders of the superuser.
    """
    if os.geteuid() != 0:
        user, group = os.geteuid(), os.getegid()
        kernel.unshare(kernel.NEW_USER)
        maps = {"setgroups": "deny", "uid_map": f"{INNER_USER} {user} 1", "gid_map": f"{INNER_USER} {group} 1"}
        for name, text in maps.items():
            _write(f"/proc/self/{name}", text)
        return
    reader, writer = os.pipe()
    this = os.getpid()
    helper = os.fork()
    if helper == 0:
        status = 1
        try:
            os.close(writer)
            os.read(reader, 1)
            for name in ("uid_map", "gid_map"):
                _write(f"/proc/{this}/{name}", f"0 0 1\n{INNER_USER} {_NOBODY} 1")
            status = 0
        finally:
            os._exit(status)
    os.close(reader)
    try:
        kernel.unshare(kernel.NEW_USER)
    finally:
        os.close(writer)
        _, status = os.waitpid(helper, 0)
    if status:
        raise OSError("the user map of a namespace cannot be written")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _build_root(view: list[str], folder: str | None) -> None:
    """Make a root of read-only views of `view`, a few devices and one writable folder."""
    # Resolved now: absolute links lead nowhere after the pivot.
    sources = {path: os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)) for path in view}
    kernel.mount("", "/", flags=_PRIVATE | _RECURSIVE)
    # Any folder will do to mount the new root on; what it covers is reached through the old root.
    root = "/tmp"
    kernel.mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    os.mkdir(f"{root}/.outside")
    kernel.pivot_root(root, f"{root}/.outside")
    os.chdir("/")
    os.mkdir("/dev")
    for path, source in sources.items():
        if os.path.islink(f"/.outside{source}"):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.symlink(os.readlink(f"/.outside{source}"), path)
        else:
            _bind(source, path, writable=False)
    if folder is not None:
        _bind(os.path.realpath(folder), folder, writable=True)
    else:
        os.mkdir(FOLDER)
    if not os.path.exists("/tmp"):
        os.symlink(folder or FOLDER, "/tmp")
    for device in DEVICES:
        os.close(os.open(f"/dev/{device}", os.O_CREAT | os.O_WRONLY))
        kernel.mount(f"/.outside/dev/{device}", f"/dev/{device}", flags=_BIND)
    os.symlink(folder or FOLDER, "/dev/shm")
    kernel.unmount("/.outside")
    os.rmdir("/.outside")
    kernel.make_readonly("/", recursive=False)


def _bind(source: str, path: str, *, writable: bool) -> None:
    source = f"/.outside{source}"
    if os.path.isdir(source):
        os.makedirs(path, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    kernel.mount(source, path, flags=_BIND | _RECURSIVE)
    kernel.make_readonly(path, writable=writable)


def become_inner_user(folder: str | None) -> None:
    """Leave user 0 of the namespace, if that is who this is, with its capabilities and its folder."""
    if os.geteuid() == 0:
        kernel.keep_capabilities()
        if folder is not None:
            os.chown(folder, INNER_USER, INNER_USER)
        os.setgroups([])
        os.setresgid(INNER_USER, INNER_USER, INNER_USER)
        os.setresuid(INNER_USER, INNER_USER, INNER_USER)


def _enter_namespaces(spec: dict[str, Any]) -> None:
    """Enter new namespaces as their process 1; the original process stays outside and passes on the exit status."""
    enter_user()
    kernel.unshare(_SEPARATE)
    _build_root(spec["view"], spec["folder"])
    become_inner_user(spec["folder"])
    if os.fork():
        _wait_outside()
    kernel.die_with_parent()
    os.setsid()


def _wait_outside() -> None:
    """Wait for the isolated process and pass on its exit status; its streams end with it, not with this process."""
    os.closerange(0, 2)
    _, status = os.wait()
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def readable(spec: dict[str, Any]) -> list[str]:
    """List what Landlock lets be read: without a mount namespace, only the view and harmless devices."""
    return ["/"] if spec["level"] != "landlock" else [*spec["view"], *(f"/dev/{name}" for name in DEVICES)]


def main() -> None:
    """Isolate this process as its argument, a JSON object, says."""
    spec: dict[str, Any] = json.loads(sys.argv[1])
    if spec.get("bubblewrap"):
        if os.geteuid() == 0:  # it cannot make a namespace of two users
            enter_user()
        # It dies with the thread that started it, so that is never one of the trainer's.
        if os.fork():
            _wait_outside()
        os.execv(spec["bubblewrap"][0], spec["bubblewrap"])
    if spec["level"] == "namespaces":
        _enter_namespaces(spec)
    elif spec["level"] == "bubblewrap":
        become_inner_user(spec["folder"])
    if spec["command"] is None:
        from .zygote import serve

        serve(spec)
        return
    os.chdir(spec["folder"])
    with contextlib.suppress(PermissionError):  # it may lead its session already
        os.setsid()
    has_namespaces = spec["level"] in ("bubblewrap", "namespaces")
    if has_namespaces:
        resource.setrlimit(resource.RLIMIT_NPROC, (spec["processes"], spec["processes"]))
    kernel.drop_capabilities()
    kernel.lock_files(readable(spec), [spec["folder"], "/dev/null"])
    kernel.forbid_privileges()
    kernel.filter_calls(bytes.fromhex(spec["filter"]))
    os.execv(spec["command"][0], spec["command"])
