"""Devices by name, with memory and peak rates, and the one of this machine, without torch."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from burnish.config.predicates import parse_size
from burnish.errors import ConfigError, show

__all__ = ["DEVICES", "SHARDINGS", "Device", "Sharding", "detect_device", "find_device", "gpu_like", "host_memory"]

Sharding: TypeAlias = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]
SHARDINGS: tuple[Sharding, ...] = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


@dataclass(frozen=True, slots=True)
class Device:
    """A device that one rank trains on.

    Attributes:
        name: name in the table, or as the driver reports it.
        memory_bytes: memory as the driver reports it.
        flops: peak matrix-product rate in the compute dtype, dense, in FLOP/s.
        bandwidth: peak memory bandwidth in bytes/s.
        link: bandwidth to the host in bytes/s.
        fast_bf16: whether bf16 products run in hardware; burnish computes in fp32 without.
        is_cpu: whether device and host share their memory.
        host_bytes: memory of the host for this rank; None where it is not known, or is the device's own.
        packing: rate in bytes/s at which weights are packed for each product in bf16; None where they are not.
    """

    name: str
    memory_bytes: int
    flops: float
    bandwidth: float
    link: float = 25e9
    fast_bf16: bool = True
    is_cpu: bool = False
    host_bytes: int | None = None
    packing: float | None = None

    def with_host(self, memory_bytes: int | None) -> Device:
        """Put the device into a host of that much memory, which is a CPU's own; None leaves it as it is."""
        if memory_bytes is None:
            return self
        return dataclasses.replace(self, **{"memory_bytes" if self.is_cpu else "host_bytes": memory_bytes})

    def shared_by(self, ranks: int) -> Device:
        """Return a rank's share of what ranks on one machine have together: the host's memory."""
        shared = self.memory_bytes if self.is_cpu else self.host_bytes
        return self.with_host(None if shared is None else shared // ranks)


_MIB = 2**20

DEVICES = {
    device.name: device
    for device in (
        Device("H200", 143_771 * _MIB, 989e12, 4.8e12, 55e9),
        Device("H100", 81_559 * _MIB, 989e12, 3.35e12, 55e9),
        Device("A100-80", 81_920 * _MIB, 312e12, 2.04e12),
        Device("A100-40", 40_960 * _MIB, 312e12, 1.56e12),
        Device("RTX 5090", 32_607 * _MIB, 209e12, 1.79e12, 55e9),
        Device("RTX 4090", 24_564 * _MIB, 165e12, 1.01e12),
        Device("RTX 3090", 24_576 * _MIB, 71e12, 0.94e12),
        Device("L4", 23_034 * _MIB, 121e12, 0.3e12),
        Device("T4", 15_360 * _MIB, 8.1e12, 0.32e12, 12e9, fast_bf16=False),
        Device("8 GB laptop", 8_188 * _MIB, 30e12, 0.256e12, 12e9),
    )
}
"""GPUs by name: memory as reported, published dense rates with fp32 accumulation (of the T4 those of fp32)."""

_TILED, _ACCELERATED, _PLAIN = 750e9, 150e9, 30e9
"""FLOP/s of a CPU core with bf16 products in tiles (AMX), in vectors, and in fp32 without either.

An update reaches 0.3 TFLOP/s on one core with AMX (`make pieces`), which is 0.4 of the first.
"""
_PACKING = 2.5e9
"""Bytes/s at which a core packs weights for a bf16 product, as measured: torch does so anew for every product."""


def find_device(name: str) -> Device:
    """Return a device of the table, one of a given size such as `8GB`, `cpu`, or for `auto` that of this machine.

    A size takes the rates of the smallest GPU of the table that has it and computes in bf16.

    Raises:
        ConfigError: no such device.
    """
    if name == "auto":
        return detect_device()
    if name == "cpu":
        return _cpu()
    wanted = _key(name)
    for known, device in DEVICES.items():
        if _key(known) == wanted or _key(known).removeprefix("rtx") == wanted:
            return device
    if (memory := parse_size(name)) is not None:
        modern = [device for device in DEVICES.values() if device.fast_bf16]
        by_size = sorted(modern, key=lambda device: device.memory_bytes)
        like = next((device for device in by_size if device.memory_bytes >= memory), by_size[-1])
        return Device(f"{name.strip()} (as fast as {like.name})", memory, like.flops, like.bandwidth, like.link,
                      like.fast_bf16)  # fmt: skip
    raise ConfigError(
        f"--device = {show(name)}: no such device; use auto, cpu, a size such as 24GB, or one of {', '.join(DEVICES)}."
    )


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]|gb$", "", name.lower())


def detect_device() -> Device:
    """Return the first GPU that nvidia-smi reports, or this machine's CPU."""
    program = shutil.which("nvidia-smi")
    if program is not None:
        command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            name, _, mib = done.stdout.splitlines()[0].rpartition(",")
            return gpu_like(name.strip(), int(mib) * _MIB).with_host(host_memory())
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            pass  # a driver without a device: the CPU trains
    return _cpu()


def gpu_like(name: str, memory_bytes: int) -> Device:
    """Describe a GPU by the rates of the table's most similar one: of its kind if it has that, and of nearest size."""
    key = _key(name)
    kinds = [device for known, device in DEVICES.items() if _key(known.partition("-")[0]) in key]
    like = min(kinds or DEVICES.values(), key=lambda device: abs(device.memory_bytes - memory_bytes))
    return dataclasses.replace(like, name=name, memory_bytes=memory_bytes)


def _cpu() -> Device:
    """Describe this machine's CPU by its cores and the host's memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Where the system does not say, no run is refused for it.
    memory = host_memory() or 2**40
    flags = _text("/proc/cpuinfo")
    fast = any(f" {flag}" in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    rate = _TILED if " amx_bf16" in flags else _ACCELERATED if fast else _PLAIN
    return Device(f"CPU, {cores} cores", memory, cores * rate, 40e9, float("inf"), fast_bf16=fast, is_cpu=True,
                  packing=cores * _PACKING if fast else None)  # fmt: skip


_LIMITS = {"": "memory.max", "memory": "memory.limit_in_bytes"}
"""File of a control group's limit, by the controllers that /proc/self/cgroup names for version 2 and for version 1."""


def host_memory() -> int | None:
    """Return this machine's memory, or the least limit of its control groups; None where the system does not say."""
    if not hasattr(os, "sysconf"):  # as on Windows
        return None
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for line in _text("/proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers in _LIMITS:
            folder = Path("/sys/fs/cgroup", controllers, group.lstrip("/"))
            # A group is held to the limits of those around it; in a container its own folder may not be there.
            found = [_text(parent / _LIMITS[controllers]).strip() for parent in (folder, *folder.parents)]
            sizes += [int(limit) for limit in found if limit.isdecimal()]
    return min(sizes)


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
