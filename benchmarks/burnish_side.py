"""The burnish worker: runs in burnish's virtual environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from common import LORA, RolloutRecorder, Scorer, grpo_task, serve
from peft import LoraConfig
from texts import Text, TextRecorder, text_rows
from transformers import AutoTokenizer

from burnish import (
    Completion,
    DPOConfig,
    DPOTrainer,
    Group,
    GRPOConfig,
    GRPOTrainer,
    SFTConfig,
    SFTTrainer,
    __version__,
)
from burnish.model.packing import pack
from burnish.model.scoring import score as score_batch


def _scorer(trainer: Any) -> Scorer:
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


def _shared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of every stage: what the two sides have in common is set, nothing else."""
    return {
        "output_dir": settings["output_dir"],
        "learning_rate": settings["learning_rate"],
        "max_steps": settings["max_steps"],
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def build_grpo(settings: Mapping[str, Any]) -> tuple[GRPOTrainer, RolloutRecorder, Scorer]:
    """A GRPOTrainer with burnish's defaults."""
    data, grade, most = grpo_task(settings)
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    recorder = RolloutRecorder(tokenizer, settings["num_generations"], grade)
    args = GRPOConfig(
        **_shared(settings),
        per_device_train_batch_size=settings["completions"],
        num_generations=settings["num_generations"],
        max_completion_length=most,
        shuffle_dataset=False,
        **settings.get("recipe", {}),
    )
    trainer = GRPOTrainer(
        model=settings["model"],
        reward_funcs=recorder.reward,
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
    )
    return trainer, recorder, _scorer(trainer)


def _read(batch: Any) -> list[Text]:
    """Rows of a micro-batch, from its packed row and the places of the groups in it."""
    texts: list[Text] = []
    for part in batch.parts:
        ids = part.input_ids[0].tolist()
        for span in part.spans:
            prompt, *completions = [ids[start : start + length] for start, length in (span.prompt, *span.completions)]
            texts.append((prompt, completions))
    return texts


def _build_texts(
    settings: Mapping[str, Any], make: type[Any], config: type[Any], **own: Any
) -> tuple[Any, TextRecorder, Scorer]:
    """A trainer with burnish's defaults, but for the tokens of one forward: as many as a block of TRL's packing has."""
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    args = config(
        **_shared(settings),
        per_device_train_batch_size=settings["rows"],
        token_budget=1024,
        train_sampling_strategy="sequential",
        **own,
    )
    trainer = make(
        model=settings["model"],
        args=args,
        train_dataset=text_rows(settings, tokenizer),
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA) if settings["lora"] else None,
    )
    return trainer, TextRecorder(trainer, _read), _scorer(trainer)


def build_sft(settings: Mapping[str, Any]) -> tuple[SFTTrainer, TextRecorder, Scorer]:
    """An SFTTrainer, to be measured."""
    return _build_texts(settings, SFTTrainer, SFTConfig)


def build_dpo(settings: Mapping[str, Any]) -> tuple[DPOTrainer, TextRecorder, Scorer]:
    """A DPOTrainer, to be measured; the reference is known before the first step where it is on TRL's side."""
    return _build_texts(settings, DPOTrainer, DPOConfig, precompute_ref_log_probs=settings["precompute"])


if __name__ == "__main__":
    serve({"grpo": build_grpo, "sft": build_sft, "dpo": build_dpo}, versions={"burnish": __version__})
