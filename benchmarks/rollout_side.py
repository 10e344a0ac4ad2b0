"""The worker of `rollouts.py`: one engine with the model in bf16, in burnish's or vLLM's virtual environment."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, Protocol

import torch
from common import Channel, cpu_seconds
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

Found = tuple[list[list[int]], dict[str, Any]]
"""Tokens of all completions, and `cache_bytes` and `forwards` of the call."""


class Sampler(Protocol):
    """An engine behind one call."""

    def __call__(
        self, prompts: Sequence[Sequence[int]], samples: int, max_new_tokens: int, *, ends: bool, seed: int
    ) -> Found:
        """Sample at temperature 1 from the whole vocabulary; without `ends` every completion has `max_new_tokens`."""
        ...


def cache_bytes_per_token(model: str) -> int:
    """Keys and values of one token in bf16."""
    config = AutoConfig.from_pretrained(model)
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    return 2 * 2 * config.num_hidden_layers * width


def native(settings: Mapping[str, Any]) -> Sampler:
    """Burnish's own engine; its time contains packing the weights, which a rollout does each time."""
    from burnish.model.loading import load_model
    from burnish.rollout import NativeEngine, Request, SamplingParams, eos_token_ids

    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    model, _ = load_model(settings["model"], bf16=True)
    engine = NativeEngine(model, tokenizer, **settings["options"])
    eos = eos_token_ids(model, tokenizer)

    def sample(prompts: Any, samples: int, max_new_tokens: int, *, ends: bool, seed: int) -> Found:
        params = SamplingParams(max_new_tokens, eos_token_ids=eos if ends else ())
        requests = [Request(prompt, samples, params, index=index) for index, prompt in enumerate(prompts)]
        groups = engine.generate(requests, seed=seed, step=0)
        stats = engine.last_stats
        found = {"cache_bytes": stats.peak_cache_bytes, "forwards": stats.forwards}
        return [completion.token_ids for group in groups for completion in group], found

    return sample


def hf(settings: Mapping[str, Any]) -> Sampler:
    """`generate` of transformers: padded rows and a DynamicCache, as TRL calls it."""
    tokenizer = AutoTokenizer.from_pretrained(settings["model"], padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.bfloat16).eval()
    eos = model.generation_config.eos_token_id

    def sample(prompts: Any, samples: int, max_new_tokens: int, *, ends: bool, seed: int) -> Found:
        torch.manual_seed(seed)
        model.generation_config.eos_token_id = eos if ends else None
        batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        out = model.generate(
            **batch, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=max_new_tokens,
            num_return_sequences=samples, return_dict_in_generate=True, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        rows = out.sequences[:, batch["input_ids"].shape[1] :].tolist()
        held = [tensor for layer in out.past_key_values.layers for tensor in (layer.keys, layer.values)]
        completions = [row[: row.index(eos) + 1] if ends and eos in row else row for row in rows]
        return completions, {"cache_bytes": sum(t.nbytes for t in held), "forwards": len(rows[0]) - 1}

    return sample


def vllm(settings: Mapping[str, Any]) -> Sampler:
    """vLLM's `LLM`, in this process unless VLLM_ENABLE_V1_MULTIPROCESSING is 1; prompts are shorter than a block."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(settings["model"], dtype="bfloat16", max_model_len=1024, seed=0, **settings["options"])
    size, per_token = llm.llm_engine.vllm_config.cache_config.block_size, cache_bytes_per_token(settings["model"])

    def sample(prompts: Any, samples: int, max_new_tokens: int, *, ends: bool, seed: int) -> Found:
        # A seed for each request would cost time; the engine's own generator goes on from call to call.
        params = SamplingParams(n=samples, max_tokens=max_new_tokens, ignore_eos=not ends, detokenize=False)
        groups = llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], params, use_tqdm=False)
        completions = [list(sample.token_ids) for group in groups for sample in group.outputs]
        rows = [
            (len(prompt), len(sample.token_ids))
            for prompt, group in zip(prompts, groups, strict=True)
            for sample in group.outputs
        ]
        longest = max(length for _, length in rows)
        # All rows start together and make a token in each forward; a row that has ended gives its blocks back.
        blocks = max(sum(-(-(p + t) // size) for p, length in rows if length >= t) for t in range(1, longest + 1))
        return completions, {"cache_bytes": blocks * size * per_token, "forwards": longest - 1}

    return sample


def main() -> None:
    """Load the engine that the settings name, then sample for each command."""
    channel = Channel()
    settings = channel.receive()
    torch.set_num_threads(settings["threads"])
    began = time.perf_counter()
    sample: Sampler = {"native": native, "hf": hf, "vllm": vllm}[settings["engine"]](settings)
    names = ("torch", "transformers", "vllm") if settings["engine"] == "vllm" else ("torch", "transformers")
    versions = {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in names}
    channel.send(
        {"versions": versions, "start_seconds": time.perf_counter() - began, "threads": torch.get_num_threads()}
    )
    while (command := channel.receive()).pop("command") == "sample":
        started, cpu_started = time.perf_counter(), cpu_seconds(os.getpid())
        completions, found = sample(**command)
        seconds, cpu = time.perf_counter() - started, cpu_seconds(os.getpid()) - cpu_started
        lengths = [len(completion) for completion in completions]
        channel.send({"seconds": seconds, "cpu_seconds": cpu, "tokens": sum(lengths), "lengths": lengths, **found})


if __name__ == "__main__":
    main()
