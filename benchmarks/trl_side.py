"""The TRL worker: runs in TRL's own virtual environment (see requirements-trl.txt)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import trl
from common import LORA, RolloutRecorder, Scorer, grpo_task, serve
from datasets import Dataset
from peft import LoraConfig
from texts import BLOCK_TOKENS, Text, TextRecorder, blocks_per_step, text_rows
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling


def _rollout_scorer(trainer: GRPOTrainer) -> Scorer:
    """Logprobs as TRL's GRPO loss computes them: left-padded prompts, right-padded completions, one batch."""

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


def _text_scorer(trainer: Any, collate: Callable[[Any], Mapping[str, Any]]) -> Scorer:
    """Logprobs as TRL's SFT and DPO losses compute them: one batch as `collate` lays it out, the fused head."""

    def score(pairs: Sequence[Mapping[str, Any]]) -> list[list[float]]:
        texts = [(p["prompt_ids"], p["completion_ids"]) for p in pairs]
        batch = collate([_example(prompt, completion) for prompt, completion in texts])
        with torch.no_grad():
            logprobs = trainer.model_wrapped(**batch, use_cache=False, fused_lm_head=True).log_probs
        scored = logprobs[batch["labels"][:, 1:] != -100].float()
        return [part.tolist() for part in scored.split([len(completion) for _, completion in texts])]

    return score


def _shared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of every stage."""
    return {
        "output_dir": settings["output_dir"],
        "bf16": settings["autocast"],
        "gradient_checkpointing": settings["checkpointing"],
        "learning_rate": settings["learning_rate"],
        "max_steps": settings["max_steps"],
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def _model(settings: Mapping[str, Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(settings["model"], dtype=getattr(torch, settings["weights"]))


def _sizes(settings: Mapping[str, Any], per_step: int) -> tuple[int, int]:
    """Micro-batch and accumulation that make a step of `per_step`."""
    micro = min(settings["micro_batch"], per_step)
    if per_step % micro:
        raise ValueError(f"micro_batch = {micro} does not divide a step of {per_step}")
    return micro, per_step // micro


def build_grpo(settings: Mapping[str, Any]) -> tuple[GRPOTrainer, RolloutRecorder, Scorer]:
    """A GRPOTrainer at one of TRL's settings."""
    data, grade, most = grpo_task(settings)
    micro, accumulation = _sizes(settings, settings["completions"])
    recorder = RolloutRecorder(AutoTokenizer.from_pretrained(settings["model"]), settings["num_generations"], grade)
    args = GRPOConfig(
        **_shared(settings),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation,
        num_generations=settings["num_generations"],
        max_completion_length=most,
        use_transformers_continuous_batching=settings["continuous_batching"],
        cache_implementation=settings["cache"],
        shuffle_dataset=False,
        **settings.get("recipe", {}),
    )
    trainer = GRPOTrainer(
        model=_model(settings),
        reward_funcs=recorder.reward,
        args=args,
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(settings["model"], padding_side="left"),
    )
    return trainer, recorder, _rollout_scorer(trainer)


def _example(prompt: list[int], completion: list[int]) -> dict[str, list[int]]:
    """A row as TRL's SFT prepares it: only the completion has labels."""
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}


def _packed(data: Sequence[Mapping[str, str]], tokenizer: Any, settings: Mapping[str, Any]) -> Dataset:
    """TRL's blocks of each step's rows; it would pack across steps, and burnish's steps have these rows."""
    examples = []
    for row in data:
        prompt, completion = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        examples.append(_example(prompt, [*completion, tokenizer.eos_token_id]))
    blocks = pack_dataset(Dataset.from_list(examples), BLOCK_TOKENS, "bfd", {"batch_size": settings["rows"]})
    if len(blocks) != settings["max_steps"] * blocks_per_step(settings["rows"]):
        raise RuntimeError(f"TRL packed {settings['max_steps']} steps into {len(blocks)} blocks: see texts.num_blocks")
    return blocks


def _sft_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options of SFTConfig for one layout of rows."""
    match settings["layout"]:
        case "padded":
            return {}
        case "padding_free":
            return {"padding_free": True, "max_length": None}
        case "packed":
            return {
                "packing": True,
                "packing_strategy": "bfd",
                "max_length": BLOCK_TOKENS,
                "dataset_kwargs": {"skip_prepare_dataset": True},
            }
        case other:
            raise ValueError(f"unknown layout {other!r}")


def _read_sft(batch: Mapping[str, Any]) -> list[Text]:
    """Rows of a batch: one each, or one after another with positions that restart."""
    if "attention_mask" in batch:
        lengths = batch["attention_mask"].sum(1).tolist()
        pieces = [(ids[:n], own[:n]) for ids, own, n in zip(batch["input_ids"], batch["labels"], lengths, strict=True)]
    else:
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        edges = [*(batch["position_ids"][0] == 0).nonzero()[:, 0].tolist(), len(ids)]
        pieces = [(ids[start:end], labels[start:end]) for start, end in pairwise(edges)]
    texts: list[Text] = []
    for ids, labels in pieces:
        prompt = int((labels == -100).sum())
        texts.append((ids[:prompt].tolist(), [ids[prompt:].tolist()]))
    return texts


def _read_dpo(batch: Mapping[str, Any]) -> list[Text]:
    """Pairs of a batch: all chosen, then all rejected sequences."""
    totals = batch["attention_mask"].sum(1).tolist()
    prompts = (batch["attention_mask"] - batch["completion_mask"]).sum(1).tolist()
    ids, half = batch["input_ids"].tolist(), len(totals) // 2
    return [(ids[i][: prompts[i]], [ids[j][prompts[j] : totals[j]] for j in (i, half + i)]) for i in range(half)]


def build_sft(settings: Mapping[str, Any]) -> tuple[SFTTrainer, TextRecorder, Scorer]:
    """An SFTTrainer at one of TRL's settings."""
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    data, packed = text_rows(settings, tokenizer), settings["layout"] == "packed"
    micro, accumulation = _sizes(settings, blocks_per_step(settings["rows"]) if packed else settings["rows"])
    args = SFTConfig(
        **_shared(settings),
        **_sft_options(settings),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
    )
    trainer = SFTTrainer(
        model=_model(settings),
        args=args,
        train_dataset=_packed(data, tokenizer, settings) if packed else Dataset.from_list(data),
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA) if settings["lora"] else None,
    )
    return trainer, TextRecorder(trainer, _read_sft), _text_scorer(trainer, trainer.data_collator)


def build_dpo(settings: Mapping[str, Any]) -> tuple[DPOTrainer, TextRecorder, Scorer]:
    """A DPOTrainer at one of TRL's settings."""
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    micro, accumulation = _sizes(settings, settings["rows"])
    args = DPOConfig(
        **_shared(settings),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        precompute_ref_log_probs=settings["precompute"],
        train_sampling_strategy="sequential",
    )
    trainer = DPOTrainer(
        model=_model(settings),
        args=args,
        train_dataset=Dataset.from_list(text_rows(settings, tokenizer)),
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA) if settings["lora"] else None,
    )
    # DPO's own collator pads on the right as this one does; it takes pairs only.
    collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
    return trainer, TextRecorder(trainer, _read_dpo), _text_scorer(trainer, collate)


if __name__ == "__main__":
    serve({"grpo": build_grpo, "sft": build_sft, "dpo": build_dpo}, versions={"trl": trl.__version__})
