"""Every combination of the pieces that save memory has the loss and the gradients of none of them.

The reference of each run computes as transformers does: one padded row a completion, its own attention, whole logits,
every activation kept. In float64 the two differ by the order of sums. Where kernels compute in fp32 or bf16, both are
compared with a float64 model of the same weights, and the combination may be as far from it as the reference is.
"""

from __future__ import annotations

import functools
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import pieces
import tiny
from burnish import SFTConfig, SFTTrainer
from burnish.errors import ConfigError
from pieces import ON_DEVICE, PIECES, Found, Mode
from test_trainers import TEXTS, settings

EXACT = 1e-10
"""Of the largest number of a gradient: sums of some hundred terms of float64 in another order."""
ROUNDED = 5e-6
"""Norms and routers of these architectures compute in fp32: the gradient of a prompt is rounded once or in pieces."""
STREAMS = 1e-6
"""Old and reference log-probabilities, and a critic's values, are fp32 in a packed row."""
TIMES = 2.0
"""A combination's error in fp32 or bf16 over that of none of the pieces, the rounding of other sums."""


@pytest.fixture(scope="module", autouse=True)
def frozen_heap() -> Generator[None]:
    """Accelerate collects garbage after every run: what was there before is left out of it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@functools.cache
def reference(kind: str, mode: Mode, dtype: torch.dtype = torch.float64, exact_of: torch.dtype | None = None) -> Found:
    """The step without any piece; with `exact_of`, in float64 with the weights of a model of that dtype."""
    if exact_of is None:
        model = pieces.model_of(kind, mode, dtype)
    else:
        model = pieces.model_of(kind, mode, exact_of)
        model, mode = (pieces.dense(model), "lora") if mode == "nf4" else (model.double(), mode)
    with tempfile.TemporaryDirectory() as folder:
        return pieces.step(Path(folder), model, mode, plain=True, bf16=exact_of is None and dtype == torch.bfloat16)


def assert_exact(found: Found, expected: Found, tolerance: float) -> None:
    assert expected.gradients
    torch.testing.assert_close(found.loss, expected.loss, rtol=tolerance, atol=tolerance)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        bound = tolerance * max(float(gradient.abs().max()), 1e-3)
        torch.testing.assert_close(found.gradients[name], gradient, rtol=0, atol=bound, msg=name)


def error(found: Found, exact: Found) -> float:
    """Norm of the gradient's error over the norm of the gradient."""
    assert found.gradients.keys() == exact.gradients.keys()
    errors = [(found.gradients[name].double() - gradient).norm() for name, gradient in exact.gradients.items()]
    return float(torch.stack(errors).norm() / torch.stack([g.norm() for g in exact.gradients.values()]).norm())


def assert_as_exact(found: Found, plain: Found, exact: Found) -> None:
    assert error(found, exact) <= TIMES * error(plain, exact)
    torch.testing.assert_close(
        found.loss, exact.loss, rtol=0, atol=TIMES * float((plain.loss - exact.loss).abs()) + 1e-6
    )


def all_of(chosen: tuple[str, ...]) -> set[str]:
    """What must have taken part in a run under these pieces."""
    return {*chosen, "attention tiles"} if "tiles" in chosen else set(chosen)


def named(chosen: Any) -> str | None:
    return "+".join(chosen) or "none" if isinstance(chosen, tuple) else None


# With accumulation, pairs of pieces are among the fast tests below.
@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("mode", "chosen"),
    [
        *(("full", chosen) for chosen in pieces.combinations(ON_DEVICE)),
        *(("lora", chosen) for chosen in pieces.combinations()),
        *(("frozen", chosen) for chosen in pieces.pairs(PIECES)),
    ],
    ids=named,
)
def test_combinations_in_float64(tmp_path: Path, mode: Mode, chosen: tuple[str, ...], accumulation: int) -> None:
    model = pieces.model_of("stablelm", mode, torch.float64)
    found = pieces.step(tmp_path, model, mode, chosen, accumulation=accumulation)
    assert found.seen == all_of(chosen)
    assert_exact(found, reference("stablelm", mode), EXACT)


@pytest.mark.parametrize(
    ("chosen", "accumulation"),
    [*((chosen, 1) for chosen in pieces.combinations()), *((chosen, 2) for chosen in pieces.pairs(PIECES))],
    ids=named,
)
def test_combinations_on_nf4(tmp_path: Path, chosen: tuple[str, ...], accumulation: int) -> None:
    """bitsandbytes' kernels multiply in fp32."""
    pytest.importorskip("bitsandbytes")
    model = pieces.model_of("stablelm", "nf4", torch.float32)
    found = pieces.step(tmp_path, model, "nf4", chosen, accumulation=accumulation)
    assert found.seen == all_of(chosen)
    plain, exact = reference("stablelm", "nf4", torch.float32), reference("stablelm", "nf4", exact_of=torch.float32)
    assert error(plain, exact) < 1e-5
    assert_as_exact(found, plain, exact)


