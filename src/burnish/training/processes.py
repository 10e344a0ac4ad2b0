"""Check that all launched processes train together, and that a folder has a single run."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from burnish.errors import ConfigError, FileError
from burnish.runs.lock import locked
from burnish.runs.processes import launched_processes

if TYPE_CHECKING:
    from burnish.training.learner import Learner

__all__ = ["check_world_size", "claimed_folder", "needs_cpu"]


def needs_cpu() -> bool:
    """Return whether `use_cpu` must be set: only then does transformers form a group of CPU ranks."""
    return launched_processes() > 1 and not torch.accelerator.is_available()


def check_world_size(args: Any) -> None:
    """Refuse processes that would each train a separate model in the same folder.

    Raises:
        ConfigError: a launcher started more processes than train together.
    """
    launched = launched_processes()
    if launched > 1 and args.world_size == 1:
        missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        why = f" ({', '.join(missing)} missing in the environment)" if missing else ""
        raise ConfigError(
            f"the launcher started {launched} processes, and each would train alone{why}: start them with torchrun or "
            "accelerate launch, set use_cpu = true for ranks without an accelerator of their own, or unset WORLD_SIZE."
        )


@contextmanager
def claimed_folder(trainer: Learner[Any]) -> Generator[None]:
    """Hold the lock of `output_dir`, taken by the first rank; raise on all ranks if it is taken.

    Raises:
        FileError: another run writes there.
    """
    with ExitStack() as stack:
        refused = ""
        if trainer.args.process_index == 0:
            try:
                stack.enter_context(locked(trainer.args.output_dir))
            except FileError as error:
                refused = str(error)
        if refused := next(filter(None, trainer.ranks.gathered([refused])), ""):
            raise FileError(refused)
        yield
