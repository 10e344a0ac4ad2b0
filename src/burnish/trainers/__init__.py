"""Trainers: thin subclasses of `transformers.Trainer`, with their configs."""

from burnish.trainers.configs import GRPOConfig, SFTConfig
from burnish.trainers.online import GRPOTrainer
from burnish.trainers.sft import SFTTrainer

__all__ = ["GRPOConfig", "GRPOTrainer", "SFTConfig", "SFTTrainer"]
