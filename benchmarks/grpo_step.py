"""Time and memory of a whole GRPO optimizer step, burnish against TRL, in pairs: see README.md.

Usage: python benchmarks/grpo_step.py [--quick] [--sweep]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from driver import GIB, WORK, Benchmark, Comparison, drive, medians

_TRL = {
    "autocast": True,
    "weights": "float32",
    "checkpointing": False,
    "micro_batch": 32,
    "cache": None,
    "continuous_batching": False,
}
_PURE = _TRL | {"autocast": False, "weights": "bfloat16"}

TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "autocast": _TRL,
    "autocast-checkpointing": _TRL | {"checkpointing": True},
    "autocast-micro8": _TRL | {"micro_batch": 8},
    "autocast-micro16": _TRL | {"micro_batch": 16},
    "bf16": _PURE,
    "bf16-checkpointing": _PURE | {"checkpointing": True},
    "bf16-micro8": _PURE | {"micro_batch": 8},
    "bf16-micro16": _PURE | {"micro_batch": 16},
    "bf16-and-autocast": _PURE | {"autocast": True},
    "bf16-static-cache": _PURE | {"cache": "static"},
    "bf16-continuous-batching": _PURE | {"continuous_batching": True},
    "fp32": _TRL | {"autocast": False},
}

_MEDIANS = ("seconds", "cpu_seconds", "rollout_seconds", "update_seconds", "completion_tokens", "longest_completion")


def shared(options: argparse.Namespace, workload: str, steps: int) -> dict[str, Any]:
    """Settings of both sides."""
    return {
        "model": str(WORK / ("endless" if workload.endswith("_fixed") else "ends")),
        "num_generations": 8,
        "learning_rate": 1e-6,
        "max_steps": 100,
    }


def summary(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Medians over steps, the share of completions cut, and the highest memory peak."""
    cut = fmean(step["truncated_completions"] / step["completions"] for step in steps)
    return medians(_MEDIANS, "completion_tokens", steps) | {"truncated_share": cut}


def describe(found: Mapping[str, float]) -> str:
    """One side's medians in a line."""
    return (
        f"{found['seconds']:.1f} s (rollout {found['rollout_seconds']:.1f}, update {found['update_seconds']:.1f}), "
        f"{found['completion_tokens']:.0f} tokens, {found['seconds_per_1000_completion_tokens']:.2f} s/1000 tokens, "
        f"{found['peak_rss_bytes'] / GIB:.2f} GiB"
    )


GRPO = Benchmark(
    stage="grpo",
    out="grpo_step.json",
    comparisons={
        "short": Comparison("short", wanted=6.0),
        "long": Comparison("long", wanted=9.0),
        "short_fixed": Comparison("short_fixed"),
        "long_fixed": Comparison("long_fixed"),
    },
    by_default=("short", "long"),
    settings=TRL_SETTINGS,
    size="completions",
    default_size=32,
    size_help="per step; 8 of each prompt",
    same="prompts",
    tokens="completion_tokens",
    sampled=True,
    summary=summary,
    describe=describe,
    shared=shared,
)

if __name__ == "__main__":
    drive(GRPO, __doc__)
