"""The rows of the algorithm table, without torch: an algorithm is a set of values of configuration fields.

Parts have names (`advantage_estimator`, `loss_type`, `importance_sampling_level`, `kl_in` ...) that each resolve in a
table of pure functions. A row says which parts make an algorithm what it is, and which numbers its paper starts from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from burnish.config.sources import Names
from burnish.errors import ConfigError, show

__all__ = ["ADVANTAGE_NAMES", "ALGORITHMS", "LOSS_NAMES", "Algorithm", "apply_algorithm"]

ADVANTAGE_NAMES = Names("objectives/advantages.py", "ADVANTAGES")
LOSS_NAMES = Names("objectives/policy.py", "POLICY_LOSSES")


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A row of the table.

    Attributes:
        summary: what defines it, in a line.
        paper: arXiv number.
        parts: field -> value that makes it this algorithm; a config that sets another value is refused.
        defaults: field -> value to start from; a config may set another.
        stage: the trainer that runs it.
    """

    summary: str
    paper: str = ""
    parts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    stage: Literal["grpo", "ppo"] = "grpo"


_GROUP = {"advantage_estimator": "group", "importance_sampling_level": "token", "kl_in": "loss"}
_GSPO = {"advantage_estimator": "group", "loss_type": "grpo", "kl_in": "loss"}

ALGORITHMS: dict[str, Algorithm] = {
    "grpo": Algorithm(
        "z-scores within a group, token ratio and clip, k3 in the loss, mean over each sequence, then over sequences",
        "2402.03300",
        parts={**_GROUP, "loss_type": "grpo", "scale_rewards": "group"},
        defaults={"beta": 0.04},
    ),
    "bnpo": Algorithm(
        "grpo with one mean over all tokens of the step",
        "2506.02864",
        parts={**_GROUP, "loss_type": "bnpo"},
    ),
    "dr_grpo": Algorithm(
        "rewards centred, not scaled; a sum over tokens, divided by a constant length",
        "2503.20783",
        parts={**_GROUP, "loss_type": "dr_grpo", "scale_rewards": "none"},
    ),
    "dapo": Algorithm(
        "clip-higher, groups without spread replaced by new ones, mean over all tokens, soft overlong punishment",
        "2503.14476",
        parts={**_GROUP, "loss_type": "dapo", "dynamic_sampling": True},
        defaults={"epsilon": 0.2, "epsilon_high": 0.28, "overlong_buffer": 0.2},
    ),
    "gspo": Algorithm(
        "the ratio of the whole sequence (geometric mean over its tokens), narrow clip",
        "2507.18071",
        parts={**_GSPO, "importance_sampling_level": "sequence"},
        defaults={"epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
    "gspo_token": Algorithm(
        "gspo's ratio with each token's own gradient, so that advantages may differ by token",
        "2507.18071",
        parts={**_GSPO, "importance_sampling_level": "sequence_token"},
        defaults={"epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
    "luspo": Algorithm(
        "gspo with each sequence weighted by its length",
        "2602.05261",
        parts={**_GSPO, "loss_type": "luspo", "importance_sampling_level": "sequence"},
        defaults={"epsilon": 2e-3, "epsilon_high": 2.5e-3},
    ),
    "cispo": Algorithm(
        "the ratio, clipped and without gradient, weighs the log-likelihood: no token loses its gradient",
        "2506.13585",
        parts={**_GROUP, "loss_type": "cispo"},
        defaults={"epsilon_high": 5.0},
    ),
    "sapo": Algorithm(
        "a sigmoid gate of the ratio instead of a clip, steeper where the advantage is negative",
        "2511.20347",
        parts={**_GROUP, "loss_type": "sapo"},
    ),
    "vespo": Algorithm(
        "a soft weight of the ratio of the whole sequence, without gradient, instead of a clip",
        "2602.10693",
        parts={**_GROUP, "loss_type": "vespo"},
    ),
    "rloo": Algorithm(
        "the mean of the other samples as baseline, ratio of whole sequences, k1 in the reward",
        "2402.14740",
        parts={
            "advantage_estimator": "leave_one_out",
            "loss_type": "grpo",
            "importance_sampling_level": "product",
            "kl_in": "reward",
            "kl_estimator": "k1",
        },
        defaults={"beta": 0.05, "scale_rewards": "none"},
    ),
    "reinforce_pp": Algorithm(
        "REINFORCE++: no baseline; rewards minus each token's k1, whitened over the batch",
        "2501.03262",
        parts={
            "advantage_estimator": "batch",
            "loss_type": "dapo",
            "importance_sampling_level": "token",
            "kl_in": "reward",
            "kl_estimator": "k1",
        },
        defaults={"beta": 0.01},
    ),
    "reinforce_pp_baseline": Algorithm(
        "REINFORCE++-baseline: the group's mean as baseline, whitened over the batch, k2 in the loss",
        "2501.03262",
        parts={
            "advantage_estimator": "group_batch",
            "loss_type": "dapo",
            "importance_sampling_level": "token",
            "kl_in": "loss",
            "kl_estimator": "k2",
        },
        defaults={"beta": 0.001},
    ),
    "maxrl": Algorithm(
        "centred rewards divided by the group's mean reward: the gradient of the log pass rate, truncated at order G",
        "2602.02710",
        parts={
            "advantage_estimator": "mean_normalized",
            "importance_sampling_level": "token",
            "loss_type": "dr_grpo",
        },
    ),
    "ppo": Algorithm(
        "advantages of tokens from a critic (GAE), token ratio and clip, k1 in each token's reward",
        "1707.06347",
        parts={"importance_sampling_level": "token"},
        stage="ppo",
    ),
}
"""Name -> row; `burnish.algorithms.register` adds to it. PPO has a trainer of its own, for its critic."""


def apply_algorithm(kind: str, values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """The values of all fields of a config after its `algorithm` has had its say.

    Args:
        kind: the stage that the config is of.
        values: field -> value, all fields.
        given: names of the fields that somebody set.

    Raises:
        ConfigError: an unknown algorithm, or a field set to what the algorithm is not.
    """
    name = values.get("algorithm")
    if name is None:
        return dict(values)
    if name not in ALGORITHMS:
        raise ConfigError(f"algorithm = {show(name)}: use one of {', '.join(ALGORITHMS)}, or leave it out.")
    row = ALGORITHMS[name]
    if row.stage != ("ppo" if kind == "ppo" else "grpo"):
        trainer = {"ppo": "PPOTrainer", "grpo": "GRPOTrainer"}[row.stage]
        raise ConfigError(f"algorithm = {name!r}: {trainer} runs it (`burnish {row.stage}`), not this trainer.")
    for problem in _contradictions(name, row, values, given):
        raise ConfigError(problem)
    return {**values, **{k: v for k, v in row.defaults.items() if k not in given}, **row.parts}


def _contradictions(name: str, row: Algorithm, values: Mapping[str, Any], given: Collection[str]) -> Iterator[str]:
    for part, wanted in row.parts.items():
        if part in given and values[part] != wanted:
            yield (
                f"{part} = {values[part]!r} with algorithm = {name!r}, which is {part} = {wanted!r}: remove one of "
                "the two."
            )
