"""Time and memory of one SFT or DPO optimizer step, burnish against TRL, in pairs: see README.md.

Usage: python benchmarks/offline_step.py sft|dpo [--quick] [--sweep]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from driver import GIB, WORK, Benchmark, Comparison, drive, medians

_SFT = {
    "layout": "padded", "autocast": True, "weights": "float32", "checkpointing": False, "micro_batch": 8, "lora": False
}  # fmt: skip
_PURE = {"autocast": False, "weights": "bfloat16"}
_FREE = _SFT | {"layout": "padding_free", "micro_batch": 32}
_PACKED = _SFT | {"layout": "packed", "micro_batch": 1}

SFT_SETTINGS: dict[str, dict[str, Any]] = {
    "default": _SFT | {"checkpointing": True},
    "padded-autocast": _SFT,
    "padded-autocast-micro16": _SFT | {"micro_batch": 16},
    "padded-bf16": _SFT | _PURE,
    "padded-bf16-micro16": _SFT | _PURE | {"micro_batch": 16},
    "padding-free-autocast": _FREE,
    "padding-free-autocast-micro8": _FREE | {"micro_batch": 8},
    "padding-free-bf16": _FREE | _PURE,
    "padding-free-bf16-micro8": _FREE | _PURE | {"micro_batch": 8},
    "packed-autocast": _PACKED,
    "packed-bf16": _PACKED | _PURE,
    "packed-bf16-lora": _PACKED | _PURE | {"lora": True},
}
"""A micro-batch counts rows; of the packed layout it counts blocks of 1,024 tokens."""

_DPO = {
    "autocast": True, "weights": "float32", "checkpointing": False, "micro_batch": 16, "precompute": False,
    "lora": False,
}  # fmt: skip

_PER_STEP: dict[str, dict[str, Any]] = {
    "autocast": _DPO,
    "autocast-micro4": _DPO | {"micro_batch": 4},
    "bf16": _DPO | _PURE,
    "bf16-micro4": _DPO | _PURE | {"micro_batch": 4},
}
_PRECOMPUTED = {f"{name}-precomputed": setting | {"precompute": True} for name, setting in _PER_STEP.items()}
_LORA = {f"{name}-lora": _PER_STEP[name] | {"lora": True} for name in ("bf16", "bf16-micro4")}
DPO_SETTINGS = _PER_STEP | _PRECOMPUTED | _LORA
"""A micro-batch counts pairs."""

_MEDIANS = ("seconds", "cpu_seconds", "unique_tokens", "padded_tokens", "scored_tokens", "computed_tokens")


def shared(options: argparse.Namespace, workload: str, steps: int) -> dict[str, Any]:
    """Settings of both sides; every step gets rows that no step before it saw."""
    return {"model": str(WORK / "ends"), "learning_rate": 1e-6, "max_steps": steps}


def summary(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Medians over steps, and the highest memory peak."""
    return medians(_MEDIANS, "unique_tokens", steps)


def describe(found: Mapping[str, float]) -> str:
    """One side's medians in a line."""
    return (
        f"{found['seconds']:.1f} s, {found['unique_tokens']:.0f} tokens ({found['scored_tokens']:.0f} scored, "
        f"{found['padded_tokens']:.0f} padded, {found['computed_tokens']:.0f} computed), "
        f"{found['seconds_per_1000_unique_tokens']:.2f} s/1000 tokens, {found['peak_rss_bytes'] / GIB:.2f} GiB"
    )


def _benchmark(stage: str, comparisons: Mapping[str, Comparison], **own: Any) -> Benchmark:
    return Benchmark(
        stage=stage,
        out=f"{stage}_step.json",
        comparisons=comparisons,
        by_default=tuple(comparisons),
        size="rows",
        same="texts",
        tokens="unique_tokens",
        sampled=False,
        summary=summary,
        describe=describe,
        shared=shared,
        **own,
    )


def _dpo(workload: str, wanted: float) -> dict[str, Comparison]:
    """One workload with the reference scored in every step, and with the reference known before."""
    return {
        workload: Comparison(workload, tuple(_PER_STEP), wanted),
        f"{workload}_precomputed": Comparison(workload, tuple(_PRECOMPUTED), wanted),
    }


_FULL = {name: setting for name, setting in SFT_SETTINGS.items() if not setting["lora"]}
_UNPADDED = tuple(name for name, setting in _FULL.items() if setting["layout"] != "padded")
_PADDED = tuple(name for name in _FULL if name not in _UNPADDED)

BENCHMARKS = {
    "sft": _benchmark(
        "sft",
        {
            "sft_uneven": Comparison("sft_uneven", _UNPADDED, 1.5),
            "sft_uneven_padded": Comparison("sft_uneven", _PADDED),
            "sft_uneven_default": Comparison("sft_uneven", ("default",), 3.0),
            "sft_uneven_lora": Comparison("sft_uneven", ("packed-bf16-lora",)),
        },
        settings=SFT_SETTINGS,
        default_size=32,
        size_help="per step",
        also_burnish=("lora",),
    ),
    "dpo": _benchmark(
        "dpo",
        _dpo("dpo_half", 2.0)
        | _dpo("dpo_three_quarters", 3.0)
        | {"dpo_half_lora": Comparison("dpo_half", tuple(_LORA))},
        settings=DPO_SETTINGS,
        default_size=16,
        size_help="pairs per step",
        also_burnish=("precompute", "lora"),
    ),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=BENCHMARKS, help="the options come after it: see `offline_step.py sft --help`")
    stage = parser.parse_args(sys.argv[1:2]).stage
    drive(BENCHMARKS[stage], __doc__, sys.argv[2:], prog=f"offline_step.py {stage}")
