"""The reference policy of a KL term: adapters off, or a frozen copy of the model as it was given."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from burnish.errors import ModelError
from burnish.model.scoring import eval_mode, prepare_for_scoring

__all__ = ["Reference"]


@dataclass(frozen=True, slots=True)
class Reference:
    """A policy that does not train.

    Attributes:
        model: a frozen model, or None where the policy with its adapters off is the reference.
        is_initial_policy: whether it must equal the policy before the first update.
    """

    model: torch.nn.Module | None
    is_initial_policy: bool

    @classmethod
    def of(cls, policy: Any, ref_model: Any = None) -> Reference:
        """The reference of a policy.

        Args:
            policy: the model that will train, as it is now.
            ref_model: a model to use instead.

        Raises:
            ModelError: adapters that train biases, which stay changed when the adapters are off.
        """
        if ref_model is not None:
            prepare_for_scoring(ref_model)
            return cls(_frozen(ref_model), is_initial_policy=False)
        configs = getattr(policy, "peft_config", None)
        if configs is None or not hasattr(policy, "disable_adapter"):
            return cls(_frozen(copy.deepcopy(policy)), is_initial_policy=True)
        for name, config in configs.items():
            bias = getattr(config, "bias", "none")
            if bias != "none":
                raise ModelError(
                    f"peft_config.bias = {bias!r} (adapter {name!r}): trained biases stay changed with adapters off, "
                    "so the base is no reference. Use bias='none', or pass ref_model."
                )
        return cls(None, is_initial_policy=True)

    @contextmanager
    def active(self, policy: Any) -> Generator[torch.nn.Module]:
        """The model to score with, in evaluation mode."""
        model = policy if self.model is None else self.model
        with policy.disable_adapter() if self.model is None else nullcontext(), eval_mode(model):
            yield model


def _frozen(model: Any) -> Any:
    return model.requires_grad_(False).eval()
