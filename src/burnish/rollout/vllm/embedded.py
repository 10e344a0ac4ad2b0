"""vLLM inside the trainer's process: started from a configuration, handed tensors, asked with token ids."""

from __future__ import annotations

import copy
import gc
import importlib
import importlib.metadata
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from packaging.version import Version
from torch import Tensor

from burnish.errors import ConfigError, EngineError
from burnish.model.scoring import causal_lm
from burnish.rollout.vllm.weights import has_adapters, lora_slot

__all__ = ["EmbeddedLLM", "EmbeddedOptions", "check_embedding", "undisturbed"]

_VERSION = "0.32"
"""Oldest vLLM whose workers reload weights from tensors as is done here."""

_SERVER = 'set vllm_mode = "server" and start one with `burnish serve MODEL`, which has an environment of its own'

_ELSEWHERE = f"Sample with the native engine (use_vllm = false), or {_SERVER}."

_BATCHED_TOKENS = 4096
"""Tokens of a forward, which bound its activations: vLLM's default for large GPUs leaves too little to the trainer."""

_NEEDED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
_DEFAULTS = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
"""Variables that vLLM reads at its start."""
_OWN_VARIABLES = ("LD_PRELOAD", "LOCAL_WORLD_SIZE")
"""Variables that vLLM sets for its own workers."""


@dataclass(frozen=True, slots=True)
class EmbeddedOptions:
    """Settings of vLLM in the trainer's process, with the meaning of TRL's `vllm_*` fields.

    Attributes:
        gpu_memory_utilization: fraction of the device's memory for weights, activations and cache.
        tensor_parallel_size: processes that hold one copy of the weights together.
        max_model_length: most tokens of a prompt with its completion; None for what model and memory allow.
        model_impl: as vLLM's.
        enable_sleep_mode: whether memory is freed between rollouts, where the device can.
        max_sequences: completions that run together.
    """

    gpu_memory_utilization: float = 0.3
    tensor_parallel_size: int = 1
    max_model_length: int | None = None
    model_impl: str = "vllm"
    enable_sleep_mode: bool = False
    max_sequences: int = 256


def check_embedding(tensor_parallel_size: int, processes: int) -> None:
    """Check, without importing it, that vLLM can run in the processes of this run.

    Args:
        tensor_parallel_size: processes that share one copy of the weights.
        processes: processes that train together.

    Raises:
        ConfigError: vLLM is missing or too old, or the processes do not divide into groups.
    """
    found = 'use_vllm = True with vllm_mode = "colocate" runs vLLM in the trainer\'s process'
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(
            f"{found}, and it is not installed there: pip install 'vllm>={_VERSION}' into this environment (on a CPU, "
            f"`make vllm` builds one), or {_SERVER}."
        ) from error
    if Version(version) < Version(_VERSION):
        raise ConfigError(f"{found}, which needs vLLM {_VERSION} or newer, not {version}: update it, or {_SERVER}.")
    if processes % tensor_parallel_size:
        fitting = [size for size in range(1, processes + 1) if processes % size == 0]
        raise ConfigError(
            f"vllm_tensor_parallel_size = {tensor_parallel_size} with {processes} training processes: each group of "
            f"them holds one copy of the weights; use {' or '.join(map(str, fitting))}, or start the run with a "
            f"multiple of {tensor_parallel_size} processes (torchrun --nproc-per-node)."
        )


