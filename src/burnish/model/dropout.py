"""Disabling dropout: preference and reward losses compare completions, and its noise would swamp the difference."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import torch

__all__ = ["disable_dropout", "draws_dropout", "without_dropout"]


def draws_dropout(module: torch.nn.Module) -> bool:
    """Return whether a forward of a module draws random numbers: it trains, and a probability is not 0."""
    return module.training and any(value > 0 for _, _, value in _probabilities(module))


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout probability of a model and its adapters to 0, without changing its configuration.

    Dropout layers hold it as `p`; modules that call the function hold it as a float (`attention_dropout`).

    Args:
        model: changed in place.
    """
    for module, name, _ in list(_probabilities(model)):
        setattr(module, name, 0.0)


@contextmanager
def without_dropout(model: torch.nn.Module) -> Generator[None]:
    """Run with every dropout probability at 0.

    Args:
        model: its probabilities are restored on exit, also after an error.
    """
    before = list(_probabilities(model))
    disable_dropout(model)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _probabilities(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, float]]:
    """Yield (module, attribute, probability) of every dropout in a model."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):  # pyright: ignore[reportPrivateUsage]
            yield module, "p", module.p
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or name.endswith(("_drop", "_pdrop"))):
                yield module, name, value
