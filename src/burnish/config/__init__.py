"""Names, types, bounds, defaults and help of every configuration field, torch-free.

A field is declared once: trainers' configs inherit it, run files and overrides are checked against it, and `--help` of
a stage's command prints it.
"""

from __future__ import annotations

from burnish.config.algorithms import ADVANTAGE_NAMES, ALGORITHMS, LOSS_NAMES, Algorithm, apply_algorithm
from burnish.config.compat import Elsewhere, elsewhere
from burnish.config.declare import FieldInfo
from burnish.config.fields import PREFERENCE_LOSS_NAMES, CommonFields, DPOFields, KTOFields, RewardFields, SFTFields
from burnish.config.online_fields import OnlineDPOFields
from burnish.config.policy_fields import GRPOFields, PPOFields, RLOOFields
from burnish.config.sources import lora_fields, training_argument_fields
from burnish.config.stages import STAGES, Kind, known_fields, refused_fields
from burnish.config.validation import check_fields, check_keywords, check_mapping

__all__ = [
    "ADVANTAGE_NAMES",
    "ALGORITHMS",
    "LOSS_NAMES",
    "PREFERENCE_LOSS_NAMES",
    "STAGES",
    "Algorithm",
    "CommonFields",
    "DPOFields",
    "Elsewhere",
    "FieldInfo",
    "GRPOFields",
    "KTOFields",
    "Kind",
    "OnlineDPOFields",
    "PPOFields",
    "RLOOFields",
    "RewardFields",
    "SFTFields",
    "apply_algorithm",
    "check_fields",
    "check_keywords",
    "check_mapping",
    "elsewhere",
    "known_fields",
    "lora_fields",
    "refused_fields",
    "training_argument_fields",
]
