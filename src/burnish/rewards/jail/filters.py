"""Seccomp filters as BPF programs: system calls that model-written code is refused."""

from __future__ import annotations

import errno
import platform
import struct

__all__ = ["CLONE", "NAMESPACE_FLAGS", "build_filter"]

# Numbers on x86-64 and arm64; None where the architecture lacks the call.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    "accept": (43, 202), "accept4": (288, 242), "acct": (163, 89), "add_key": (248, 217), "adjtimex": (159, 171),
    "bind": (49, 200), "bpf": (321, 280), "chroot": (161, 51), "clock_adjtime": (305, 266), "clock_settime": (227, 112),
    "connect": (42, 203), "delete_module": (176, 106), "fanotify_init": (300, 262), "fanotify_mark": (301, 263),
    "finit_module": (313, 273), "fsconfig": (431, 431), "fsmount": (432, 432), "fsopen": (430, 430),
    "fspick": (433, 433), "init_module": (175, 105), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425), "ioperm": (173, None), "iopl": (172, None), "kcmp": (312, 272),
    "kexec_file_load": (320, 294), "kexec_load": (246, 104), "keyctl": (250, 219), "listen": (50, 201),
    "lookup_dcookie": (212, 18), "mbind": (237, 235), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "migrate_pages": (256, 238), "mknod": (133, None), "mknodat": (259, 33), "modify_ldt": (154, None),
    "mount": (165, 40), "mount_setattr": (442, 442), "move_mount": (429, 429), "move_pages": (279, 239),
    "mq_open": (240, 180), "msgget": (68, 186), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "open_tree": (428, 428), "perf_event_open": (298, 241), "personality": (135, 92), "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pivot_root": (155, 41), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "ptrace": (101, 117), "quotactl": (179, 60), "quotactl_fd": (443, 443), "reboot": (169, 142),
    "request_key": (249, 218), "semget": (64, 190), "set_mempolicy": (238, 237), "setdomainname": (171, 162),
    "sethostname": (170, 161), "setns": (308, 268), "settimeofday": (164, 170), "shmat": (30, 196),
    "shmctl": (31, 195), "shmget": (29, 194), "socket": (41, 198), "swapoff": (168, 225), "swapon": (167, 224),
    "syslog": (103, 116), "umount2": (166, 39), "unshare": (272, 97), "userfaultfd": (323, 282), "uselib": (134, None),
    "vhangup": (153, 58), "vmsplice": (278, 75),
}  # fmt: skip

# Without a PID namespace, calls that reach other processes of the user; without a mount namespace, calls on files that
# Landlock does not cover.
_REFUSED_WITHOUT_NAMESPACES: dict[str, tuple[int | None, int | None]] = {
    "chmod": (90, None), "chown": (92, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "fchown": (93, 55), "fchownat": (260, 54), "fork": (57, None), "fremovexattr": (199, 16), "fsetxattr": (190, 7),
    "futimesat": (261, None), "ioprio_set": (251, 30), "kill": (62, 129), "lchown": (94, None),
    "lremovexattr": (198, 15), "lsetxattr": (189, 6), "removexattr": (197, 14), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "sched_setaffinity": (203, 122), "sched_setattr": (314, 274),
    "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "setpriority": (141, 140), "setxattr": (188, 5),
    "tgkill": (234, 131), "tkill": (200, 130), "utime": (132, None), "utimensat": (280, 88), "utimes": (235, None),
    "vfork": (58, None),
}  # fmt: skip

CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_IOCTL = {"x86_64": 16, "aarch64": 29}
_MMAP = {"x86_64": 9, "aarch64": 222}
_PRLIMIT = {"x86_64": 302, "aarch64": 261}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

NAMESPACE_FLAGS = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET."""

_CLONE_THREAD = 0x00010000
_MAP_SHARED, _MAP_ANONYMOUS = 0x01, 0x20
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE = 0, 4


def build_filter(*, has_namespaces: bool, machine: str | None = None) -> bytes | None:
    """Build the BPF program that refuses calls with EPERM; None on an unknown architecture.

    Args:
        has_namespaces: False for code that shares PIDs and mounts with its user; it cannot start processes either.
        machine: architecture, by default this one's.
    """
    machine = machine or platform.machine()
    if machine not in CLONE:
        return None
    refuse, column = _ERRNO | errno.EPERM, list(CLONE).index(machine)
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),  # another ABI has other numbers
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_AT_LEAST, 0, 1, 0x40000000),  # x32
        (_RETURN, 0, 0, refuse),
        (_JUMP_EQUAL, 0, 1, _CLONE3),  # its flags are out of reach; C libraries fall back to clone
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
    ]
    table = _REFUSED if has_namespaces else _REFUSED | _REFUSED_WITHOUT_NAMESPACES
    for number in sorted(numbers[column] or 0 for numbers in table.values() if numbers[column] is not None):
        code += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, refuse)]
    code += _on_argument(CLONE[machine], 0, [(_JUMP_ANY_BIT, 0, 1, NAMESPACE_FLAGS), (_RETURN, 0, 0, refuse)])
    # One page left of a shared mapping keeps all of its memory, which then counts for no process.
    shared = [(_JUMP_ANY_BIT, 0, 2, _MAP_SHARED), (_JUMP_ANY_BIT, 0, 1, _MAP_ANONYMOUS), (_RETURN, 0, 0, refuse)]
    code += _on_argument(_MMAP[machine], 3, shared)
    ioctl = [(_JUMP_EQUAL, 1, 0, _TIOCSTI), (_JUMP_EQUAL, 0, 1, _TIOCLINUX), (_RETURN, 0, 0, refuse)]
    code += _on_argument(_IOCTL[machine], 1, ioctl)
    if not has_namespaces:
        code += _on_argument(CLONE[machine], 0, [(_JUMP_ANY_BIT, 1, 0, _CLONE_THREAD), (_RETURN, 0, 0, refuse)])
        code += _on_argument(_PRLIMIT[machine], 0, [(_JUMP_EQUAL, 1, 0, 0), (_RETURN, 0, 0, refuse)])
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _on_argument(number: int, index: int, checks: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Run checks on the low half of an argument of one call, with the number loaded before and after."""
    load = (_LOAD, 0, 0, 16 + 8 * index)
    return [(_JUMP_EQUAL, 0, len(checks) + 1, number), load, *checks, (_LOAD, 0, 0, _NUMBER)]
