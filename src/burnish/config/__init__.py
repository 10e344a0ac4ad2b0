"""Names, types, defaults and rules of every configuration field, without torch.

The trainers' configs inherit their own fields from here, files and overrides are checked against the same tables, and
`burnish grpo --help` prints them: a field is written down once.
"""

from __future__ import annotations

from burnish.config.algorithms import ADVANTAGE_NAMES, ALGORITHMS, LOSS_NAMES, Algorithm, apply_algorithm
from burnish.config.checks import check_fields, check_keywords, check_mapping
from burnish.config.compat import Elsewhere, elsewhere
from burnish.config.fields import (
    CommonFields,
    DPOFields,
    GRPOFields,
    KTOFields,
    OnlineDPOFields,
    PPOFields,
    RewardFields,
    RLOOFields,
    SFTFields,
    known_fields,
)
from burnish.config.inherited import FieldInfo, lora_fields, training_argument_fields
from burnish.config.refused import REFUSED, REFUSED_FOR, Kind, refused_fields
from burnish.config.rules import PREFERENCE_LOSS_NAMES, check_values

__all__ = [
    "ADVANTAGE_NAMES",
    "ALGORITHMS",
    "LOSS_NAMES",
    "PREFERENCE_LOSS_NAMES",
    "REFUSED",
    "REFUSED_FOR",
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
    "check_values",
    "elsewhere",
    "known_fields",
    "lora_fields",
    "refused_fields",
    "training_argument_fields",
]
