"""The public trainers, with TRL's signatures, and their configs."""

from burnish.trainers.configs import (
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    OnlineDPOConfig,
    PPOConfig,
    RewardConfig,
    RLOOConfig,
    SFTConfig,
)
from burnish.trainers.dpo import DPOTrainer
from burnish.trainers.grpo import GRPOTrainer, RLOOTrainer
from burnish.trainers.kto import KTOTrainer
from burnish.trainers.online_dpo import OnlineDPOTrainer
from burnish.trainers.ppo import PPOTrainer
from burnish.trainers.reward import RewardTrainer
from burnish.trainers.sft import SFTTrainer

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "OnlineDPOConfig",
    "OnlineDPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "RLOOConfig",
    "RLOOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
]
