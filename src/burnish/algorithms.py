"""The table of online algorithms, and how to add a row from outside.

An algorithm is a row of values of configuration fields (`burnish.config.algorithms`): an advantage estimator
(`burnish.objectives.advantages`), a surrogate with its reduction (`burnish.objectives.policy`), a level of the
importance ratio, a KL estimate and where it counts, and filters of samples. `GRPOConfig(algorithm="gspo")` takes a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from burnish.config import ADVANTAGE_NAMES, ALGORITHMS, LOSS_NAMES, Algorithm, known_fields
from burnish.errors import ConfigError
from burnish.objectives.advantages import ADVANTAGES, Estimator
from burnish.objectives.aggregate import Reduction
from burnish.objectives.policy import POLICY_LOSSES, PolicyLoss, PolicyOptions, PolicyTerms

__all__ = ["ALGORITHMS", "Algorithm", "register"]


def register(
    name: str,
    summary: str,
    *,
    advantage: Estimator | None = None,
    loss: Callable[[PolicyTerms, PolicyOptions], torch.Tensor] | None = None,
    reduction: Reduction = "token",
    paper: str = "",
    **fields: Any,
) -> Algorithm:
    """Add a row to the table; `GRPOConfig(algorithm=name)` then trains with it.

    Args:
        name: of the row, and of the estimator and the loss where they are given.
        summary: what defines it, in a line.
        advantage: the rewards of a batch over all ranks -> P rows of G advantages; None: as `fields` say.
        loss: function from terms and options to [N] losses of tokens, not reduced; None: as in `fields`.
        reduction: reduction of the losses, with a global denominator.
        paper: arXiv number.
        fields: configuration fields that the algorithm starts from.

    Raises:
        ConfigError: the name is taken, or a field is not one of GRPOConfig.
    """
    if name in ALGORITHMS or (advantage and name in ADVANTAGES) or (loss and name in POLICY_LOSSES):
        raise ConfigError(f"name = {name!r}: the table has it already; choose another name.")
    if unknown := sorted(set(fields) - set(known_fields("grpo"))):
        raise ConfigError(f"{unknown[0]} = {fields[unknown[0]]!r}: not a field of GRPOConfig; see its fields.")
    parts: dict[str, Any] = {}
    if advantage is not None:
        ADVANTAGES[name] = advantage
        ADVANTAGE_NAMES.add(name)
        parts["advantage_estimator"] = name
    if loss is not None:
        POLICY_LOSSES[name] = PolicyLoss(lambda terms, options: _without_clip(loss(terms, options)), reduction)
        LOSS_NAMES.add(name)
        parts["loss_type"] = name
    ALGORITHMS[name] = Algorithm(summary, paper, parts=parts, defaults=fields)
    return ALGORITHMS[name]


def _without_clip(losses_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return losses_N, torch.zeros_like(losses_N, dtype=torch.bool)
