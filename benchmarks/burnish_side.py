"""The burnish worker: runs in burnish's virtual environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from common import WORKLOADS, Recorder, Scorer, rows, serve
from transformers import AutoTokenizer

from burnish import Completion, Group, GRPOConfig, GRPOTrainer, __version__
from burnish.model.scoring import score as score_batch
from burnish.packing import pack


def _scorer(trainer: GRPOTrainer) -> Scorer:
    """Logprobs as burnish's loss computes them: one packed row, prompts once, tiled head."""

    def score(pairs: Sequence[Mapping[str, Any]]) -> list[list[float]]:
        groups = [Group(p["prompt_ids"], [Completion(p["completion_ids"])]) for p in pairs]
        with torch.no_grad():
            values = score_batch(trainer.model_wrapped, pack(groups)).logprobs.tolist()
        made: list[list[float]] = []
        for pair in pairs:
            length = len(pair["completion_ids"])
            made.append(values[:length])
            values = values[length:]
        return made

    return score


def build(settings: Mapping[str, Any], recorder: Recorder) -> tuple[GRPOTrainer, Scorer]:
    """A GRPOTrainer with burnish's defaults: what the two sides have in common is set, nothing else."""
    workload = WORKLOADS[settings["workload"]]
    args = GRPOConfig(
        output_dir=settings["output_dir"],
        per_device_train_batch_size=settings["completions"],
        num_generations=settings["num_generations"],
        max_completion_length=workload.max_new_tokens,
        learning_rate=settings["learning_rate"],
        shuffle_dataset=False,
        max_steps=settings["max_steps"],
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=settings["model"],
        reward_funcs=recorder.reward,
        args=args,
        train_dataset=rows(workload),
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
    )
    return trainer, _scorer(trainer)


if __name__ == "__main__":
    serve(build, versions={"burnish": __version__})