WITH_ACCUMULATION = (*PIECES, "accumulation")


@pytest.mark.parametrize("kind", ["qwen2_moe", "gemma3_text"])
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("chosen", pieces.pairs(WITH_ACCUMULATION), ids=named)
def test_pairs_of_other_architectures(tmp_path: Path, kind: str, mode: Mode, chosen: tuple[str, ...]) -> None:
    # gemma scales the rows of its embedding, which therefore stays where it is.
    on_device = mode == "full" or kind == "gemma3_text"
    own = tuple(piece for piece in (ON_DEVICE if on_device else PIECES) if piece in chosen)
    model = pieces.model_of(kind, mode, torch.float64)
    found = pieces.step(tmp_path, model, mode, own, accumulation=1 + ("accumulation" in chosen))
    assert found.seen == all_of(own)
    assert_exact(found, reference(kind, mode), ROUNDED)


@pytest.mark.parametrize("mode", ["full", "lora", "nf4"])
@pytest.mark.parametrize("chosen", pieces.pairs(WITH_ACCUMULATION), ids=named)
def test_pairs_in_bf16(tmp_path: Path, mode: Mode, chosen: tuple[str, ...]) -> None:
    """Gradients of masters, with the kernels that a CPU has for bf16."""
    pytest.importorskip("bitsandbytes")
    own = tuple(piece for piece in (ON_DEVICE if mode == "full" else PIECES) if piece in chosen)
    model = pieces.model_of("qwen3", mode, torch.bfloat16)
    found = pieces.step(tmp_path, model, mode, own, accumulation=1 + ("accumulation" in chosen), bf16=True)
    assert found.seen - {"attention tiles"} == set(own)  # kernels take whole rows
    plain, exact = reference("qwen3", mode, torch.bfloat16), reference("qwen3", mode, exact_of=torch.bfloat16)
    assert error(plain, exact) < 0.05
    assert_as_exact(found, plain, exact)


OBJECTIVES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "beta": 0.1},
    "gspo": {"importance_sampling_level": "sequence", "beta": 0.1, "entropy_coef": 0.0},
    "quantile": {"top_entropy_quantile": 0.5},
}


@functools.cache
def second_pass(objective: str, chosen: tuple[str, ...] = (), accumulation: int = 1, *, plain: bool = False) -> Found:
    fields = {**OBJECTIVES[objective], "num_iterations": 2, "max_steps": 2}
    model = pieces.model_of("stablelm", "lora", torch.float64)
    with tempfile.TemporaryDirectory() as folder:
        return pieces.step(Path(folder), model, "lora", chosen, accumulation=accumulation, plain=plain, **fields)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("chosen", pieces.pairs(WITH_ACCUMULATION), ids=named)
def test_a_second_pass_with_a_reference(objective: str, chosen: tuple[str, ...]) -> None:
    """Old and reference log-probabilities are scored under the pieces too, and ratios are no longer 1."""
    own = tuple(piece for piece in PIECES if piece in chosen)
    found = second_pass(objective, own, 1 + ("accumulation" in chosen))
    assert found.seen == all_of(own)
    assert_exact(found, second_pass(objective, plain=True), STREAMS)


def test_reentrant_checkpointing_is_replaced(tmp_path: Path) -> None:
    """It would run the prompt without a graph, so that nothing could be sent back to its keys and values."""
    fields = {f"{pieces.CHECKPOINTING}_kwargs": {"use_reentrant": True}}
    model = pieces.model_of("stablelm", "full", torch.float64)
    found = pieces.step(tmp_path, model, "full", ("checkpointing", "parts"), **fields)
    assert_exact(found, reference("stablelm", "full"), EXACT)


