"""The table of stages: what trains, in the order in which a pipeline runs it, and where each is declared."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

from burnish.config.declare import FieldInfo, ResumeClass, declared
from burnish.config.fields import CommonFields, DPOFields, KTOFields, RewardFields, SFTFields
from burnish.config.online_fields import OnlineDPOFields
from burnish.config.policy_fields import GRPOFields, PPOFields, RLOOFields
from burnish.config.sources import training_argument_fields
from burnish.config.training_arguments import TRAINING_ARGUMENTS

__all__ = ["STAGES", "Kind", "Stage", "known_fields", "met_fields", "refused_fields", "resume_class", "stages_with"]

Kind: TypeAlias = str
"""A key of `STAGES`."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage that trains.

    Attributes:
        fields: its own configuration fields.
        name: what its classes are called: `{name}Config` and `{name}Trainer` in burnish.trainers.
        summary: for the command line.
        rows: what it trains on in a pipeline: demonstrations, sampled pairs, or prompts to sample from.
    """

    fields: type[CommonFields]
    name: str
    summary: str
    rows: Literal["demonstrations", "pairs", "prompts"]

    @property
    def online(self) -> bool:
        """Whether it learns from completions of its own, which a rubric scores."""
        return self.fields.samples


STAGES: dict[Kind, Stage] = {
    "sft": Stage(SFTFields, "SFT", "fine-tune on conversations, prompts with completions, or text", "demonstrations"),
    "reward": Stage(RewardFields, "Reward", "train a reward model on comparisons", "pairs"),
    "dpo": Stage(DPOFields, "DPO", "train on preference pairs: DPO and its family", "pairs"),
    "kto": Stage(KTOFields, "KTO", "train on completions labelled good or bad", "pairs"),
    "online_dpo": Stage(
        OnlineDPOFields,
        "OnlineDPO",
        "train on preferences between the model's own samples, judged by rewards",
        "prompts",
    ),
    "grpo": Stage(
        GRPOFields,
        "GRPO",
        "train on rewards: sample groups of completions, score them, follow the better ones",
        "prompts",
    ),
    "rloo": Stage(RLOOFields, "RLOO", "the same with the mean of the other samples as baseline", "prompts"),
    "ppo": Stage(PPOFields, "PPO", "the same with a critic that says how good each token was", "prompts"),
}


@cache
def known_fields(kind: Kind) -> dict[str, FieldInfo]:
    """Every field that the config of a stage has: those of TrainingArguments, then burnish's own. Loads no torch."""
    found: dict[str, FieldInfo] = {}
    for name, info in training_argument_fields().items():
        if (row := TRAINING_ARGUMENTS.get(name)) is not None:
            hint = info.hint if row.hint is None else row.hint
            info = dataclasses.replace(info, hint=hint, fix=row.fix, resume=row.resume, bounded=row.hint is not None)
        found[name] = info
    return found | declared(STAGES[kind].fields)


def stages_with(name: str) -> list[Kind]:
    """The stages that have a field of that name."""
    return [kind for kind in STAGES if name in known_fields(kind)]


@cache
def refused_fields(kind: Kind) -> dict[str, str]:
    """Every inherited field that the trainer of a stage cannot honour, with the reason and what to do."""
    return {name: row.refused for name, row in TRAINING_ARGUMENTS.items() if row.refused and _holds(row.stages, kind)}


@cache
def met_fields(kind: Kind) -> frozenset[str]:
    """Inherited fields of one stage that are dropped: their intent is met anyway, or they change nothing."""
    return frozenset(name for name, row in TRAINING_ARGUMENTS.items() if row.met and _holds(row.stages, kind))


def _holds(stages: str, kind: Kind) -> bool:
    return {"all": True, "online": STAGES[kind].online, "all but sft": kind != "sft"}[stages]


@cache
def resume_class(name: str) -> ResumeClass:
    """What a resumed run does with a changed field; one that no version of the tables knows is refused."""
    kinds = stages_with(name)
    return known_fields(kinds[0])[name].resume if kinds else "refused"
