"""The trainer of a planned run on a model of fake tensors, and the trace of its step."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, PreTrainedTokenizerFast

from burnish.config.stages import STAGES
from burnish.errors import ConfigError
from burnish.planner.memory import Part
from burnish.planner.rollout import Wave
from burnish.planner.run import Request, Run, read_run
from burnish.rollout.engine import Engine
from burnish.training.trace import (
    Trace,
    adding_fakes,
    cut_in_two,
    fake_groups,
    fake_model,
    trace_update,
    with_values,
)
from burnish.types import Group

__all__ = ["check_traceable", "trace_request"]

_OF_ROLLOUTS = (
    "compile_rollouts",
    "rollout_cache_",
    "stop_settled",
    "max_staleness",
    "use_vllm",
    "vllm_",
    "reward_",
)
"""Beginnings of fields that say how completions are sampled and scored, which a trace does not do."""


class _NoEngine(Engine):
    """An engine that never samples: the groups of a trace are given."""

    version = 0
    last_stats: Any = None

    def generate(self, requests: Any, *, seed: int, step: int, on_progress: Any = None) -> list[Any]:
        raise AssertionError("a trace samples nothing")

    def sync(self, version: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def check_traceable(request: Request) -> None:
    """Refuse a run that cannot be traced.

    Raises:
        ConfigError: its sharding, quantisation or optimizer is not traced.
    """
    if request.ranks > 1 and request.sharding != "ddp":
        raise ConfigError(
            f"--trace with --sharding = {request.sharding!r}: burnish trains with DDP; use ddp, or leave --trace out."
        )
    run = read_run(request)
    if run.method.bits == 8:
        raise ConfigError("--trace with quantization_config = 'int8': only 4-bit products are traced; use 'nf4'.")
    if run.method.optimizer_bytes != 8:
        raise ConfigError(
            f"--trace with optim = {request.training['optim']!r}: only AdamW in fp32 is traced; leave optim out, or "
            "leave --trace out."
        )


def trace_request(request: Request, *, has_values: bool = False) -> Trace:
    """Trace the largest part of a run's step.

    Args:
        request: the run.
        has_values: count a step on random weights instead, but its rollout; for a CPU.

    Raises:
        ConfigError: the run cannot be traced.
    """
    check_traceable(request)
    assert request.device.is_cpu or not has_values
    run, config = read_run(request), dict(request.model.config or {})
    fields: dict[str, Any] = {"task_type": "CAUSAL_LM" if run.has_head else "SEQ_CLS", **(request.peft or {})}
    adapters = None if request.peft is None else LoraConfig(**fields)
    scored = [_groups(run, run.largest_row)] if run.rows else None
    if scored and run.largest_row.kept:
        scored = cut_in_two(scored[0][0])
    model, fakes = fake_model(
        AutoConfig.for_model(**config),
        dtype=torch.bfloat16 if run.method.bf16 else torch.float32,
        bits=run.method.bits,
        peft_config=adapters,
        has_head=run.has_head,
    )
    mode = None if has_values else fakes
    if has_values:
        model = with_values(model)
    with _trainer(request, model, bf16=run.method.bf16, mode=mode) as trainer:
        return trace_update(
            trainer,
            _groups(run, run.largest),
            scored=scored,
            mode=mode,
            device="cpu" if request.device.is_cpu else "cuda",
            num_parts=len(run.parts) * run.accumulation,
            keeps_prompt=run.largest.kept > 0,
            wave=Wave.planned(run) if run.sampler == "native" and not has_values else None,
            ranks=run.ranks,
        )


def _groups(run: Run, part: Part) -> list[Group]:
    """Make the groups of a part; behind a kept prompt, the one group that two such pieces make."""
    if part.kept:
        shapes = [[run.completion_tokens] * (2 * part.scored // run.completion_tokens)]
    else:
        sizes = run.prompt_tokens
        groups = max((part.tokens - part.scored) // sizes, 1) if sizes else part.scored // run.completion_tokens
        each, more = divmod(part.scored // run.completion_tokens, groups)
        shapes = [[run.completion_tokens] * (each + (number < more)) for number in range(groups)]
    return [
        group
        for number, lengths in enumerate(shapes)
        for group in fake_groups(run.prompt_tokens, lengths, index=number, reads_last=not run.has_head)
    ]


@contextlib.contextmanager
def _trainer(request: Request, model: Any, *, bf16: bool = True, mode: FakeTensorMode | None = None) -> Generator[Any]:
    """Make the stage's trainer around a fake model, in a folder that is gone afterwards."""
    stage = STAGES[request.kind]
    module = import_module(f"burnish.trainers.{request.kind}")
    letters = Tokenizer(WordLevel({"<eos>": 0, "<unk>": 1, "b": 2, "c": 3}, unk_token="<unk>"))
    letters.pre_tokenizer = Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<eos>")
    tokenizer.pad_token = "<eos>"
    with tempfile.TemporaryDirectory() as folder:
        kept = {name: value for name, value in request.training.items() if not name.startswith(_OF_ROLLOUTS)}
        fields: Mapping[str, Any] = {
            **kept, "output_dir": folder, "use_cpu": True, "report_to": [], "progress": False,
            "bf16": bf16, "save_strategy": "no", "resume_from_checkpoint": None, "memory_budget": None,
            "check_memory": False,
        }  # fmt: skip
        args = getattr(module, f"{stage.name}Config")(**fields)
        row: dict[str, Any] = {"prompt": "a", "completion": "b", "label": True}
        if request.kind in ("dpo", "reward"):
            row = {"prompt": "a", "chosen": "b", "rejected": "c"}
        rows: Sequence[Mapping[str, Any]] = [row] * 1024
        given: dict[str, Any] = {"model": model, "args": args, "train_dataset": rows, "processing_class": tokenizer}
        if stage.online:
            given |= {"reward_funcs": lambda completions, **columns: [0.0] * len(completions), "engine": _NoEngine()}
        with warnings.catch_warnings(), nullcontext() if mode is None else adding_fakes(mode):
            # Copying a reference asks each tensor for its data pointer.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            trainer = getattr(module, f"{stage.name}Trainer")(**given)
        yield trainer