class EmbeddedLLM:
    """A `vllm.LLM` in this process, whose weights are the trainer's once they are loaded.

    It starts with random weights from the model's configuration, so that nothing is read from disk. Each of several
    processes has one of its own; with tensor parallelism consecutive processes form one, and must make the same calls.
    The trainer's random generators, environment and process group are left as they were.

    Args:
        model: the model being trained: its configuration, dtype and adapters.
        tokenizer: the trainer's, which vLLM decodes stop strings with.
        options: see `EmbeddedOptions`.
        processes: processes that train together.

    Raises:
        EngineError: vLLM does not start.
    """

    def __init__(self, model: Any, tokenizer: Any, options: EmbeddedOptions, *, processes: int = 1) -> None:
        lm = causal_lm(model)
        self._folder = tempfile.TemporaryDirectory(prefix="burnish-vllm-")
        self._owns_group = not torch.distributed.is_initialized()
        self.options, self._adapters, self._adapter = options, 0, None
        with undisturbed():
            try:
                self._vllm = importlib.import_module("vllm")
                self.is_cpu: bool = importlib.import_module("vllm.platforms").current_platform.is_cpu()
                self._llm: Any = self._vllm.LLM(**self._arguments(model, lm, tokenizer, processes))
            except Exception as error:
                self._clean_up()
                raise EngineError(
                    f"vLLM does not start in the trainer's process: {_reason(error)}. If it is memory, change "
                    f"vllm_gpu_memory_utilization = {options.gpu_memory_utilization:g}, a fraction of the device's, or "
                    f"lower vllm_max_model_length = {options.max_model_length}. {_ELSEWHERE}"
                ) from error
        self.max_model_length = int(self._llm.llm_engine.vllm_config.model_config.max_model_len)
        self.sleeps = options.enable_sleep_mode and not self.is_cpu
        self.is_loaded = False
        """Whether it holds the base's weights: not before the first load, nor after sleeping."""
        self.is_asleep = False

    def _arguments(self, model: Any, lm: Any, tokenizer: Any, processes: int) -> dict[str, Any]:
        folder, options = self._folder.name, self.options
        config = copy.deepcopy(lm.config)
        config.architectures = [type(lm).__name__]
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        arguments: dict[str, Any] = {
            "model": folder,
            "load_format": "dummy",
            "dtype": str(lm.dtype).removeprefix("torch."),
            "seed": 0,
            # Of the distribution that is sampled from, with no sampling defaults of the model.
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",
            "gpu_memory_utilization": options.gpu_memory_utilization,
            "tensor_parallel_size": options.tensor_parallel_size,
            "max_model_len": options.max_model_length or -1,
            "model_impl": options.model_impl,
            "enable_sleep_mode": options.enable_sleep_mode and not self.is_cpu,
            "max_num_seqs": options.max_sequences,
            "max_num_batched_tokens": _BATCHED_TOKENS,
        }
        if self.is_cpu:
            # Compiling takes minutes. A seeded prompt that is prefilled in parts ends the engine (vLLM 0.32): a CPU's
            # generator has no offset to set back.
            arguments |= {"enforce_eager": True, "enable_chunked_prefill": False, "max_num_batched_tokens": None}
        if processes > 1:
            arguments["distributed_executor_backend"] = "external_launcher"
        if has_adapters(model):
            ranks = [max([c.r, *(c.rank_pattern or {}).values()]) for c in model.peft_config.values()]
            arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": lora_slot(max(ranks))}
        return arguments

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Load the base's weights, waking the memory they go to; adapters and cached prompts are forgotten.

        Args:
            weights: every tensor of a checkpoint, by name, on any device.

        Raises:
            EngineError: vLLM does not take them.
        """
        if self.is_asleep:
            torch.cuda.empty_cache()  # vLLM maps its memory beside torch's allocator, which may hold all that is free
            self._llm.wake_up(tags=["weights"])
        try:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
            if self.is_cpu:
                self._llm.apply_model(_pack_tied_head)
        except (AssertionError, KeyError, RuntimeError, ValueError) as error:
            raise EngineError(f"vLLM does not take the trainer's weights: {_reason(error)}. {_ELSEWHERE}") from error
        if self.is_asleep:
            self._llm.wake_up(tags=["kv_cache"])
        self.is_loaded, self.is_asleep, self._adapter = True, False, None
        if not self._llm.reset_prefix_cache():
            raise EngineError("vLLM keeps keys and values of the old weights: its prefix cache cannot be reset.")

    def load_adapter(self, name: str, folder: str) -> None:
        """Load LoRA adapters from a folder in place of those before, and sample with them.

        Args:
            name: new for each version, since prompts are cached under it.
            folder: as peft saves them.

        Raises:
            EngineError: vLLM does not take them.
        """
        engine = self._llm.llm_engine
        if self._adapter is not None:
            engine.remove_lora(self._adapter.lora_int_id)
        self._adapters, self._adapter = self._adapters + 1, None
        request = importlib.import_module("vllm.lora.request").LoRARequest(name, self._adapters, folder)
        try:
            engine.add_lora(request)
        except (RuntimeError, ValueError) as error:
            raise EngineError(f"vLLM does not take the adapters of {name}: {_reason(error)}. {_ELSEWHERE}") from error
        self._adapter = request

    def answer(self, asked: Sequence[tuple[Sequence[int], Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """Run prompts together.

        Args:
            asked: token ids and `vllm.SamplingParams` of each prompt.

        Returns:
            Answers in the shape of `/v1/completions`, one a prompt.

        Raises:
            EngineError: vLLM failed.
        """
        if not asked:
            return []
        prompts = [{"prompt_token_ids": list(ids)} for ids, _ in asked]
        params = [self._vllm.SamplingParams(**fields) for _, fields in asked]
        with _kept_random_state():
            try:
                found = self._llm.generate(prompts, params, lora_request=self._adapter, use_tqdm=False)
            except BaseException as error:
                # Requests that were interrupted would be continued, and returned, by the next call.
                engine = self._llm.llm_engine
                engine.abort_request(list(engine.output_processor.request_states), internal=True)
                if not isinstance(error, Exception):
                    raise
                raise EngineError(f"vLLM failed: {_reason(error)}. {_ELSEWHERE}") from error
        return [_answer(output) for output in found]

    def sleep(self) -> None:
        """Free the memory of weights and cache, where the device can; `load` takes it back."""
        if self.sleeps and not self.is_asleep:
            # Level 2: the trainer has the weights, so that no copy of them is kept in the host's memory.
            self._llm.sleep(level=2)
            self.is_loaded, self.is_asleep = False, True

    def close(self) -> None:
        """Stop vLLM and free its memory."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        llm.llm_engine.engine_core.shutdown()
        self._clean_up()

    def _clean_up(self) -> None:
        if (state := sys.modules.get("vllm.distributed.parallel_state")) is not None:
            state.destroy_model_parallel()
            if self._owns_group:
                state.destroy_distributed_environment()
        self._folder.cleanup()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.'):.600}"


