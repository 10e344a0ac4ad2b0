"""The processes of a run: as many ranks as the launcher started, one run per folder."""

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
    """Whether `use_cpu` must be set for the ranks to meet: transformers joins ranks of CPUs only when it is told to."""
    return launched_processes() > 1 and not torch.accelerator.is_available()


def check_world_size(args: Any) -> None:
    """Refuse ranks that would each train a model of their own in one folder.

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
    """Hold the lock of `output_dir`: the first rank takes it, and all ranks learn whether it could.

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
