"""The TRL worker: runs in TRL's own virtual environment (see requirements-trl.txt)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import trl
from common import WORKLOADS, Recorder, Scorer, rows, serve
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer


def _scorer(trainer: GRPOTrainer) -> Scorer:
    """Logprobs as TRL's loss computes them: left-padded prompts, right-padded completions, one batch."""

    def score(pairs: Sequence[Mapping[str, Any]]) -> list[list[float]]:
        prompts, completions = [p["prompt_ids"] for p in pairs], [p["completion_ids"] for p in pairs]
        left, right = max(map(len, prompts)), max(map(len, completions))
        ids = torch.full((len(pairs), left + right), trainer.processing_class.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            start, end = left - len(prompt), left + len(completion)
            ids[row, start:end] = torch.tensor(prompt + completion)
            mask[row, start:end] = 1
        with torch.no_grad():
            logprobs, *_ = trainer._get_per_token_logps_and_entropies(trainer.model_wrapped, ids, mask, right)
        return [row[: len(c)].tolist() for row, c in zip(logprobs.float(), completions, strict=True)]

    return score


def build(settings: Mapping[str, Any], recorder: Recorder) -> tuple[GRPOTrainer, Scorer]:
    """A GRPOTrainer at one of TRL's settings."""
    workload, micro = WORKLOADS[settings["workload"]], min(settings["micro_batch"], settings["completions"])
    accumulation = settings["completions"] // micro
    args = GRPOConfig(
        output_dir=settings["output_dir"],
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation,
        num_generations=settings["num_generations"],
        max_completion_length=workload.max_new_tokens,
        bf16=settings["autocast"],
        gradient_checkpointing=settings["checkpointing"],
        use_transformers_continuous_batching=settings["continuous_batching"],
        cache_implementation=settings["cache"],
        learning_rate=settings["learning_rate"],
        shuffle_dataset=False,
        max_steps=settings["max_steps"],
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=getattr(torch, settings["weights"]))
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=recorder.reward,
        args=args,
        train_dataset=Dataset.from_list(rows(workload)),
        processing_class=AutoTokenizer.from_pretrained(settings["model"], padding_side="left"),
    )
    return trainer, _scorer(trainer)


if __name__ == "__main__":
    serve(build, versions={"trl": trl.__version__})
