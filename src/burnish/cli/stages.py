"""What the commands share: a checked file's parts to trainers, engines and evaluations."""

from __future__ import annotations

import json
import logging
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

from burnish.cli.config import EvaluationSection
from burnish.data import encode_rows, prompt_group
from burnish.errors import ConfigError
from burnish.evaluate import Evaluation, evaluate
from burnish.model.loading import load_model, load_processing_class
from burnish.model.precision import fast_bf16
from burnish.rewards import Rubric
from burnish.rollout import SamplingParams, eos_token_ids, make_engine
from burnish.trainers import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from burnish.trainers.base import COMPLETE
from burnish.trainers.callbacks import EngineProgress, MetricsCallback

__all__ = ["environment", "evaluate_model", "last_checkpoint", "train_grpo", "train_sft"]

logger = logging.getLogger(__name__)

# Bars of transformers for single files would drown the progress of the run.
transformers.logging.disable_progress_bar()

Rows = Sequence[dict[str, Any]]


def train_sft(
    model: str, rows: Rows, training: dict[str, Any], *, eval_rows: Rows | None = None, **shared: Any
) -> SFTTrainer:
    """Fine-tune and save; `shared` is `model_init`, `peft` and `metrics` (a file), each may be left out."""
    fields: dict[str, Any] = {"model_init_kwargs": shared.get("model_init") or None, **training}
    config = SFTConfig(**fields)
    trainer = SFTTrainer(model, config, list(rows), eval_rows, peft_config=_lora(shared.get("peft")))
    return _train(trainer, shared.get("metrics"))


def train_grpo(
    model: str, rows: Rows, rubric: Rubric, training: dict[str, Any], *, eval_rows: Rows | None = None, **shared: Any
) -> GRPOTrainer:
    """Train on rewards and save; arguments as for `train_sft`."""
    fields: dict[str, Any] = {"model_init_kwargs": shared.get("model_init") or None, **training}
    config = GRPOConfig(**fields)
    trainer = GRPOTrainer(model, rubric, config, list(rows), eval_rows, peft_config=_lora(shared.get("peft")))
    return _train(trainer, shared.get("metrics"))


def _train(trainer: Any, metrics: Path | None) -> Any:
    folder = Path(trainer.args.output_dir)
    trainer.add_callback(MetricsCallback(metrics or folder / "metrics.jsonl", trainer.args.kind))
    asked = trainer.args.resume_from_checkpoint
    checkpoint = last_checkpoint(folder) if asked in (True, "True", "true") else asked
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model()
    return trainer


def last_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that was written whole, or None."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True)
    return next((path for path in found if (path / COMPLETE).is_file()), None)


def _lora(fields: dict[str, Any] | None) -> Any:
    if fields is None:
        return None
    from peft import LoraConfig

    arguments: dict[str, Any] = {"task_type": "CAUSAL_LM", **fields}
    return LoraConfig(**arguments)


def evaluate_model(
    model: str, rows: Rows, rubric: Rubric, section: EvaluationSection, *, name: str, seed: int = 0, **shared: Any
) -> Evaluation:
    """pass@k of a saved model on rows; `shared` is `model_init`, may be left out."""
    tokenizer = load_processing_class(model)
    groups = encode_rows(prompt_group, rows, tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded, _ = load_model(model, bf16=fast_bf16(device), init_kwargs=shared.get("model_init"))
    engine = make_engine(loaded.to(device), tokenizer)
    with EngineProgress(engine, f"evaluate {name}", len(groups) * section.num_samples) as shown:
        return evaluate(
            shown,
            groups,
            rubric,
            params=SamplingParams(
                max_new_tokens=section.max_completion_length,
                temperature=section.temperature,
                eos_token_ids=eos_token_ids(loaded, tokenizer),
            ),
            num_samples=section.num_samples,
            ks=section.ks,
            seed=seed,
            solved=section.solved,
            name=name,
        )


def environment() -> dict[str, Any]:
    """Versions and hardware: what a figure was measured with."""
    names = ("burnish", "torch", "transformers", "accelerate", "peft")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": torch.cpu.get_capabilities().get("cpu_name") if hasattr(torch.cpu, "get_capabilities") else None,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "bf16": fast_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "versions": {name: metadata.version(name) for name in names},
        "command": " ".join(Path(word).name if word == sys.argv[0] else word for word in sys.argv),
    }


def write_json(file: Path, value: Any) -> None:
    """Write whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".tmp")
    draft.write_text(json.dumps(value, indent=1, ensure_ascii=False, default=str), encoding="utf-8")
    draft.replace(file)


def read_json(file: Path, default: Any) -> Any:
    """What `write_json` wrote, or the default where there is no file."""
    if not file.is_file():
        return default
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not JSON ({error}); delete it to start that part over.") from error
