"""Trainers: thin subclasses of `transformers.Trainer`, with their configs."""

from burnish.trainers.configs import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, SFTConfig
from burnish.trainers.online import GRPOTrainer
from burnish.trainers.preference import DPOTrainer, KTOTrainer
from burnish.trainers.reward import RewardTrainer
from burnish.trainers.sft import SFTTrainer

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
]
