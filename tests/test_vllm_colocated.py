"""vLLM in the trainer's process: the engine on a stand-in for it, and what is refused before weights load.

The tests marked `vllm` run it for real, with the Python of .venv-vllm (`make servers`); the contract that it shares
with servers is in test_vllm_engines.py.
"""

from __future__ import annotations

import importlib.metadata
import os
import pickle
import random
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tiny
from burnish import GRPOConfig
from burnish.errors import CheckFailed, ConfigError, EngineError
from burnish.model.scoring import prepare_for_scoring
from burnish.rollout import NativeEngine, Request, SamplingParams
from burnish.rollout.validation import check_completions
from burnish.rollout.vllm import EmbeddedLLM, EmbeddedOptions, VLLMColocatedEngine, check_embedding
from burnish.rollout.vllm.weights import checkpoint_weights
from local_llm import LocalLLM
from test_vllm_config import logged, lora, trainer
from vllm_rank_worker import in_order, run_ranks
from vllm_sources import VOCAB, fresh
from vllm_sources import lora as adapted

PARAMS = SamplingParams(6, eos_token_ids=(0,))
REQUESTS = [Request([5 + i, 6, 7], 3, PARAMS, index=i) for i in range(5)]


def tokens(groups: list[Any]) -> list[list[int]]:
    return [completion.token_ids for group in groups for completion in group]


def engine(model: Any, llm: Any = None, **options: Any) -> Any:
    return VLLMColocatedEngine(model, tiny.tokenizer(), llm or LocalLLM(model), bound=1e-6, **options)


# The engine.


def test_a_sync_hands_over_the_weights_once() -> None:
    model = fresh()
    made = engine(model)
    llm = made._llm
    with pytest.raises(EngineError, match=r"generate\(\) before sync\(\)"):
        made.generate(REQUESTS, seed=1, step=0)
    assert made.sync(0)["sampling/probe/difference"] < 1e-5
    assert llm.calls == ["load", *["answer 1"] * 4]
    llm.calls.clear()
    assert made.sync(0) == {}
    assert llm.calls == []
    tiny.move(model, 1e-3)
    assert made.sync(1)["sampling/probe/moved"] > 0
    found = made.generate(REQUESTS, seed=1, step=0)
    check_completions(REQUESTS, found, vocab_size=VOCAB)
    # One request of vLLM's a group, all in one call.
    assert llm.calls == ["load", *["answer 1"] * 4, "answer 5"]
    assert tokens(made.generate(REQUESTS, seed=1, step=0)) == tokens(found)
    made.close()
    assert llm.calls[-1] == "close"


@pytest.mark.parametrize("with_adapters", [False, True])
def test_a_sleeping_vllm_gets_its_weights_back_before_it_samples(with_adapters: bool) -> None:
    """The stand-in forgets its weights when it sleeps, as vLLM does at level 2."""
    model = adapted(fresh()) if with_adapters else fresh()
    made = engine(model)
    made.sync(0)
    awake = tokens(made.generate(REQUESTS, seed=1, step=0))
    made.sleep()
    llm = made._llm
    llm.calls.clear()
    assert tokens(made.generate(REQUESTS, seed=1, step=0)) == awake
    delivered = ["load", "load_adapter"] if with_adapters else ["load"]
    assert llm.calls == [*delivered, *["answer 1"] * 4, "answer 5"]
    llm.calls.clear()
    # The same version again: only a vLLM that slept needs it.
    assert made.sync(0) == {}
    made.sleep()
    assert made.sync(0)["sampling/probe/difference"] < 1e-5
    assert llm.calls[:2] == ["sleep", "load"]
    made.close()


def test_a_vllm_that_wakes_without_its_weights_stops_the_run() -> None:
    model = fresh()
    made = engine(model)
    made.sync(0)
    made.sleep()
    made._llm.faults.add("ignore_reload")
    with pytest.raises(CheckFailed, match="log-probabilities, or the trainer's, are not finite"):
        made.generate(REQUESTS, seed=1, step=0)
    made._llm.faults.clear()
    made.generate(REQUESTS, seed=1, step=0)
    made.close()


