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

__all__ = [
    "FROM_PAIRS", "ONLINE", "PIPELINE_STAGES", "STAGES", "TRAINER_NAMES", "Kind", "Stage", "known_fields",
    "met_fields", "refused_fields", "resume_class", "stages_with",
]  # fmt: skip

Kind: TypeAlias = str
"""A key of `STAGES`."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage that trains.

    Attributes:
        fields: its own configuration fields.
        name: what its classes are called: `{name}Config` and `{name}Trainer` in `burnish.trainers.{kind}`.
        title: on the page about a run.
        summary: for the command line.
        method: for the card of a model.
        paper: arXiv number of the method, or nothing.
        rows: what it learns from in a pipeline: demonstrations, sampled pairs, or prompts to sample from.
    """

    fields: type[CommonFields]
    name: str
    title: str
    summary: str
    method: str
    paper: str
    rows: Literal["demonstrations", "pairs", "prompts"]

    @property
    def online(self) -> bool:
        """Whether it learns from completions of its own, which a rubric scores."""
        return self.fields.samples


STAGES: dict[Kind, Stage] = {
    stage.fields.kind: stage
    for stage in (
        Stage(
            SFTFields, "SFT", "SFT", "fine-tune on conversations, prompts with completions, or text",
            "supervised fine-tuning", "", "demonstrations",
        ),
        Stage(
            RewardFields, "Reward", "Reward model", "train a reward model on comparisons",
            "reward modelling", "", "pairs",
        ),
        Stage(
            DPOFields, "DPO", "DPO", "train on preference pairs: DPO and its family",
            "direct preference optimisation", "2305.18290", "pairs",
        ),
        Stage(
            KTOFields, "KTO", "KTO", "train on completions labelled good or bad",
            "Kahneman-Tversky optimisation", "2402.01306", "pairs",
        ),
        Stage(
            OnlineDPOFields, "OnlineDPO", "Online DPO",
            "train on preferences between the model's own samples, judged by rewards",
            "online direct preference optimisation", "2402.04792", "prompts",
        ),
        Stage(
            GRPOFields, "GRPO", "GRPO",
            "train on rewards: sample groups of completions, score them, follow the better ones",
            "group relative policy optimisation", "2402.03300", "prompts",
        ),
        Stage(
            RLOOFields, "RLOO", "RLOO", "the same with the mean of the other samples as baseline",
            "REINFORCE leave-one-out", "2402.14740", "prompts",
        ),
        Stage(
            PPOFields, "PPO", "PPO", "the same with a critic that says how good each token was",
            "proximal policy optimisation", "1707.06347", "prompts",
        ),
    )
}  # fmt: skip
"""Every stage that trains, in the order in which a pipeline runs them."""

ONLINE = tuple(kind for kind, stage in STAGES.items() if stage.online)
FROM_PAIRS = tuple(kind for kind, stage in STAGES.items() if stage.rows == "pairs")

PIPELINE_STAGES = tuple(name for kind in STAGES for name in (("pairs", kind) if kind == FROM_PAIRS[0] else (kind,)))
"""What a pipeline does, in this order: pairs are sampled before the stages that learn from them."""

TRAINER_NAMES = {f"{stage.name}{end}": kind for kind, stage in STAGES.items() for end in ("Config", "Trainer")}
"""Public classes of the trainers -> the module of `burnish.trainers` that holds them."""


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
