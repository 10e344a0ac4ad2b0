"""Losses of TRL's trainers on one batch, as JSON: run by test_trl_parity.py in TRL's own virtual environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

CLASSES: dict[str, tuple[Any, Any]] = {
    "dpo": (DPOConfig, DPOTrainer),
    "kto": (KTOConfig, KTOTrainer),
    "cpo": (CPOConfig, CPOTrainer),
    "orpo": (ORPOConfig, ORPOTrainer),
    "reward": (RewardConfig, RewardTrainer),
    "sft": (SFTConfig, SFTTrainer),
}


def logs(folder: Path, case: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The logs of one step at a learning rate of 0, and of an evaluation on the same rows where there is one."""
    config, trainer = CLASSES[case["trainer"]]
    shared: dict[str, Any] = {
        "output_dir": str(folder / "out"), "max_steps": 1, "learning_rate": 0.0, "use_cpu": True, "bf16": False,
        "per_device_train_batch_size": len(rows), "report_to": "none", "logging_steps": 1, "save_strategy": "no",
        "disable_tqdm": True, "gradient_checkpointing": False,
    }  # fmt: skip
    args = config(**{**shared, **case["config"]})
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    models: dict[str, Any] = {}
    if case["trainer"] == "reward":
        models["model"] = AutoModelForSequenceClassification.from_pretrained(folder / "reward")
    else:
        models["model"] = AutoModelForCausalLM.from_pretrained(folder / "policy")
    if case["trainer"] in ("dpo", "kto"):
        models["ref_model"] = AutoModelForCausalLM.from_pretrained(folder / "reference")
    if case["config"].get("eval_strategy"):
        models["eval_dataset"] = Dataset.from_list(rows)
    made = trainer(**models, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    made.train()
    return made.state.log_history


def main(folder: Path) -> None:
    """Read cases, write losses and logs."""
    given = json.loads((folder / "cases.json").read_text())
    found = {name: logs(folder, case, given["rows"][case["rows"]]) for name, case in given["cases"].items()}
    losses = {name: next(log["loss"] for log in history if "loss" in log) for name, history in found.items()}
    (folder / "losses.json").write_text(json.dumps(losses))
    (folder / "logs.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
