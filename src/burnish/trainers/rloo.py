"""The public trainer of REINFORCE leave-one-out."""

from __future__ import annotations

from dataclasses import dataclass

from burnish.config import RLOOFields
from burnish.trainers.configs import TrainerConfig, checked
from burnish.trainers.grpo import GRPOTrainer

__all__ = ["RLOOConfig", "RLOOTrainer"]


@checked
@dataclass
class RLOOConfig(RLOOFields, TrainerConfig):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Arguments of `RLOOTrainer`: TRL's names where they mean the same; see `burnish.config.RLOOFields`."""

    def __post_init__(self) -> None:
        """Whiten advantages over the batch where that is asked for."""
        super().__post_init__()
        if self.normalize_advantages:
            self.scale_rewards = "batch"


class RLOOTrainer(GRPOTrainer):
    r"""REINFORCE leave-one-out (2402.14740), with the arguments of TRL's trainer: GRPOTrainer with the row `rloo`.

    .. math::
        \mathcal L = -\frac1S \sum_s \min\big(\rho_s A_s, \mathrm{clip}(\rho_s) A_s\big), \qquad
        A_s = R_s - \frac{1}{G-1} \sum_{k \ne s} R_k, \qquad
        R_s = r_s - \beta \sum_{t \in s} \log \frac{\pi_{old}(y_t)}{\pi_{ref}(y_t)}

    with rho the ratio of whole sequences.
    """

    args: RLOOConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = RLOOConfig