def test_the_base_of_adapters_is_handed_over_once() -> None:
    model = adapted(fresh())
    made = engine(model)
    made.sync(0)
    for version in (1, 2):
        tiny.move(model, 0.1, seed=version)
        made.sync(version)
    assert [call for call in made._llm.calls if "load" in call] == ["load", *["load_adapter"] * 3]
    made.close()


def test_ranks_that_share_the_weights_run_the_requests_of_all() -> None:
    """Four ranks in two groups: the second group's second rank gets the last of the group's completions."""
    model, lists = fresh(), [REQUESTS[:1], REQUESTS[1:2], REQUESTS[2:3], REQUESTS[3:]]

    def gathered(rows: list[Any]) -> list[Any]:
        pickle.dumps(rows)
        return lists if isinstance(rows[0], list) else rows * 4

    told: list[Any] = []
    options = EmbeddedOptions(tensor_parallel_size=2)
    made = engine(model, LocalLLM(model, options), rank=3, gathered=gathered)
    made.sync(0)
    asked = [replace(request, on_done=lambda done: told.append(done)) for request in REQUESTS[3:]]
    found = made.generate(asked, seed=1, step=0)
    assert told == found
    assert made._llm.calls[-1] == "answer 3"
    alone = engine(model)
    alone.sync(0)
    assert tokens(found) == tokens(alone.generate(REQUESTS, seed=1, step=0))[9:]
    for one in (made, alone):
        one.close()


def test_a_mismatch_of_one_rank_stops_all() -> None:
    made = engine(fresh(), gathered=lambda rows: rows if isinstance(rows[0], bool) else [*rows, "does not sample."])
    with pytest.raises(CheckFailed, match=r"process of rank 1 does not sample\..*use_vllm = false"):
        made.sync(0)
    made.close()


def test_a_change_on_any_rank_is_delivered_by_all() -> None:
    made = engine(fresh(), gathered=lambda rows: [*rows, True] if isinstance(rows[0], bool) else rows)
    made.sync(0)
    made._llm.calls.clear()
    made.sync(0)
    assert made._llm.calls[0] == "load"
    made.close()


def test_completions_that_do_not_fit_are_refused() -> None:
    made = engine(fresh())
    made.sync(0)
    made.generate([Request([9] * 194, 1, PARAMS)], seed=0, step=0)
    with pytest.raises(ConfigError, match=r"it exceeds vLLM's 200; set vllm_max_model_length to 201, or more"):
        made.generate([Request([9] * 195, 1, PARAMS)], seed=0, step=0)
    made.close()


@pytest.mark.parametrize("kind", [*tiny.ARCHITECTURES, "tied", "adapters"])
def test_weights_have_the_names_and_forms_of_a_checkpoint(kind: str, tmp_path: Path) -> None:
    model = tiny.model("llama" if kind in ("tied", "adapters") else kind, tie_word_embeddings=kind != "adapters")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    found = checkpoint_weights(adapted(model) if kind == "adapters" else model)
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], value) for name, value in stored.items())


# What is refused before weights load, and what the fields mean.


def test_vllm_must_be_installed_before_weights_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match=r'vllm_mode = "colocate".*not installed there: pip install.*burnish serve'):
        trainer(tmp_path, None, model=str(tmp_path / "never-read"), vllm_mode="colocate")


@pytest.mark.parametrize(
    ("version", "size", "processes", "message"),
    [
        ("0.19.1", 1, 1, r"needs vLLM 0.32 or newer, not 0.19.1"),
        ("0.32.0+cpu", 2, 1, r"vllm_tensor_parallel_size = 2 with 1 training processes.*use 1, or.*multiple of 2"),
        ("0.40.0", 4, 6, r"vllm_tensor_parallel_size = 4 with 6.*use 1 or 2 or 3 or 6"),
        ("0.40.0", 2, 6, None),
    ],
)
def test_processes_and_versions_are_checked(
    version: str, size: int, processes: int, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    if message is None:
        check_embedding(size, processes)
        return
    with pytest.raises(ConfigError, match=message):
        check_embedding(size, processes)


COLOCATE: dict[str, Any] = {"use_vllm": True, "vllm_mode": "colocate"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vllm_model_impl": "transformers"}, r'vllm_model_impl = "transformers" with.*use "vllm"'),
        ({"vllm_gpu_memory_utilization": 1.5}, "vllm_gpu_memory_utilization = 1.5"),
        ({"vllm_tensor_parallel_size": 0}, "vllm_tensor_parallel_size = 0"),
        ({"vllm_max_model_length": 0}, "vllm_max_model_length = 0"),
    ],
)
def test_fields_that_cannot_work_are_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GRPOConfig(**COLOCATE, **fields)


