"""Trainers: thin subclasses of `transformers.Trainer`, with their configs."""

from burnish.trainers.configs import GRPOConfig, RewardConfig, SFTConfig
from burnish.trainers.online import GRPOTrainer
from burnish.trainers.reward import RewardTrainer
from burnish.trainers.sft import SFTTrainer

__all__ = ["GRPOConfig", "GRPOTrainer", "RewardConfig", "RewardTrainer", "SFTConfig", "SFTTrainer"]
