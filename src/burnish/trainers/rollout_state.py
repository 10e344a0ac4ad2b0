"""What a checkpoint keeps of the samples of one rank: with the seed, all that decides what comes next."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from burnish.errors import ConfigError
from burnish.types import Completion, Group, Score, StopReason

__all__ = ["RolloutState"]


@dataclass(frozen=True, slots=True)
class RolloutState:
    """Where an online trainer stands.

    Attributes:
        rollouts: rollouts so far.
        rounds: rounds of sampling so far.
        place: prompts handed out.
        level: of the curriculum.
        buffer: groups of the optimizer steps that the last rollout still feeds.
        replay: remembered groups by place.
        own: numbers of the algorithm's.
    """

    rollouts: int
    rounds: int
    place: int
    level: float
    buffer: list[list[Group]]
    replay: dict[int, Group]
    own: dict[str, Any]

    def save(self, folder: Path, rank: int) -> None:
        """Write this rank's file."""
        _file(folder, rank).write_text(json.dumps(dataclasses.asdict(self), default=str))

    @classmethod
    def load(cls, folder: str, rank: int) -> RolloutState:
        """Read it back.

        Raises:
            ConfigError: the rank has no file there.
        """
        file = _file(Path(folder), rank)
        if not file.is_file():
            raise ConfigError(
                f"resume_from_checkpoint = {folder!r}: {file.name} is missing, so the prompts and samples in "
                "flight are unknown. Resume with as many processes as wrote the checkpoint."
            )
        state = json.loads(file.read_text())
        state["buffer"] = [[_group_from_dict(group) for group in groups] for groups in state["buffer"]]
        state["replay"] = {int(place): _group_from_dict(group) for place, group in state["replay"].items()}
        return cls(**state)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rollout_{rank}.json"


def _group_from_dict(values: dict[str, Any]) -> Group:
    completions: list[Completion] = []
    for entry in cast("list[dict[str, Any]]", values["completions"]):
        reason, scores = entry["stop_reason"], entry["score"]
        entry["stop_reason"] = StopReason(reason) if reason else None
        entry["score"] = Score(**scores) if scores else None
        completions.append(Completion(**entry))
    return Group(values["prompt_ids"], completions, values["row"], values["index"])
