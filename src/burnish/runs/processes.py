"""The number of launched processes."""

from __future__ import annotations

import os

from burnish.errors import ConfigError

__all__ = ["launched_processes", "refuse_ranks"]

_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables of torchrun, accelerate and MPI with the number of processes."""


def launched_processes() -> int:
    """Return the number of processes that a launcher started, 1 without one."""
    values = (os.environ.get(name, "") for name in _WORLD_SIZES)
    return max(1, next((int(value) for value in values if value.isdecimal()), 1))


def refuse_ranks(command: str) -> None:
    """Refuse a launcher for a command that runs as one process.

    Raises:
        ConfigError: several processes would do the same work and write the same files.
    """
    if (launched := launched_processes()) > 1:
        raise ConfigError(
            f"the launcher started {launched} processes, and `burnish {command}` runs as one: start it without a "
            "launcher. The commands of single stages, such as `burnish grpo`, train on several."
        )
