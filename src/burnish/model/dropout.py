"""Dropout off: preferences and rewards compare completions, and noise between them is no signal."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import torch

__all__ = ["disable_dropout", "without_dropout"]


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout probability of a model, adapters included, to 0; its configuration stays as it is.

    Dropout layers hold theirs as `p`; modules that call the function hold theirs as a number (`attention_dropout`).

    Args:
        model: changed in place.
    """
    for module, name, _ in list(_probabilities(model)):
        setattr(module, name, 0.0)


@contextmanager
def without_dropout(model: torch.nn.Module) -> Generator[None]:
    """Run with every dropout probability at 0; the next trainer of the model finds its own back.

    Args:
        model: its probabilities are restored at the end, also of an error.
    """
    own = list(_probabilities(model))
    disable_dropout(model)
    try:
        yield
    finally:
        for module, name, value in own:
            setattr(module, name, value)


def _probabilities(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, float]]:
    """(module, attribute, probability) of everything in a model that drops out."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):  # pyright: ignore[reportPrivateUsage]
            yield module, "p", module.p
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or name.endswith(("_drop", "_pdrop"))):
                yield module, name, value
