"""Declare configuration fields, with type, bounds, group and resume class, and the stages that they belong to."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Collection
from dataclasses import MISSING, dataclass, field, fields
from functools import cache, partial
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, MinLen

from burnish.config.paths import folder_problem, path_problem

__all__ = [
    "CORRECTIONS",
    "CRITIC",
    "DATA",
    "ENTROPY",
    "EPISODES",
    "GROUPS",
    "LOGGING",
    "LOSS",
    "MODEL",
    "REFERENCE",
    "REWARDS",
    "SAMPLING",
    "SERVERS",
    "STAGES",
    "TABLE",
    "TRAINING",
    "AtLeastTwo",
    "BelowOne",
    "Count",
    "FieldInfo",
    "Folder",
    "Fraction",
    "Group",
    "Kind",
    "Meets",
    "Natural",
    "NonNegative",
    "PathName",
    "Positive",
    "Proportion",
    "ResumeClass",
    "Seed",
    "Stage",
    "Text",
    "Weights",
    "declared",
    "describe",
    "one_of",
    "own",
    "stage",
    "union_members",
]  # fmt: skip

T = TypeVar("T")

ResumeClass: TypeAlias = Literal["free", "applied", "refused"]
"""Treatment of a setting that differs from the checkpoint's. free: does not affect what is learned; applied: takes
effect and is announced; refused: an error, since it would be another run."""


@dataclass(frozen=True, slots=True)
class Meets:
    """A constraint by a function that returns the fix for an invalid value, and None for a valid one."""

    problem: Callable[[Any], str | None]

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import PydanticCustomError, core_schema

        def check(value: Any) -> Any:
            if (fix := self.problem(value)) is not None:
                raise PydanticCustomError("fix", "{fix}", {"fix": fix})
            return value

        return core_schema.no_info_after_validator_function(check, handler(source))


def one_of(names: Collection[str]) -> Meets:
    """Constrain a value to a collection of names, which may grow."""
    return Meets(lambda value: None if value in names else f"use one of {', '.join(names)}")


Count = Annotated[int, Ge(1)]
AtLeastTwo = Annotated[int, Ge(2)]
Natural = Annotated[int, Ge(0)]
Seed = Annotated[int, Interval(ge=0, lt=2**32)]
"""A seed for every random generator; numpy's are below 2^32."""
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
Proportion = Annotated[float, Interval(gt=0, le=1)]
BelowOne = Annotated[float, Interval(ge=0, lt=1)]
Text = Annotated[str, MinLen(1)]
Weights = Annotated[list[float], MinLen(1)]
PathName = Annotated[str, Meets(path_problem)]
Folder = Annotated[str, Meets(folder_problem)]


class Group(NamedTuple):
    """A heading of `--help`, with the default resume class of its fields."""

    title: str
    resume: ResumeClass = "applied"


TRAINING = Group("Training")
DATA = Group("Data", "refused")
SAMPLING = Group("Sampling")
SERVERS = Group("vLLM servers", "free")
EPISODES = Group("Tools and environments")
REWARDS = Group("Rewards and advantages")
LOSS = Group("Loss")
REFERENCE = Group("Reference and KL divergence")
CRITIC = Group("Critic")
ENTROPY = Group("Entropy")
CORRECTIONS = Group("Sampler mismatch")
MODEL = Group("Model and memory", "free")
LOGGING = Group("Logging, saving and resuming", "free")
TABLE = Group("Table")
"""Group of the fields of tables other than a stage's."""
GROUPS = (
    TRAINING, DATA, SAMPLING, EPISODES, SERVERS, REWARDS, LOSS, REFERENCE, CRITIC, ENTROPY, CORRECTIONS, MODEL, LOGGING,
)  # fmt: skip
"""The headings of `--help`, most used first."""


def own(default: T, text: str, group: Group = TABLE, *, fix: str = "", resume: ResumeClass | None = None) -> T:
    """Declare a field of a configuration dataclass, whose annotation holds its type and bounds.

    Args:
        default: default value.
        text: help, in one or two sentences.
        group: heading of `--help`.
        fix: how to correct an invalid value; empty derives it from the bounds.
        resume: treatment of a change on resume; None takes the group's.
    """
    metadata = {"help": text, "group": group, "fix": fix, "resume": resume or group.resume}
    if isinstance(default, list):
        copied = partial(copy.copy, default)
        return field(default_factory=copied, metadata=metadata)  # pyright: ignore[reportReturnType]
    return field(default=default, metadata=metadata)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, slots=True)
class FieldInfo:
    """One configuration field.

    Attributes:
        name: name in a file.
        hint: type, with bounds.
        default: default value.
        own: whether burnish declares it, also to change an inherited default.
        help: one or two sentences; empty for inherited fields.
        group: heading of `--help`.
        fix: how to correct an invalid value; empty derives it from the bounds.
        resume: treatment of a change on resume.
        bounded: whether burnish checks its values.
    """

    name: str
    hint: Any
    default: Any = None
    own: bool = False
    help: str = ""
    group: Group = LOGGING
    fix: str = ""
    resume: ResumeClass = "refused"
    bounded: bool = False

    @property
    def type(self) -> str:
        """Type without bounds, as source text."""
        return describe(self.hint)


@cache
def declared(record: type[Any]) -> dict[str, FieldInfo]:
    """Return the fields of a dataclass declared by `own`."""
    hints = get_type_hints(record, include_extras=True)
    return {
        item.name: FieldInfo(
            item.name,
            hints[item.name],
            item.default if item.default_factory is MISSING else item.default_factory(),
            own=True,
            bounded=True,
            **item.metadata,
        )
        for item in fields(record)
    }


def union_members(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def describe(hint: Any) -> str:
    """Write a type as source text, without bounds: `float | None`."""
    members, origin, args = union_members(hint), get_origin(hint), get_args(hint)
    if len(members) > 1:
        return " | ".join(map(describe, members))
    if origin is Annotated:
        return describe(args[0])
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, args))}]"
    if args:
        return f"{origin.__name__}[{', '.join(map(describe, args))}]"
    return "None" if hint in (None, type(None)) else getattr(hint, "__name__", str(hint))


Kind: TypeAlias = str
"""A key of `STAGES`."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A training stage.

    Attributes:
        fields: dataclass of its configuration fields.
        name: prefix of its classes, `{name}Config` and `{name}Trainer` in `burnish.trainers.{kind}`.
        title: title in the report.
        summary: help of its command.
        method: name of the method on the model card.
        paper: arXiv id of the method, or empty.
        rows: training data in a pipeline: demonstrations, sampled pairs, or prompts to sample from.
    """

    fields: type[Any]
    name: str
    title: str
    summary: str
    method: str
    paper: str
    rows: Literal["demonstrations", "pairs", "prompts"]

    @property
    def online(self) -> bool:
        """True if the stage samples the completions that it learns from."""
        return self.fields.samples


STAGES: dict[Kind, Stage] = {}
"""Every training stage, in the order of declaration, which is the order of a pipeline."""


def stage(
    name: str,
    *,
    summary: str,
    method: str,
    rows: Literal["demonstrations", "pairs", "prompts"],
    title: str | None = None,
    paper: str = "",
) -> Callable[[type[T]], type[T]]:
    """Enter the decorated dataclass into the table of stages; see `Stage` for the arguments."""

    def enter(own: type[T]) -> type[T]:
        kind: Kind = own.kind  # pyright: ignore[reportAttributeAccessIssue]
        STAGES[kind] = Stage(own, name, title or name, summary, method, paper, rows)
        return own

    return enter
