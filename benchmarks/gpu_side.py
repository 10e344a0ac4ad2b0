"""The workers of `gpu.py`: a trainer of either side or both samplers, on a model with random weights.

Talks as the workers of the other benchmarks do (`common.py`), and adds what a GPU's allocator held.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from importlib import metadata
from typing import Any

import torch
from common import LORA, Channel, Recorder, StepGate
from gpu_model import completion_ids, prompt_rows, random_model, word_tokenizer
from peft import LoraConfig
from transformers import TrainingArguments

CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
PROBE_BYTES = 2**28


class Device:
    """What is asked of the device; on a CPU nothing is known of its memory."""

    def __init__(self, name: str, cap_bytes: float | None) -> None:
        self.name, self.is_gpu = name, name == "cuda"
        self.cap_enforced: bool | None = None
        if self.is_gpu and cap_bytes is not None:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(cap_bytes / total)
            self.cap_enforced = self._refuses(int(cap_bytes) + PROBE_BYTES)

    def _refuses(self, size: int) -> bool:
        """Ask for more than the cap, which must fail: else nothing that follows means anything."""
        try:
            torch.empty(size, dtype=torch.uint8, device="cuda")
        except torch.cuda.OutOfMemoryError:
            return True
        finally:
            torch.cuda.empty_cache()
        return False

    def begin(self) -> None:
        """Wait for the device, and let its allocator forget the last peak."""
        if self.is_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def memory(self) -> dict[str, int | None]:
        """Return the peaks of the allocator, what the process holds beside it, and what is in use on the device."""
        names = ("max_allocated_bytes", "max_reserved_bytes", "reserved_bytes", "used_bytes")
        if not self.is_gpu:
            return dict.fromkeys(names)
        free, total = torch.cuda.mem_get_info()
        values = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), torch.cuda.memory_reserved())
        return dict(zip(names, (*values, total - free), strict=True))

    def wait(self) -> None:
        """Wait until everything that was asked of the device is done."""
        if self.is_gpu:
            torch.cuda.synchronize()


class StepRecorder(Recorder):
    """Measures a step; its `reward` is the reward function of both sides and takes down what it sees."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        self.lengths: list[int] = []
        self.seen: list[list[int]] = []
        self.reward_began = 0.0

    def start(self) -> None:
        """Begin a step: forget the last one."""
        self.lengths, self.seen, self.reward_began = [], [], 0.0
        self.device.begin()
        self.cpu_started, self.started = time.process_time(), time.perf_counter()

    def reward(self, completions: Any, completion_ids: Any, **_: Any) -> list[float]:
        """Reward by tokens, so that a group's rewards differ."""
        self.reward_began = self.reward_began or time.perf_counter()
        self.seen += [list(ids) for ids in completion_ids]
        return [(sum(ids) + 7 * number) % 97 / 97 for number, ids in enumerate(completion_ids)]

    def finish(self) -> dict[str, Any]:
        """End the step: its seconds, its memory, and a hash of its completions, whatever their order."""
        self.device.wait()
        now = time.perf_counter()
        rows = sha256("".join(sorted(map(str, self.seen))).encode()).hexdigest()[:16]
        return {
            "seconds": now - self.started,
            "cpu_seconds": time.process_time() - self.cpu_started,
            "rollout_seconds": self.reward_began - self.started,
            "completions": len(self.seen),
            "completion_tokens": sum(map(len, self.seen)),
            "rows": rows,
            **self.device.memory(),
        }


