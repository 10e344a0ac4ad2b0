"""Golden steps: weights and metrics of three steps of every trainer, to compare one state of the sources with another.

A change of structure changes no number. Run from two working trees, on one machine, and compare to the bit:

    PYTHONPATH=src python tests/golden_steps.py record before.json
    PYTHONPATH=src python tests/golden_steps.py record after.json
    python tests/golden_steps.py compare before.json after.json

Only the public trainers are used, and the files that they save, so that the script outlives what is inside. `--ranks 2`
records the same under two processes. `store` writes tests/golden_steps.json, in float64, which other machines reproduce
to rounding (`test_golden_steps.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STORED = Path(__file__).with_suffix(".json")
"""Digests in float64."""

PROMPTS = [
    {"prompt": f"{i}+{i % 7}=" + "0" * (i % 5), "answer": str(i), "difficulty": i, "weight": 1 + i % 3}
    for i in range(24)
]
ANSWERS = [{"prompt": row["prompt"], "completion": str(7 * i) * (1 + i % 3)} for i, row in enumerate(PROMPTS)]
PAIRS = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no" + "x" * (i % 4)}
    for i, row in enumerate(ANSWERS)
]
LABELLED = [{**row, "label": i % 3 != 0} for i, row in enumerate(ANSWERS)]

LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.0}
ONLINE = {
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 8,
    "temperature": 1.2,
    "logprob_check_bound": 1.0,
}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 3}
PPO = {**{k: v for k, v in ONLINE.items() if k != "num_generations"}, "num_iterations": 2, "value_prefit_steps": 1}


@dataclass(frozen=True)
class Case:
    """One short run: a trainer, its settings, full or LoRA."""

    trainer: str
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    rows: Any = None
    lora: bool = False


def _both(name: str, *arguments: Any) -> dict[str, Case]:
    return {name: Case(*arguments), f"{name}_lora": Case(*arguments, lora=True)}


CASES: dict[str, Case] = {
    **_both("sft", "SFT", EVALUATED, ANSWERS),
    **_both("reward", "Reward", EVALUATED, PAIRS),
    **_both("dpo", "DPO", EVALUATED, PAIRS),
    **_both("kto", "KTO", EVALUATED, LABELLED),
    **_both("online_dpo", "OnlineDPO", {**ONLINE, **EVALUATED}),
    **_both("grpo", "GRPO", {**ONLINE, **EVALUATED, "beta": 0.05}),
    **_both("rloo", "RLOO", {**ONLINE, "beta": 0.05}),
    **_both("ppo", "PPO", {**PPO, "beta": 0.05}),
    "sft_parts": Case(
        "SFT", {"token_budget": 32, "gradient_accumulation_steps": 2, "completion_only_loss": False}, ANSWERS
    ),
    "sft_dft": Case("SFT", {"loss_type": "dft", "neftune_noise_alpha": 5.0}, ANSWERS),
    "dpo_aot": Case("DPO", {"loss_type": ["sigmoid", "aot"], "loss_weights": [1.0, 0.5], "token_budget": 48}, PAIRS),
    "dpo_moving": Case("DPO", {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}, PAIRS),
    "dpo_known": Case(
        "DPO",
        {"precompute_ref_log_probs": True, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        PAIRS,
    ),
    "kto_apo": Case("KTO", {"loss_type": "apo_zero_unpaired", "token_budget": 48}, LABELLED),
    "dapo": Case("GRPO", {**ONLINE, "algorithm": "dapo", "max_sampling_rounds": 3, "overlong_buffer": 4}),
    "gspo": Case("GRPO", {**ONLINE, "algorithm": "gspo", "token_budget": 64}),
    "dr_grpo": Case("GRPO", {**ONLINE, "algorithm": "dr_grpo", "entropy_coef": 0.01}),
    "grpo_passes": Case(
        "GRPO", {**ONLINE, "per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 2}
    ),
    "grpo_replay": Case("GRPO", {**ONLINE, "replay_size": 4, "top_entropy_quantile": 0.5}),
    "grpo_curriculum": Case("GRPO", {**ONLINE, "prompt_sampling": "curriculum", "curriculum_target": 0.3}),
    "grpo_weighted": Case("GRPO", {**ONLINE, "prompt_sampling": "weighted", "loss_type": "sapo"}),
    "rloo_adaptive": Case("RLOO", {**ONLINE, "beta": 0.05, "kl_target": 0.01, "kl_horizon": 10}),
    "ppo_whitened": Case("PPO", {**PPO, "whiten_rewards": True, "beta": 0.05, "kl_target": 0.01, "kl_horizon": 10}),
}
"""The eight trainers, full and LoRA, and what makes a step take another way."""

RANKS = ("sft", "reward", "dpo", "kto", "online_dpo", "grpo", "grpo_lora", "dapo", "rloo", "ppo", "grpo_passes")
"""Cases that are recorded under two processes, too."""


def digits(completions: list[str], **columns: Any) -> list[float]:
    """A reward with spread: the share of digits."""
    return [sum(c.isdigit() for c in text) / 8 for text in completions]


def even(completions: list[str], **columns: Any) -> list[float]:
    """A reward that is often equal over a group, so that refills and replays happen."""
    return [float(sum(c in "02468" for c in text) > 1) for text in completions]


def run(name: str, folder: Path, dtype: str) -> dict[str, Any]:
    """Train one case, and describe what it logged and saved; None on ranks that save nothing."""
    import torch
    from peft import LoraConfig
    from transformers.utils import logging

    import burnish
    import tiny

    logging.disable_progress_bar()

    case = CASES[name]
    settings: dict[str, Any] = {
        "output_dir": str(folder / name),
        "max_steps": 3,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "progress": False,
        "seed": 7,
        **case.settings,
    }
    if "RANK" in os.environ:
        settings |= {"ddp_backend": "gloo", "per_device_train_batch_size": settings["per_device_train_batch_size"] // 2}
    model = tiny.model(dtype=getattr(torch, dtype))
    rows = PROMPTS if case.rows is None else case.rows
    keywords: dict[str, Any] = {"train_dataset": rows[:-4], "processing_class": tiny.tokenizer()}
    if "eval_strategy" in settings:
        keywords["eval_dataset"] = rows[-4:]
    if case.rows is None:
        keywords["reward_funcs"] = even if {"replay_size", "max_sampling_rounds"} & set(settings) else digits
    if case.lora:
        keywords["peft_config"] = LoraConfig(**LORA)
    config = getattr(burnish, f"{case.trainer}Config")(**settings)
    trainer = getattr(burnish, f"{case.trainer}Trainer")(model=model, args=config, **keywords)
    trainer.train()
    trainer.save_model()
    return {"logs": [_numbers(log) for log in trainer.state.log_history], "weights": _weights(folder / name)}


TIMES = ("seconds", "runtime", "per_second", "time", "flos", "memory")


def _numbers(log: dict[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in log.items()
        if isinstance(value, int | float) and not any(word in key for word in TIMES)
    }


def _weights(folder: Path) -> dict[str, dict[str, Any]]:
    """Of each saved file: a hash of its tensors, and sums that tell by how much it differs."""
    import torch
    from safetensors.torch import load_file

    found: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        tensors = [tensor.contiguous() for _, tensor in sorted(load_file(file).items())]
        wide = torch.cat([tensor.double().flatten() for tensor in tensors])
        wave = torch.cos(torch.arange(len(wide), dtype=torch.float64) * 0.7)
        digest = hashlib.sha256(b"".join(t.view(torch.uint8).numpy().tobytes() for t in tensors))
        sums = [float(v) for v in (wide.sum(), (wide * wave).sum(), wide.square().sum())]
        found[str(file.relative_to(folder))] = {"sha256": digest.hexdigest(), "sums": sums}
    return found


def differences(one: dict[str, Any], two: dict[str, Any], tolerance: float | None) -> list[str]:
    """What differs between two records of a case; with no tolerance, in any bit."""
    found: list[str] = []
    if len(one["logs"]) != len(two["logs"]):
        found.append(f"{len(one['logs'])} logs, {len(two['logs'])}")
    for number, (a, b) in enumerate(zip(one["logs"], two["logs"], strict=False)):
        # Before the first update no reward of a policy differs from its reference's but by rounding.
        tied = {"rewards/accuracies"} if tolerance and abs(a.get("rewards/margins", 1.0)) < 1e-9 else set[str]()
        for key in sorted((a.keys() | b.keys()) - tied):
            if not _same(a.get(key), b.get(key), tolerance):
                found.append(f"log {number}, {key}: {a.get(key)!r}, {b.get(key)!r}")
    for name in sorted(one["weights"].keys() | two["weights"].keys()):
        a, b = one["weights"].get(name), two["weights"].get(name)
        if a is None or b is None:
            found.append(f"{name}: {'missing' if a is None else 'there'}, {'missing' if b is None else 'there'}")
        elif tolerance is None:
            if a["sha256"] != b["sha256"]:
                found.append(f"{name}: other bits, sums {a['sums']}, {b['sums']}")
        elif not all(map(lambda x, y: _same(x, y, tolerance), a["sums"], b["sums"])):
            found.append(f"{name}: sums {a['sums']}, {b['sums']}")
    return found


def _same(a: float | None, b: float | None, tolerance: float | None) -> bool:
    if a is None or b is None:
        return a is b
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return a == b if tolerance is None else math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)


def record(names: list[str], dtype: str, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Run cases one after the other, in this process (or in each of a launcher's)."""
    import torch

    sys.path[:0] = [str(Path(__file__).parent)]
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    shared = os.environ.get("GOLDEN_FOLDER")
    with contextlib.nullcontext(shared) if shared else tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names, 1):
            started = time.monotonic()
            suffix = f"@{os.environ['WORLD_SIZE']}" if "RANK" in os.environ else ""
            results[name + suffix] = run(name, Path(folder), dtype)
            if os.environ.get("RANK", "0") == "0":
                say(f"{number}/{len(names)} {name} {time.monotonic() - started:.1f} s")
    return results


