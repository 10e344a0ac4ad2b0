"""The state of sampling in a checkpoint, per rank: with the seed, it determines all further samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from burnish.errors import ConfigError
from burnish.runs.files import read_json, write_json
from burnish.types import Completion, Episode, Group, Score, StopReason

__all__ = ["RolloutState"]


@dataclass(frozen=True, slots=True)
class RolloutState:
    """Progress of an online stage.

    Attributes:
        rollouts: rollouts so far.
        rounds: rounds of sampling so far.
        position: prompts consumed so far.
        level: level of the curriculum.
        buffer: groups of the remaining optimizer steps of the last rollout.
        replay: groups in the replay buffer, by position.
        algorithm: state of the algorithm.
        lengths: mean completion length of each prompt when it was last sampled, by its index.
    """

    rollouts: int
    rounds: int
    position: int
    level: float
    buffer: list[list[Group]]
    replay: dict[int, Group]
    algorithm: dict[str, Any]
    lengths: dict[int, int] = field(default_factory=dict[int, int])

    def save(self, folder: Path, rank: int) -> None:
        """Write this rank's file, without the columns of rows, which need not be JSON."""
        state = dataclasses.asdict(dataclasses.replace(self, buffer=[], replay={}))
        state["buffer"] = [[_group_to_dict(group) for group in groups] for groups in self.buffer]
        state["replay"] = {position: _group_to_dict(group) for position, group in self.replay.items()}
        write_json(_file(folder, rank), state, indent=None)

    @classmethod
    def load(cls, folder: Path, *, rank: int, world: int, prompts: Sequence[Group]) -> RolloutState:
        """Read this rank's file; another number of ranks can resume only if no samples are in flight.

        Args:
            folder: the checkpoint.
            rank: index of this process.
            world: number of processes.
            prompts: the training prompts, whose rows the samples belong to.

        Raises:
            ConfigError: samples are in flight on another number of processes, or of other prompts.
        """
        files = sorted(folder.glob("rollout_*.json"))
        states: list[dict[str, Any]] = [read_json(file) for file in files]
        if len(files) != world and (not states or any(state["buffer"] for state in states)):
            raise ConfigError(
                f"resume_from_checkpoint = {str(folder)!r}: {len(files)} processes have samples in flight and {world} "
                f"would continue. Resume with {len(files)}, or from a checkpoint at the end of a rollout."
            )
        state = states[0] if len(files) != world else read_json(_file(folder, rank))
        rows = {prompt.index: prompt.row for prompt in prompts}
        state["buffer"] = [[_group_from_dict(group, rows) for group in groups] for groups in state["buffer"]]
        state["replay"] = {int(position): _group_from_dict(group, rows) for position, group in state["replay"].items()}
        state["lengths"] = {int(index): tokens for index, tokens in state.get("lengths", {}).items()}
        return cls(**state)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rollout_{rank}.json"


def _group_to_dict(group: Group) -> dict[str, Any]:
    return dataclasses.asdict(dataclasses.replace(group, row={}))


def _group_from_dict(values: dict[str, Any], rows: Mapping[int, dict[str, Any]]) -> Group:
    if values["index"] not in rows:
        raise ConfigError(
            f"resume_from_checkpoint: samples in flight are of row {values['index']} of train_dataset, which is not "
            "there: resume with the data that the run began with."
        )
    completions: list[Completion] = []
    for entry in cast("list[dict[str, Any]]", values["completions"]):
        reason, scores, episode = entry["stop_reason"], entry["score"], entry.get("episode")
        entry["stop_reason"] = StopReason(reason) if reason else None
        entry["score"] = Score(**scores) if scores else None
        if episode:
            episode["turns"] = [tuple(turn) for turn in episode["turns"]]  # JSON has lists only
            entry["episode"] = Episode(**episode)
        completions.append(Completion(**entry))
    return Group(values["prompt_ids"], completions, rows[values["index"]], values["index"])
