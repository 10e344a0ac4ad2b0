"""System calls that the standard library lacks: namespaces, mounts, capabilities, Landlock and seccomp (Linux)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
from collections.abc import Iterable

from .filters import CLONE

__all__ = [
    "NEW_CGROUP",
    "NEW_IPC",
    "NEW_MOUNTS",
    "NEW_NETWORK",
    "NEW_PIDS",
    "NEW_USER",
    "NEW_UTS",
    "clone",
    "die_with_parent",
    "drop_capabilities",
    "filter_calls",
    "forbid_privileges",
    "keep_capabilities",
    "landlock_version",
    "lock_files",
    "make_readonly",
    "mount",
    "pivot_root",
    "unmount",
    "unshare",
]

NEW_MOUNTS, NEW_CGROUP, NEW_UTS, NEW_IPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEW_USER, NEW_PIDS, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000

_CAPSET = {"x86_64": 126, "aarch64": 91}
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR = 442
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_SECUREBITS = 1, 22, 24, 28
_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
_SECBITS_NO_ROOT_NO_FIXUP = 0b101
_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_ATTR_READONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4

# Landlock's access rights by the version of its interface that added them.
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_FOLDER, _TRUNCATE, _IOCTL = 1, 2, 4, 8, 1 << 14, 1 << 15
_ANY_FILE = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL
_NETWORK_RIGHTS, _SCOPES = 0b11, 0b11

# PyDLL keeps the lock of the interpreter, which a raw clone must hold in both processes.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(what: str, number: int, *arguments: int | bytes | ctypes.c_void_p) -> int:
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _checked(_libc.syscall(ctypes.c_long(number), *wide), what)


def _prctl(what: str, option: int, *arguments: int) -> None:
    wide = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    _checked(_libc.prctl(option, *wide), what)


def unshare(flags: int) -> None:
    """Move this process into new namespaces; a new PID namespace holds only its later children."""
    _checked(_libc.unshare(flags), "unshare")


def clone(flags: int) -> int:
    """Fork into new namespaces; returns as `os.fork` does. Only for a process without threads."""
    sigchld = 17
    return _syscall("clone", CLONE[platform.machine()], flags | sigchld, 0, 0, 0, 0)


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """Mount a file system."""
    texts = [text.encode() or None for text in (source, target, kind)]
    _checked(_libc.mount(*texts, ctypes.c_ulong(flags), options.encode() or None), f"mount {target}")


def unmount(target: str) -> None:
    """Detach a file system."""
    _checked(_libc.umount2(target.encode(), _MNT_DETACH), f"umount {target}")


def pivot_root(root: str, old: str) -> None:
    """Exchange the root of the mount namespace."""
    _syscall("pivot_root", _PIVOT_ROOT[platform.machine()], root.encode(), old.encode())


def make_readonly(path: str, *, writable: bool = False, recursive: bool = True) -> None:
    """Make a mount, and by default all below it, read-only, without set-user-ID programs and devices."""
    attributes = struct.pack("=QQQQ", _ATTR_NOSUID | _ATTR_NODEV | (0 if writable else _ATTR_READONLY), 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    _syscall("mount_setattr", _MOUNT_SETATTR, _AT_FDCWD, path.encode(), flags, attributes, len(attributes))


def keep_capabilities() -> None:
    """Keep capabilities over a change of the user, and give none to user 0."""
    _prctl("securebits", _PR_SET_SECUREBITS, _SECBITS_NO_ROOT_NO_FIXUP)


def drop_capabilities() -> None:
    """Drop every capability for good."""
    with contextlib.suppress(OSError):
        _prctl("ambient capabilities", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    for capability in range(64):
        try:
            _prctl("capability bounding set", _PR_CAPBSET_DROP, capability)
        except OSError:  # the first one that the kernel does not know, or none may be dropped
            break
    header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _syscall("capset", _CAPSET[platform.machine()], header, none)


def forbid_privileges() -> None:
    """Forbid this process and its children to gain privileges by executing a file."""
    _prctl("no_new_privs", _PR_SET_NO_NEW_PRIVS, 1)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies."""
    _prctl("pdeathsig", _PR_SET_PDEATHSIG, 9)


def filter_calls(program: bytes) -> None:
    """Install a seccomp filter; `forbid_privileges` comes first."""
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))
    _prctl("seccomp", _PR_SET_SECCOMP, 2, ctypes.addressof(header))


def landlock_version() -> int:
    """Return the version of Landlock's interface; 0 if the kernel lacks or refuses it."""
    try:
        return _syscall("landlock", _LANDLOCK_CREATE, ctypes.c_void_p(), 0, 1)
    except OSError:
        return 0


def lock_files(readable: Iterable[str], writable: Iterable[str]) -> int:
    """Restrict this process and its children to reading and writing given paths, by Landlock.

    Also refuses TCP (version 4 of the interface), and abstract sockets and signals to others (version 6). Paths that do
    not exist are skipped.

    Returns:
        The version of the interface; 0 without Landlock.
    """
    version = landlock_version()
    if not version:
        return 0
    rights = sum(bits for since, bits in _FILE_RIGHTS.items() if since <= version)
    attributes = struct.pack("=QQQ", rights, _NETWORK_RIGHTS if version >= 4 else 0, _SCOPES if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _syscall("landlock", _LANDLOCK_CREATE, attributes, size, 0)
    reading = _EXECUTE | _READ_FILE | _READ_FOLDER
    try:
        for path, allowed in [(p, reading) for p in readable] + [(p, rights) for p in writable]:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
                try:
                    granted = allowed & rights & (~0 if os.path.isdir(path) else _ANY_FILE)
                    _syscall("landlock", _LANDLOCK_ADD, rules, 1, struct.pack("=Qi", granted, descriptor), 0)
                finally:
                    os.close(descriptor)
        forbid_privileges()
        _syscall("landlock", _LANDLOCK_RESTRICT, rules, 0)
    finally:
        os.close(rules)
    return version