def _pack_tied_head(model: Any) -> None:
    """Pack a tied head again: vLLM's CPU build does so for layers that weights were loaded into, and it has none."""
    heads = importlib.import_module("vllm.model_executor.layers.vocab_parallel_embedding").ParallelLMHead
    for module in model.modules():
        if isinstance(module, heads):
            module.quant_method.process_weights_after_loading(module)


def _answer(output: Any) -> dict[str, Any]:
    """Bring a `vllm.RequestOutput` into the shape of an answer of `/v1/completions`."""
    choices: list[dict[str, Any]] = []
    for made in output.outputs:
        ids, rows = [int(token) for token in made.token_ids], made.logprobs or []
        values = [row[token].logprob for token, row in zip(ids, rows, strict=False)]
        choices.append(
            {
                "index": made.index,
                "token_ids": ids,
                "finish_reason": made.finish_reason,
                "logprobs": {"token_logprobs": values},
            }
        )
        if output.prompt_logprobs is not None:
            choices[-1]["prompt_logprobs"] = [
                row and {str(token): {"logprob": entry.logprob} for token, entry in row.items()}
                for row in output.prompt_logprobs
            ]
    return {"choices": choices}


@contextmanager
def _kept_random_state() -> Generator[None]:
    """Restore the global random generators, which vLLM seeds when it starts and draws from when it samples."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def undisturbed() -> Generator[None]:
    """Undo what a start of vLLM changes for the whole process, and for every process that it starts later."""
    variables = {name: os.environ.get(name) for name in (*_NEEDED, *_DEFAULTS, *_OWN_VARIABLES)}
    os.environ |= {**_DEFAULTS, **os.environ, **_NEEDED}
    set_num_threads = torch.set_num_threads
    with _kept_random_state(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads
            gc.unfreeze()
            for name, value in variables.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