def test_sampling_ahead_of_training_needs_servers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'max_staleness = 1: vLLM samples in.*vllm_mode = "server"'):
        trainer(tmp_path, None, vllm_mode="colocate", max_staleness=1)


def test_any_number_of_stop_strings_is_taken() -> None:
    assert GRPOConfig(**COLOCATE, stop=list("abcde")).stop == list("abcde")


def test_grpo_samples_and_sleeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer starts vLLM as its fields say, and lets it sleep after every rollout and evaluation."""
    started: list[LocalLLM] = []

    def start(model: Any, tokenizer: Any, options: EmbeddedOptions, *, processes: int) -> LocalLLM:
        assert processes == 1
        started.append(LocalLLM(model, options))
        return started[-1]

    monkeypatch.setattr("burnish.stages.online.EmbeddedLLM", start)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.32.0")
    fields = {
        "vllm_gpu_memory_utilization": 0.5, "vllm_max_model_length": 64, "vllm_enable_sleep_mode": True,
        "gradient_accumulation_steps": 2,
    }  # fmt: skip
    made = trainer(tmp_path, None, vllm_mode="colocate", **fields)
    made.train()
    [llm] = started
    assert llm.options == EmbeddedOptions(0.5, 1, 64, "vllm", enable_sleep_mode=True, max_sequences=16)
    assert isinstance(made.stage.sampler.engine, VLLMColocatedEngine)
    assert [call for call in llm.calls if "1" not in call] == ["load", "answer 4", "sleep"] * 3
    assert len(logged(made, "sampling/probe/difference")) == 3
    made.stage.sampler.engine.close()


# Real vLLM in this process.


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Starts vLLM for a model; it ends with the test."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not in this environment: make servers")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    opened: list[Any] = []

    def start(model: Any, *, bound: float = 1e-6, **options: Any) -> Any:
        llm = EmbeddedLLM(model, tiny.tokenizer(), EmbeddedOptions(**options))
        opened.append(VLLMColocatedEngine(model, tiny.tokenizer(), llm, bound=bound))
        return opened[-1]

    yield start
    for made in opened:
        made.close()
    assert not torch.distributed.is_initialized()


def state_of_the_process() -> list[Any]:
    names = ["LD_PRELOAD", "LOCAL_WORLD_SIZE", "RANK", "WORLD_SIZE", "OMP_NUM_THREADS"]
    # A server that this process starts later would inherit them.
    names += ["VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS"]
    return [
        torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), torch.set_num_threads,
        torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
        [os.environ.get(name) for name in names],
    ]  # fmt: skip


@pytest.mark.vllm
def test_vllm_leaves_the_process_as_it_was(real: Any) -> None:
    model = fresh(tie_word_embeddings=True)
    before = state_of_the_process()
    made = real(model)
    assert state_of_the_process() == before
    made.sync(0)
    made.generate(REQUESTS, seed=1, step=0)
    assert state_of_the_process() == before


@pytest.mark.vllm
def test_an_interrupted_rollout_leaves_nothing_behind(real: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = real(fresh())
    made.sync(0)
    whole = tokens(made.generate(REQUESTS, seed=1, step=0))
    engine, steps = made._llm._llm.llm_engine, 0
    step = engine.step

    def interrupted() -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.generate([Request([9, 9], 8, SamplingParams(30))], seed=3, step=7)
    assert engine.get_num_unfinished_requests() == 0
    assert tokens(made.generate(REQUESTS, seed=1, step=0)) == whole


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "gemma2", "mistral", "gpt2"])
def test_architectures_follow_the_trainer(real: Any, kind: str) -> None:
    """Tied heads too: greedy tokens are the native engine's after every change of weights."""
    sizes = {"n_embd": 64, "n_head": 2} if kind == "gpt2" else {"tie_word_embeddings": True}
    model = fresh(kind, **sizes)
    made = real(model)
    params = SamplingParams(40, temperature=0.0, eos_token_ids=(0,))
    requests = [Request([5 + i, 6, 7 + i], 2, params, index=i) for i in range(6)]
    for version in range(3):
        assert made.sync(version)["sampling/probe/difference"] < 5e-6
        native = NativeEngine(model, tiny.tokenizer()).generate(requests, seed=0, step=0)
        assert tokens(made.generate(requests, seed=0, step=0)) == tokens(native)
        tiny.move(model, 0.05, seed=version)


