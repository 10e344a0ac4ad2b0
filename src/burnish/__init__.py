"""burnish post-trains language models: supervised fine-tuning and online reinforcement learning, exact and CPU-first.

Names load on first use, so `import burnish` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from burnish.errors import (
        BurnishError,
        CheckFailed,
        ConfigError,
        DataError,
        EngineError,
        FileError,
        Interrupted,
        MissingName,
        ModelError,
        RewardError,
    )
    from burnish.evaluation.evaluate import Evaluation, pass_at_k
    from burnish.report import write_report
    from burnish.rewards import Criterion, RewardModel, Rubric
    from burnish.scripts import (
        DatasetConfig,
        DatasetMixtureConfig,
        ModelConfig,
        ScriptArguments,
        TrlParser,
        get_dataset,
        get_peft_config,
        get_quantization_config,
        init_zero_verbose,
    )
    from burnish.trainers.dpo import DPOConfig, DPOTrainer
    from burnish.trainers.grpo import GRPOConfig, GRPOTrainer
    from burnish.trainers.kto import KTOConfig, KTOTrainer
    from burnish.trainers.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
    from burnish.trainers.ppo import PPOConfig, PPOTrainer
    from burnish.trainers.reward import RewardConfig, RewardTrainer
    from burnish.trainers.rloo import RLOOConfig, RLOOTrainer
    from burnish.trainers.sft import SFTConfig, SFTTrainer
    from burnish.types import Completion, Group, PackedBatch, Score, StopReason

__all__ = [
    "BurnishError",
    "CheckFailed",
    "Completion",
    "ConfigError",
    "Criterion",
    "DPOConfig",
    "DPOTrainer",
    "DataError",
    "DatasetConfig",
    "DatasetMixtureConfig",
    "EngineError",
    "Evaluation",
    "FileError",
    "GRPOConfig",
    "GRPOTrainer",
    "Group",
    "Interrupted",
    "KTOConfig",
    "KTOTrainer",
    "MissingName",
    "ModelConfig",
    "ModelError",
    "OnlineDPOConfig",
    "OnlineDPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "PackedBatch",
    "RLOOConfig",
    "RLOOTrainer",
    "RewardConfig",
    "RewardError",
    "RewardModel",
    "RewardTrainer",
    "Rubric",
    "SFTConfig",
    "SFTTrainer",
    "Score",
    "ScriptArguments",
    "StopReason",
    "TrlParser",
    "__version__",
    "get_dataset",
    "get_peft_config",
    "get_quantization_config",
    "init_zero_verbose",
    "pass_at_k",
    "write_report",
]

__version__ = "0.1.0"

_HOMES = {
    "burnish.errors": (
        "BurnishError",
        "CheckFailed",
        "ConfigError",
        "DataError",
        "EngineError",
        "FileError",
        "Interrupted",
        "MissingName",
        "ModelError",
        "RewardError",
    ),
    "burnish.evaluation.evaluate": ("Evaluation", "pass_at_k"),
    "burnish.report": ("write_report",),
    "burnish.rewards": ("Criterion", "RewardModel", "Rubric"),
    "burnish.scripts": (
        "DatasetConfig",
        "DatasetMixtureConfig",
        "ModelConfig",
        "ScriptArguments",
        "TrlParser",
        "get_dataset",
        "get_peft_config",
        "get_quantization_config",
        "init_zero_verbose",
    ),
    "burnish.types": ("Completion", "Group", "PackedBatch", "Score", "StopReason"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        from burnish.config.compat import NO_IMPORTS
        from burnish.config.stages import TRAINER_NAMES
        from burnish.errors import MissingName

        # An AttributeError would lose its message: `from burnish import ...` replaces it by its own.
        if name in NO_IMPORTS:
            raise MissingName(f"burnish has no {name}: {NO_IMPORTS[name]}.")
        if name not in TRAINER_NAMES:
            raise AttributeError(f"module 'burnish' has no attribute {name!r}")
        home = f"burnish.trainers.{TRAINER_NAMES[name]}"
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
