"""The algorithm table, torch-free: an algorithm is a set of values of configuration fields.

Each part of an algorithm (`advantage_estimator`, `loss_type`, `importance_sampling_level`, `kl_in` ...) names a pure
function. A row sets the parts that define the algorithm and the hyperparameters of its paper.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from burnish.config.sources import Names
from burnish.errors import ConfigError, show

__all__ = ["ADVANTAGE_NAMES", "ALGORITHMS", "LOSS_NAMES", "Algorithm", "apply_algorithm"]

ADVANTAGE_NAMES = Names("objectives/advantages.py", "ADVANTAGES")
LOSS_NAMES = Names("objectives/policy.py", "POLICY_LOSSES")


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A row of the algorithm table.

    Attributes:
        summary: definition in one line.
        paper: arXiv id.
        parts: field -> value that defines the algorithm; a config with another value is refused.
        defaults: field -> default value, which a config may override.
        stage: stage that runs it.
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
        "clip-higher, groups without reward variance resampled, mean over all tokens, soft overlong penalty",
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
        "gspo's ratio with a gradient per token, so advantages may differ by token",
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
        "log-likelihood weighted by the clipped ratio without its gradient, so no token loses its gradient",
        "2506.13585",
        parts={**_GROUP, "loss_type": "cispo"},
        defaults={"epsilon_high": 5.0},
    ),
    "sapo": Algorithm(
        "a sigmoid gate of the ratio instead of a clip, steeper at negative advantages",
        "2511.20347",
        parts={**_GROUP, "loss_type": "sapo"},
    ),
    "vespo": Algorithm(
        "log-likelihood weighted by a soft function of the sequence ratio, without gradient, instead of a clip",
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
        "token advantages from a critic (GAE), token ratio and clip, k1 in each token's reward",
        "1707.06347",
        parts={"importance_sampling_level": "token"},
        stage="ppo",
    ),
}
"""Name -> row; `burnish.algorithms.register` adds rows."""


def apply_algorithm(kind: str, values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Apply a config's `algorithm` to its fields.

    Args:
        kind: stage of the config.
        values: field -> value, for all fields.
        given: names of the fields that were set explicitly.

    Returns:
        Field -> value, with the parts of the algorithm and its defaults for fields that were not set.

    Raises:
        ConfigError: an unknown algorithm, or a field with a value that contradicts it.
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
    for part, wanted in row.parts.items():
        if part in given and values[part] != wanted:
            raise ConfigError(
                f"{part} = {values[part]!r} with algorithm = {name!r}, which sets {part} = {wanted!r}: remove one of "
                "the two."
            )
    return {**values, **{k: v for k, v in row.defaults.items() if k not in given}, **row.parts}
