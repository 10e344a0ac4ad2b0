"""Arguments, parser and data sets of training scripts.

Names and meanings are those of `trl.scripts`, so a script written for TRL runs with its import changed.
"""

from __future__ import annotations

from burnish.scripts.arguments import DatasetConfig, DatasetMixtureConfig, ModelConfig, ScriptArguments
from burnish.scripts.logs import init_zero_verbose
from burnish.scripts.mixtures import get_dataset
from burnish.scripts.models import get_peft_config, get_quantization_config
from burnish.scripts.parser import TrlParser

__all__ = [
    "DatasetConfig",
    "DatasetMixtureConfig",
    "ModelConfig",
    "ScriptArguments",
    "TrlParser",
    "get_dataset",
    "get_peft_config",
    "get_quantization_config",
    "init_zero_verbose",
]