def main() -> None:
    """The command line of the docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recorder = commands.add_parser("record")
    recorder.add_argument("file", type=Path)
    recorder.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16"])
    recorder.add_argument("--ranks", default=1, type=int)
    recorder.add_argument("--only", nargs="*", default=[])
    commands.add_parser("store")
    comparer = commands.add_parser("compare")
    comparer.add_argument("files", type=Path, nargs=2)
    comparer.add_argument("--tolerance", type=float)
    options = parser.parse_args()
    if options.command == "compare":
        one, two = (json.loads(file.read_text()) for file in options.files)
        lines = [f"{name}: recorded in one file only" for name in sorted(one.keys() ^ two.keys())]
        for name in sorted(one.keys() & two.keys()):
            lines += [f"{name}: {line}" for line in differences(one[name], two[name], options.tolerance)]
        print("\n".join(lines) or f"{len(one)} cases are equal")
        raise SystemExit(1 if lines else 0)
    if options.command == "store":
        store()
        return
    if options.ranks > 1 and "RANK" not in os.environ:
        launch(sys.argv[1:], options.ranks)
        return
    results = record(options.only or list(CASES if options.ranks == 1 else RANKS), options.dtype)
    if os.environ.get("RANK", "0") == "0":
        options.file.write_text(json.dumps(results, indent=1) + "\n")


def launch(words: list[str], ranks: int) -> None:
    """Run this script's command line under several processes, which share a folder."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GOLDEN_FOLDER": folder}
        subprocess.run([sys.executable, *launcher, *words], check=True, env=environment)


def store() -> None:
    """Record what tests/golden_steps.json holds."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ranks.json"
        launch(["record", str(file), "--dtype", "float64", "--ranks", "2"], 2)
        results = {**record(list(CASES), "float64"), **json.loads(file.read_text())}
    STORED.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
