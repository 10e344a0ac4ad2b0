"""Names of TRL's constructors, fields and metrics as JSON: run by test_trl_names.py in TRL's own environment."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from transformers import TrainingArguments

STAGES = ("SFT", "Reward", "DPO", "KTO", "GRPO", "RLOO")


def default(item: Any) -> Any:
    value = item.default if item.default is not dataclasses.MISSING else item.default_factory()
    return getattr(value, "value", value)


def logged(stage: str, folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Names in the log of one step and one evaluation."""
    online = {"max_completion_length": 8, "num_generations": 2, "beta": 0.1} if stage in ("GRPO", "RLOO") else {}
    args = getattr(trl, f"{stage}Config")(
        output_dir=str(folder / "out"), max_steps=1, per_device_train_batch_size=4, per_device_eval_batch_size=4,
        use_cpu=True, bf16=False, report_to="none", logging_steps=1, save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, eval_strategy="steps", eval_steps=1, **online,
    )  # fmt: skip

    def length(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(completion) % 3) for completion in completions]

    data = Dataset.from_list(rows)
    trainer = getattr(trl, f"{stage}Trainer")(
        model=str(folder / "policy"), args=args, train_dataset=data, eval_dataset=data,
        **({"reward_funcs": length} if online else {}),
    )  # fmt: skip
    trainer.train()
    return sorted({name for log in trainer.state.log_history for name in log})


def main(folder: Path) -> None:
    rows = json.loads((folder / "rows.json").read_text())
    inherited = {item.name: default(item) for item in dataclasses.fields(TrainingArguments)}
    found: dict[str, Any] = {}
    for stage in STAGES:
        fields = {item.name: default(item) for item in dataclasses.fields(getattr(trl, f"{stage}Config"))}
        constructor = inspect.signature(getattr(trl, f"{stage}Trainer").__init__)
        found[stage] = {
            "arguments": list(constructor.parameters)[1:],
            "fields": {n: v for n, v in fields.items() if n not in inherited or inherited[n] != v},
            "metrics": logged(stage, folder, rows[stage]),
        }
    (folder / "names.json").write_text(json.dumps(found, default=str))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
