"""The compiled decode forward: its graph computes what the model does; what cannot be compiled runs as it is.

Most tests run the traced graph itself, which must give the model's values to the bit; inductor's code rounds otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import tiny
from burnish import GRPOConfig
from burnish.errors import ConfigError
from burnish.rollout import NativeEngine, Request, SamplingParams
from burnish.rollout.compiled import CompiledForward, check_compiler, compiling_pays
from burnish.rollout.engines import make_engine
from burnish.types import Completion
from test_native import CONFIGS, build, tokenizer
from test_trainers import PROMPTS, grpo

__all__ = ["tokenizer"]

DENSE = [name for name in CONFIGS if name not in ("gpt_oss", "mamba")]


def requests(tokens: int = 12, samples: int = 3) -> list[Request]:
    """Prompts of three lengths, one of them greedy."""
    return [
        Request(list(range(3 + i, 12 + 3 * i)), samples, SamplingParams(tokens, temperature=t), index=i)
        for i, t in enumerate((0.0, 1.0, 0.7))
    ]


def engines(model: Any, tokenizer: Any, lower: Any = None, **options: Any) -> tuple[NativeEngine, NativeEngine]:
    """Return an engine that runs the model, and one that runs its traced graph."""
    plain, compiled = (NativeEngine(model, tokenizer, compile_forward=wanted, **options) for wanted in (False, True))
    compiled._compiled = CompiledForward(compiled._lm, lower or (lambda graph, inputs: graph))
    return plain, compiled


def values(groups: Sequence[Sequence[Completion]]) -> list[tuple[list[int], list[float] | None]]:
    return [(completion.token_ids, completion.policy_logprobs) for group in groups for completion in group]


def sizes(engine: NativeEngine) -> list[set[int]]:
    """Numbers of tokens that each graph has run."""
    assert engine._compiled is not None
    graphs = engine._compiled._graphs.values()
    return [{tokens for tokens, taken in graph.admitted.items() if taken} for graph in graphs]


@pytest.mark.parametrize("speculate", [True, False])
@pytest.mark.parametrize("name", DENSE)
def test_a_traced_forward_is_the_models(name: str, speculate: bool, tokenizer: Any) -> None:
    model = build(name)
    # Prompts that are copied into rows, and a long one that is not.
    for asked in (requests(), [*requests(), Request([7, 8] * 70, 2, SamplingParams(4), index=9)]):
        plain, compiled = engines(model, tokenizer, speculate=speculate)
        assert values(compiled.generate(asked, seed=1, step=0)) == values(plain.generate(asked, seed=1, step=0))
        assert len(sizes(compiled)[0]) > 0


def test_a_graph_takes_any_number_of_tokens_and_the_weights_of_now(tokenizer: Any) -> None:
    model = build("llama")
    plain, compiled = engines(model, tokenizer)
    for step, samples in enumerate((1, 2, 5)):
        asked = requests(samples=samples)
        assert values(compiled.generate(asked, seed=1, step=step)) == values(plain.generate(asked, seed=1, step=step))
        tiny.move(model, 0.05)
    (taken,) = sizes(compiled)
    assert {3, 6, 15} <= taken, "one graph for all"


def test_a_single_token_runs_uncompiled(tokenizer: Any) -> None:
    plain, compiled = engines(build("llama"), tokenizer)
    asked = requests(samples=1)[:1]
    assert values(compiled.generate(asked, seed=1, step=0)) == values(plain.generate(asked, seed=1, step=0))
    assert sizes(compiled) == [set()]


def test_a_size_that_the_trace_excludes_runs_uncompiled(tokenizer: Any) -> None:
    plain, compiled = engines(build("llama"), tokenizer)
    assert compiled._compiled is not None
    traced = compiled._compiled._traced

    def bounded(device: Any) -> Any:
        graph = traced(device)
        graph.admits = lambda tokens: tokens < 9
        return graph

    compiled._compiled._traced = bounded  # type: ignore[method-assign]
    asked = requests()
    assert values(compiled.generate(asked, seed=1, step=0)) == values(plain.generate(asked, seed=1, step=0))
    assert 9 not in sizes(compiled)[0]


def test_adapters_are_part_of_the_graph(tokenizer: Any) -> None:
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    plain, compiled = engines(model.eval(), tokenizer)
    asked = requests()
    with_adapters = values(compiled.generate(asked, seed=1, step=0))
    assert with_adapters == values(plain.generate(asked, seed=1, step=0))
    with model.disable_adapter():
        without = values(compiled.generate(asked, seed=1, step=0))
        assert without == values(plain.generate(asked, seed=1, step=0))
    assert without != with_adapters


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bf16 products on this CPU")
def test_packed_products_are_called_with_the_weights_of_now(tokenizer: Any) -> None:
    model = build("llama").bfloat16()
    plain, compiled = engines(model, tokenizer)
    for step in range(2):
        asked = requests()
        assert values(compiled.generate(asked, seed=1, step=step)) == values(plain.generate(asked, seed=1, step=step))
        tiny.move(model, 0.05)
    assert len(sizes(compiled)) == 1


def test_what_cannot_be_traced_or_compiled_runs_as_it_is(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no such instruction\nand more")

    for name, lower, reason in (("gpt_oss", None, ""), ("llama", broken, "RuntimeError: no such instruction")):
        caplog.clear()
        plain, compiled = engines(build(name), tokenizer, lower)
        for step in range(2):
            asked = requests()
            found = compiled.generate(asked, seed=1, step=step)
            assert values(found) == values(plain.generate(asked, seed=1, step=step))
        (message,) = [r.getMessage() for r in caplog.records if r.name == "burnish.rollout.compiled"]
        assert "runs uncompiled, because" in message
        assert message.endswith(reason)


def test_lockstep_says_that_it_is_not_compiled(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make_engine(build("mamba"), tokenizer, compile_forward=True)
    assert "compile_rollouts = True has no effect on MambaForCausalLM" in caplog.text


def test_a_missing_compiler_is_an_error_with_the_fix(tmp_path: Path) -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": (str(tmp_path / "no-such-compiler"),)}):
        with pytest.raises(ConfigError, match=r"compile_rollouts = True: there is no C\+\+ compiler; install g\+\+"):
            check_compiler("cpu")
        with pytest.raises(ConfigError, match="no C"):
            grpo(tmp_path, compile_rollouts=True)
    with pytest.raises(ConfigError, match="compile_rollouts = True on cuda: triton is missing"):
        check_compiler("cuda")


@pytest.mark.parametrize(
    ("fields", "compiles"),
    [
        ({"max_steps": 625}, True),
        ({"max_steps": 624}, False),
        ({"max_steps": 1250, "gradient_accumulation_steps": 1, "steps_per_generation": 2}, True),
        ({"max_steps": 1248, "gradient_accumulation_steps": 1, "steps_per_generation": 2}, False),
        ({"num_train_epochs": 79}, True),
        ({"num_train_epochs": 78}, False),
        ({"max_steps": 625, "compile_rollouts": False}, False),
        ({"max_steps": 2, "compile_rollouts": True}, True),
    ],
)
def test_a_long_run_compiles_by_itself(tmp_path: Path, fields: dict[str, Any], compiles: bool) -> None:
    """A rollout has 8 tokens at most; without max_steps, 24 prompts in rollouts of 3."""
    made = grpo(tmp_path, tiny.model().bfloat16(), bf16=True, **{"max_steps": -1, **fields})
    assert len(PROMPTS) == 24
    assert (made.stage.sampler.engine._compiled is not None) == compiles


def test_what_is_not_measured_or_cannot_be_compiled_does_not_compile_by_itself(tmp_path: Path) -> None:
    from torch._inductor import config

    half = tiny.model().bfloat16()
    assert compiling_pays(half, 5000)
    assert not compiling_pays(tiny.model(), 1e9)
    assert not compiling_pays(half.to("meta"), 1e9)
    with config.patch({"cpp.cxx": (str(tmp_path / "no-such-compiler"),)}):
        assert not compiling_pays(tiny.model().bfloat16(), 5000)


def test_contradictions_are_errors(tmp_path: Path) -> None:
    model = tiny.model()
    engine = NativeEngine(model, tiny.tokenizer())
    for fields in ({"compile_rollouts": True}, {"rollout_cache_gib": 1.0}):
        with pytest.raises(ConfigError, match=f"{next(iter(fields))} = .* with an engine"):
            grpo(tmp_path, model, engine=engine, **fields)
    with pytest.raises(ConfigError, match=r"rollout_cache_gib = 2\.0 with use_vllm = True"):
        GRPOConfig(rollout_cache_gib=2.0, use_vllm=True)
    with pytest.raises(ConfigError, match="compile_rollouts = True with use_vllm = True"):
        GRPOConfig(compile_rollouts=True, use_vllm=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", DENSE)
def test_compiled_code_samples_from_the_same_distribution(name: str, tokenizer: Any) -> None:
    """In fp32 it rounds differently in the last places, and draws the same tokens."""
    from burnish.rollout.compiled import _by_inductor

    plain, compiled = engines(build(name), tokenizer, _by_inductor)
    wanted, found = (values(engine.generate(requests(), seed=1, step=0)) for engine in (plain, compiled))
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in wanted]
    for (_, left), (_, right) in zip(found, wanted, strict=True):
        assert left is not None
        assert left == pytest.approx(right, abs=2e-5)


@pytest.mark.slow
def test_a_run_trains_on_compiled_rollouts(tmp_path: Path) -> None:
    made = grpo(tmp_path, compile_rollouts=True, max_steps=3)
    made.train()
    (graph,) = made.stage.sampler.engine._compiled._graphs.values()
    assert graph.run is not None
