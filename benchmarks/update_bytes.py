"""Live bytes of a GRPO update, burnish against TRL, on the same rows: 8 completions of a prompt in one micro-batch.

Usage: python benchmarks/update_bytes.py [--trl-python .venv-trl/bin/python]

Every storage of a forward and backward pass is counted from the operation that makes it until it is freed
(`burnish.training.ledger`, on both sides), with random bf16 weights of SmolLM2-135M's shape and of three layers of
Qwen3-0.6B, whose vocabulary has 151,936 tokens. What is counted is the peak of the update beyond weights, per unpadded
token of the micro-batch; gradients of the weights are in it on both sides. Writes `results/update_bytes.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {},
    "Qwen3-0.6B, 3 layers": {"num_hidden_layers": 3},
}
GROUP, PROMPT, COMPLETION = 8, 128, 1024
SIDES: dict[str, dict[str, dict[str, Any]]] = {
    "trl": {"checkpointed": {"gradient_checkpointing": True}},
    "burnish": {
        "checkpointed": {"gradient_checkpointing": True},
        "checkpointed, tiled": {"gradient_checkpointing": True, "mlp_tiles": 8},
    },
}
"""TRL's default, which takes less than without, and burnish's settings beside it."""
LORA = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def model_of(name: str) -> Any:
    """Make a model of random bf16 weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    table = json.loads((ROOT / "src" / "burnish" / "planner" / "known_models.json").read_text())
    config = dict(table[name.partition(",")[0]]) | MODELS[name]
    config.pop("layer_types", None)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)


def tokenizer_of() -> Any:
    """Make a tokenizer of a few words, which encodes nothing here."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>")), eos_token="<eos>"
    )
    made.pad_token = "<eos>"
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


def peak(case: Mapping[str, Any]) -> int:
    """Return the peak of an update beyond the weights, in bytes."""
    from peft import LoraConfig

    from burnish.training.ledger import Ledger

    model, adapters = model_of(case["model"]), LoraConfig(**LORA) if case["lora"] else None
    with tempfile.TemporaryDirectory() as folder:
        shared: dict[str, Any] = {
            "output_dir": folder, "use_cpu": True, "report_to": "none", "save_strategy": "no", "num_generations": GROUP,
            "per_device_train_batch_size": GROUP, "max_completion_length": COMPLETION, **case["fields"],
        }  # fmt: skip
        given: dict[str, Any] = {
            "model": model, "processing_class": tokenizer_of(), "peft_config": adapters,
            "reward_funcs": lambda completions, **columns: [0.0] * len(completions),
        }  # fmt: skip
        take_step = (_trl_step if case["side"] == "trl" else _burnish_step)(shared, given)
        ledger = Ledger()
        ledger.own("weights", [*given["trainer"].model.parameters(), *given["trainer"].model.buffers()])
        with ledger, ledger.phase() as found:
            take_step()
        return found.device_bytes - found.device["weights"]


def _burnish_step(shared: dict[str, Any], given: dict[str, Any]) -> Any:
    from burnish import GRPOConfig, GRPOTrainer
    from burnish.model.packing import pack
    from burnish.training.step import MicroBatch
    from burnish.training.trace import fake_groups

    args = GRPOConfig(bf16=True, progress=False, token_budget=10**6, **shared)
    rows = [{"prompt": "<unk>"}] * GROUP
    trainer = given["trainer"] = GRPOTrainer(args=args, train_dataset=rows, **given)
    trainer.create_optimizer()
    if args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    groups = fake_groups(PROMPT, [COMPLETION] * GROUP)
    step = trainer.stage.algorithm.begin_step(groups, is_on_policy=True)
    return lambda: trainer.training_step(trainer.model, MicroBatch(step, [pack(groups)]))


def _trl_step(shared: dict[str, Any], given: dict[str, Any]) -> Any:
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    # Weights and products in bf16 without autocast: the least that TRL takes.
    args = GRPOConfig(bf16=False, disable_tqdm=True, **shared)
    rows = Dataset.from_list([{"prompt": "<unk>"}] * GROUP)
    trainer = given["trainer"] = GRPOTrainer(args=args, train_dataset=rows, **given)
    if args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.model.train()
    inputs: dict[str, Any] = {"advantages": torch.linspace(-1, 1, GROUP)}
    inputs["num_items_in_batch"] = torch.tensor(GROUP * COMPLETION)
    for part, length in (("prompt", PROMPT), ("completion", COMPLETION)):
        inputs[f"{part}_ids"] = torch.zeros(GROUP, length, dtype=torch.long)
        inputs[f"{part}_mask"] = torch.ones(GROUP, length, dtype=torch.long)
    trainer.current_gradient_accumulation_steps = 1

    def take() -> None:
        trainer._compute_loss(trainer.model, inputs).backward()

    return take


def main() -> None:
    """Measure every setting of both sides, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", type=Path, default=ROOT / ".venv-trl" / "bin" / "python")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(peak(json.loads(options.case))))
        return
    tokens = GROUP * (PROMPT + COMPLETION)
    rows: list[dict[str, Any]] = []
    for model in MODELS:
        for lora in (False, True):
            for side, settings in SIDES.items():
                for setting, fields in settings.items():
                    case = {"side": side, "model": model, "lora": lora, "setting": setting, "fields": fields}
                    row = case | {"peak_bytes": _measured(case, options.trl_python), "tokens": tokens}
                    rows.append(row)
                    print(
                        f"{row['peak_bytes'] / tokens / 1e3:8.1f} KB a token  {row['peak_bytes'] / 1e9:6.2f} GB  "
                        f"{model}, {'LoRA' if lora else 'full'}, {side}, {setting}",
                        flush=True,
                    )
    (ROOT / "benchmarks" / "results" / "update_bytes.json").write_text(json.dumps({"cases": rows}, indent=1) + "\n")
    for model in MODELS:
        for lora in (False, True):
            least = {
                side: min(row["peak_bytes"] for row in rows
                          if (row["model"], row["lora"], row["side"]) == (model, lora, side))
                for side in SIDES
            }  # fmt: skip
            print(f"{model}, {'LoRA' if lora else 'full'}: {least['burnish'] / least['trl']:.2f} of TRL's least")


def _measured(case: Mapping[str, Any], trl_python: Path) -> int:
    python = trl_python if case["side"] == "trl" else Path(sys.executable)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [python, "-W", "ignore", __file__, "--case", json.dumps(case)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return int(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