@pytest.mark.parametrize("mode", ["full", "lora", "nf4"])
def test_rollouts_and_steps_by_the_trainer_s_own_engine(tmp_path: Path, mode: Mode) -> None:
    pytest.importorskip("bitsandbytes")

    def run(chosen: tuple[str, ...]) -> Found:
        model = pieces.model_of("stablelm", mode, torch.float32)
        fields = {"engine": None, "max_steps": 2, "beta": 0.1, "learning_rate": 1e-2}
        return pieces.step(tmp_path / f"{len(chosen)}", model, mode, chosen, **fields)

    chosen = ON_DEVICE if mode == "full" else PIECES
    none, every = run(()), run(chosen)
    assert every.seen == all_of(chosen)
    for name, weight in none.weights.items():
        # fp32 sums in another order, twice.
        torch.testing.assert_close(every.weights[name], weight, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("stage", pieces.NAMES)
def test_pairs_of_other_stages(tmp_path: Path, stage: str) -> None:
    make = functools.partial(pieces.of_stage, stage)

    def run(folder: str, chosen: tuple[str, ...] = (), accumulation: int = 1, *, plain: bool = False) -> Found:
        model = pieces.model_of("stablelm", "lora", torch.float64)
        return pieces.step(tmp_path / folder, model, "lora", chosen, accumulation=accumulation, plain=plain, make=make)

    expected = run("plain", plain=True)
    assert any("score" in name for name in expected.gradients) == (stage in ("reward", "ppo"))
    for number, chosen in enumerate(pieces.pairs(WITH_ACCUMULATION)):
        own = tuple(piece for piece in PIECES if piece in chosen)
        found = run(str(number), own, 1 + ("accumulation" in chosen))
        # No prompt is kept for one completion, nor for completions that share a loss, unless more are scored than are
        # trained on; a score needs no tiles.
        unused = {"reward": {"parts", "tiles"}, "online_dpo": set[str]()}.get(stage, {"parts"})
        assert found.seen == all_of(own) - unused, chosen
        assert_exact(found, expected, STREAMS)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
@pytest.mark.parametrize("mode", ["full", "nf4"])
def test_optimizers_take_the_same_steps(tmp_path: Path, mode: Mode, optim: str) -> None:
    pytest.importorskip("bitsandbytes")
    fields = {"optim": optim, "max_steps": 3, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    chosen = ON_DEVICE if mode == "full" else PIECES

    def run(own: tuple[str, ...], *, plain: bool = False, **changes: Any) -> Found:
        model = pieces.model_of("stablelm", mode, torch.float32, **pieces.BLOCKS)
        folder = tmp_path / f"{len(own)}{changes}"
        return pieces.step(folder, model, mode, own, plain=plain, **{**fields, **changes})

    found, plain, start = run(chosen), run((), plain=True), run((), plain=True, learning_rate=0.0)
    assert found.seen == all_of(chosen)
    moved = torch.stack([(plain.weights[name] - weight).norm() for name, weight in start.weights.items()]).norm()
    apart = torch.stack([(plain.weights[name] - weight).norm() for name, weight in found.weights.items()]).norm()
    # Where a gradient is rounding alone, Adam's first steps are its sign.
    assert apart < 0.02 * moved


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, str]] = {
    "mlp without gate": ("gpt2", {"mlp_tiles": 2}, None, "mlp_tiles = 2: GPT2LMHeadModel has no MLP of gate_proj"),
    "experts alone": ("mixtral", {"mlp_tiles": 2}, {}, "mlp_tiles = 2: MixtralForCausalLM has no MLP of gate_proj"),
    "trained": ("qwen3", {"embedding_offloading": True}, None, "its input embedding trains"),
    "tied": ("gemma2", {"embedding_offloading": True}, {}, "its input embedding is a Gemma2TextScaledWordEmbedding"),
    "head": ("stablelm", {"embedding_offloading": True}, {}, "its input embedding is the head's weight too"),
    "saved": ("qwen3", {"embedding_offloading": True}, {"modules_to_save": ["embed_tokens"]}, "embedding trains"),
    "rows": ("qwen3", {"embedding_offloading": True}, {"trainable_token_indices": [3]}, "embedding trains"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_model_cannot_do_is_refused_before_weights_load(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, fields, adapters, message = REFUSED[case]
    tiny.model(kind, tie_word_embeddings=case == "head").save_pretrained(tmp_path)

    def load(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("burnish.training.stage.load_model", load)
    lora = None if adapters is None else LoraConfig(target_modules=["q_proj"], **adapters)
    args = SFTConfig(**settings(tmp_path / "run", **fields))
    with pytest.raises(ConfigError, match=message):
        SFTTrainer(str(tmp_path), args, train_dataset=TEXTS, processing_class=tiny.tokenizer(), peft_config=lora)


@pytest.mark.slow
def test_two_ranks_take_the_step_of_one(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, pieces.__file__, str(tmp_path)], capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = torch.load(tmp_path / "result.pt")
    for (kind, mode, dtype, chosen, _), (loss, gradients, seen) in zip(pieces.SHARED, results, strict=True):
        found, plain = Found(loss, gradients, {}, seen), reference(kind, mode, dtype)
        assert seen - {"attention tiles"} == set(chosen)
        if dtype == torch.float64:
            assert_exact(found, plain, EXACT if kind == "stablelm" else ROUNDED)
        else:
            assert_as_exact(found, plain, reference(kind, mode, exact_of=dtype))