@pytest.mark.vllm
def test_bf16_follows_within_its_rounding(real: Any) -> None:
    model = fresh(tie_word_embeddings=True, dtype=torch.bfloat16)
    made = real(model, bound=0.01)
    for version in range(4):
        assert made.sync(version)["sampling/probe/difference"] < 0.1
        tiny.move(model, 0.3, seed=version)
    assert made._proof.agreement.followed > 0.75


@pytest.mark.vllm
@pytest.mark.parametrize("with_adapters", [False, True])
def test_weights_come_back_after_sleeping(real: Any, with_adapters: bool) -> None:
    """A CPU keeps its memory, so that the test overwrites the weights when vLLM sleeps, as a GPU would lose them."""
    model = adapted(fresh(tie_word_embeddings=True)) if with_adapters else fresh(tie_word_embeddings=True)
    made = real(model)
    llm = made._llm
    llm.sleeps = True
    made.sync(0)
    awake = tokens(made.generate(REQUESTS, seed=1, step=0))
    for version in (0, 1):
        made.sleep()
        noise = tiny.model(**{name: value for name, value in model.config.to_dict().items() if name in tiny.SIZES})
        llm._llm.wake_up()
        llm._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(checkpoint_weights(noise).items())})
        llm._llm.sleep(level=2)
        if version:
            made.sync(0)
        assert tokens(made.generate(REQUESTS, seed=1, step=0)) == awake


@pytest.mark.vllm
def test_a_vllm_that_does_not_start_says_why(real: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    with pytest.raises(EngineError, match=r"does not start.*vllm_gpu_memory_utilization = 1e-05.*use_vllm = false"):
        real(fresh(), gpu_memory_utilization=1e-5)
    assert not torch.distributed.is_initialized()
    with pytest.raises(EngineError, match=r"does not start.*vllm_max_model_length = 300"):
        real(fresh(), max_model_length=300)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    small = tiny.model()
    prepare_for_scoring(small)
    with pytest.raises(EngineError, match=r"vLLM failed: RuntimeError: .*head_dim=8.*use_vllm = false"):
        real(small).sync(0)


@pytest.mark.vllm
@pytest.mark.parametrize("with_adapters", [False, True])
def test_grpo_trains(tmp_path: Path, real: Any, with_adapters: bool) -> None:
    made = trainer(tmp_path, None, fresh(seed=11), vllm_mode="colocate", peft_config=lora() if with_adapters else None)
    made.train()
    assert max(logged(made, "sampling/logprob_difference/max")) < 1e-4
    assert len(logged(made, "sampling/probe/difference")) == 3
    assert logged(made, "sampling/probe/moved")[1] > 0
    made.stage.sampler.engine.close()


@pytest.mark.vllm
def test_two_ranks_sample_what_one_does(tmp_path: Path) -> None:
    """Each with weights of its own, and with one copy for both."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not in this environment: make servers")
    found = {}
    for ranks, size in ((1, 1), (2, 1), (2, 2)):
        fields = {"vllm_mode": "colocate", "vllm_tensor_parallel_size": size, "max_steps": 2}
        rows, logs = run_ranks(ranks, tmp_path / f"{ranks}-{size}", **fields)
        found[ranks, size] = in_order(rows), logs["sampling/probe/difference"]
    assert found[1, 1][0]
    assert found[2, 1][0] == found[2, 2][0] == found[1, 1][0]
    assert all(max(differences) < 1e-5 for _, differences in found.values())