class FixedRollouts:
    """The completions of each rollout in turn: short ones first, which compile and allocate what later steps need."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings, self.calls = settings, 0

    def __call__(self, count: int) -> list[list[int]]:
        """Return the completions of the next rollout."""
        settings, call = self.settings, self.calls
        self.calls += 1
        is_short = call < settings["short_steps"]
        length = max(settings["completion"] // 16, 8) if is_short else settings["completion"]
        return completion_ids(settings["config"]["vocab_size"], length, call=call, count=count)


def shared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of both sides."""
    return {
        "output_dir": settings["output_dir"],
        "max_completion_length": settings["completion"],
        "num_generations": settings["num_generations"],
        "learning_rate": 1e-6,
        "max_steps": 100,
        "shuffle_dataset": False,
        "use_cpu": settings["device"] == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def burnish_trainer(settings: Mapping[str, Any], model: Any, recorder: StepRecorder) -> Any:
    """Build burnish's GRPOTrainer: on fixed completions, or with its own engine."""
    from burnish import Completion, GRPOConfig, GRPOTrainer
    from burnish.rollout import Engine
    from burnish.types import StopReason

    class FixedEngine(Engine):
        """An engine that has its completions ready; log-probabilities are unknown, so nothing is compared."""

        def __init__(self) -> None:
            self.rollouts = FixedRollouts(settings)

        def generate(self, requests: Sequence[Any], *, seed: int, step: int) -> list[list[Completion]]:
            rows = iter(self.rollouts(sum(request.num_samples for request in requests)))
            return [
                [Completion(next(rows), stop_reason=StopReason.LENGTH) for _ in range(request.num_samples)]
                for request in requests
            ]

        def sync(self, version: int) -> None:
            """Do nothing."""

        def close(self) -> None:
            """Do nothing."""

    fields = {
        CHECKPOINTING if name == "gradient_checkpointing" else name: v for name, v in settings["training"].items()
    }
    vocab_size = settings["config"]["vocab_size"]
    return GRPOTrainer(
        model=model,
        reward_funcs=recorder.reward,
        args=GRPOConfig(**shared(settings), bf16=True, progress=False, **fields),
        train_dataset=prompt_rows(vocab_size, settings["prompt"]),
        processing_class=word_tokenizer(vocab_size),
        peft_config=LoraConfig(**LORA) if settings["lora"] else None,
        engine=FixedEngine() if settings["fixed"] else None,
    )


def trl_trainer(settings: Mapping[str, Any], model: Any, recorder: StepRecorder) -> Any:
    """Build TRL's GRPOTrainer on the same completions."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    training, vocab_size = dict(settings["training"]), settings["config"]["vocab_size"]
    completions, micro = training.pop("completions"), training.pop("micro_batch")
    tokenizer, rollouts = word_tokenizer(vocab_size), FixedRollouts(settings)

    def roll_out(prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        return {"prompt_ids": ids, "completion_ids": rollouts(len(prompts)), "logprobs": None}

    return GRPOTrainer(
        model=model,
        reward_funcs=recorder.reward,
        args=GRPOConfig(
            **shared(settings),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=completions // micro,
            steps_per_generation=completions // micro,
            **training,
        ),
        train_dataset=Dataset.from_list(prompt_rows(vocab_size, settings["prompt"])),
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA) if settings["lora"] else None,
        rollout_func=roll_out,
    )


def train(channel: Channel, settings: Mapping[str, Any], device: Device, began: float) -> None:
    """Train one step for each command."""
    side = settings["side"]
    dtype = getattr(torch, settings.get("weights", "bfloat16"))
    model = random_model(settings["config"], quantized=settings["quantized"], device=device.name, dtype=dtype)
    recorder = StepRecorder(device)
    trainer = {"burnish": burnish_trainer, "trl": trl_trainer}[side](settings, model, recorder)
    trainer.add_callback(StepGate(channel, recorder, lambda pairs: [], lambda folder: None))
    parameters = list(trainer.model.parameters())
    channel.send(
        {
            "versions": {name: metadata.version(name) for name in ("torch", "transformers", "accelerate", "peft")},
            "start_seconds": time.perf_counter() - began,
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in parameters}),
            "cap_enforced": device.cap_enforced,
            **device.memory(),
        }
    )
    trainer.train()
    raise RuntimeError("the data set ended before the benchmark did")


def samplers(settings: Mapping[str, Any]) -> dict[str, Callable[[list[list[int]], int, int], list[list[int]]]]:
    """Build burnish's native engine and transformers' `generate`, each with a model of its own."""
    from burnish.rollout import NativeEngine, Request, SamplingParams

    vocab_size = settings["config"]["vocab_size"]
    models = [random_model(settings["config"], quantized=False, device=settings["device"]) for _ in range(2)]
    engine, calls = NativeEngine(models[0], word_tokenizer(vocab_size)), iter(range(10**6))

    def native(prompts: list[list[int]], samples: int, length: int) -> list[list[int]]:
        requests = [Request(p, samples, SamplingParams(length), index=index) for index, p in enumerate(prompts)]
        return [c.token_ids for group in engine.generate(requests, seed=0, step=next(calls)) for c in group]

    def generate(prompts: list[list[int]], samples: int, length: int) -> list[list[int]]:
        models[1].generation_config.eos_token_id = None
        ids = torch.tensor(prompts, device=settings["device"])
        made = models[1].generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
            max_new_tokens=length, num_return_sequences=samples, pad_token_id=0,
        )  # fmt: skip
        return made[:, ids.shape[1] :].tolist()

    return {"native": native, "generate": generate}


def sample(channel: Channel, settings: Mapping[str, Any], device: Device, began: float) -> None:
    """Sample with the engine that each command names."""
    engines = samplers(settings)
    tokenizer = word_tokenizer(settings["config"]["vocab_size"])
    rows = prompt_rows(settings["config"]["vocab_size"], settings["prompt"])[: settings["prompts"]]
    prompts = [list(tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]) for row in rows]
    channel.send({"start_seconds": time.perf_counter() - began, **device.memory()})
    while (command := channel.receive())["command"] == "sample":
        gc.collect()
        if device.is_gpu:
            torch.cuda.empty_cache()
        device.begin()
        started = time.perf_counter()
        completions = engines[command["engine"]](prompts, settings["num_generations"], command["tokens"])
        device.wait()
        seconds = time.perf_counter() - started
        channel.send({"seconds": seconds, "tokens": sum(map(len, completions)), **device.memory()})


def main() -> None:
    """Read the settings, then train or sample."""
    channel, began = Channel(), time.perf_counter()
    settings = channel.receive()
    torch.set_num_threads(settings["threads"])
    device = Device(settings["device"], settings.get("cap_bytes"))
    (sample if settings["side"] == "samplers" else train)(channel, settings, device, began)


if __name__ == "__main__":
    sys.exit(main())
