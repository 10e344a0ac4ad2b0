"""The table of stages, in the order of a pipeline, and the fields of each."""

from __future__ import annotations

import dataclasses
from functools import cache

from burnish.config import fields, online_fields, policy_fields
from burnish.config.declare import STAGES, FieldInfo, Kind, ResumeClass, Stage, declared
from burnish.config.sources import training_argument_fields
from burnish.config.training_arguments import TRAINING_ARGUMENTS

__all__ = [
    "FROM_PAIRS", "ONLINE", "PIPELINE_STAGES", "STAGES", "TRAINER_NAMES", "Kind", "Stage", "known_fields",
    "met_fields", "refused_fields", "resume_class", "stages_with",
]  # fmt: skip

_DECLARED_IN = (fields, online_fields, policy_fields)
"""Importing these modules fills the table."""

ONLINE = tuple(kind for kind, stage in STAGES.items() if stage.online)
FROM_PAIRS = tuple(kind for kind, stage in STAGES.items() if stage.rows == "pairs")

PIPELINE_STAGES = tuple(name for kind in STAGES for name in (("pairs", kind) if kind == FROM_PAIRS[0] else (kind,)))
"""Steps of a pipeline in order; pairs are sampled before the stages that learn from them."""

TRAINER_NAMES = {f"{stage.name}{end}": kind for kind, stage in STAGES.items() for end in ("Config", "Trainer")}
"""Public classes of the trainers -> the module of `burnish.trainers` that holds them."""


@cache
def known_fields(kind: Kind) -> dict[str, FieldInfo]:
    """Return the fields of a stage's config: those of TrainingArguments, then burnish's own. Does not load torch."""
    found: dict[str, FieldInfo] = {}
    for name, info in training_argument_fields().items():
        if (row := TRAINING_ARGUMENTS.get(name)) is not None:
            hint = info.hint if row.hint is None else row.hint
            info = dataclasses.replace(info, hint=hint, fix=row.fix, resume=row.resume, bounded=row.hint is not None)
        found[name] = info
    return found | declared(STAGES[kind].fields)


def stages_with(name: str) -> list[Kind]:
    """List the stages that have a field."""
    return [kind for kind in STAGES if name in known_fields(kind)]


@cache
def refused_fields(kind: Kind) -> dict[str, str]:
    """Return the inherited fields that a stage does not support -> the reason and the fix."""
    return {name: row.refused for name, row in TRAINING_ARGUMENTS.items() if row.refused and _holds(row.stages, kind)}


@cache
def met_fields(kind: Kind) -> frozenset[str]:
    """Return the inherited fields that a stage accepts and drops, because they are met anyway or have no effect."""
    return frozenset(name for name, row in TRAINING_ARGUMENTS.items() if row.met and _holds(row.stages, kind))


def _holds(stages: str, kind: Kind) -> bool:
    return {"all": True, "online": STAGES[kind].online, "all but sft": kind != "sft"}[stages]


@cache
def resume_class(name: str) -> ResumeClass:
    """Return what a resumed run does with a changed field; unknown fields are refused."""
    kinds = stages_with(name)
    return known_fields(kinds[0])[name].resume if kinds else "refused"
