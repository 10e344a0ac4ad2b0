"""One step of a real trainer under any of the pieces that save memory: its loss and gradients.

Run by a launcher it is the worker of test_pieces.py: `pieces.py FOLDER` takes the steps that its ranks share.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from peft import LoraConfig
from transformers import TrainerCallback

import burnish
import test_preference_trainer
import test_reward_trainer
import tiny
from burnish import GRPOConfig, GRPOTrainer
from burnish.model import classifier, host_embedding, offload, prefix, recomputation, scoring, tiled_head
from burnish.model.checkpointing import checkpointing_field
from burnish.model.kept_prompt import KeptPrompt
from burnish.model.loading import load_model
from burnish.model.offload import offloading
from burnish.model.self_test import PrefixSupport
from burnish.planner import memory
from burnish.rollout.engine import Engine, Request
from burnish.training import critic, learner
from burnish.types import Completion, StopReason
from test_trainers import TEXTS, digits, settings

Mode = Literal["full", "frozen", "lora", "nf4"]
"""All weights; all but the embedding; adapters; adapters on NF4 weights with double quantisation."""

CHECKPOINTING = checkpointing_field(GRPOConfig)
FIELDS: dict[str, dict[str, Any]] = {
    "checkpointing": {CHECKPOINTING: True},
    "offloading": {"activation_offloading": True},
    "mlp_tiles": {"mlp_tiles": 3},
    "parts": {"token_budget": 32},
    "embedding": {"embedding_offloading": True},
    "tiles": {},
}
"""Each piece, with its fields; short tiles of head and attention are a matter of sizes."""
PIECES = tuple(FIELDS)
ON_DEVICE = tuple(piece for piece in PIECES if piece != "embedding")
"""Those of a model whose embedding trains."""

KINDS: dict[str, dict[str, Any]] = {
    # Biases, norms of each head, and norms that compute in the dtype of the model.
    "stablelm": {"use_qkv_bias": True, "qk_layernorm": True, "attention_dropout": 0.0},
    # A mixture: routed experts beside one that all tokens visit, whose MLP is tiled.
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "qkv_bias": True,
        "shared_expert_intermediate_size": 24, "experts_implementation": "eager",
    },
    # Heads that a CPU with AMX has kernels for.
    "qwen3": {"attention_bias": True, "head_dim": 32},
    "gemma3_text": {},
}  # fmt: skip
BLOCKS = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 192}
"""Sizes that 4-bit blocks divide."""

PROMPTS = [{"prompt": "31415926535897932384626433"}, {"prompt": "27"}]
"""The first is worth keeping where its group is cut, the second is repeated."""
LENGTHS = (9, 6, 1, 8)

NAMES = {
    "sft": "SFT", "dpo": "DPO", "kto": "KTO", "reward": "Reward", "ppo": "PPO", "online_dpo": "OnlineDPO",
}  # fmt: skip
ROWS = {
    "sft": TEXTS, "dpo": test_preference_trainer.PAIRS, "kto": test_preference_trainer.LABELLED,
    "reward": test_reward_trainer.PAIRS,
}  # fmt: skip


class Answers(Engine):
    """The same completions of a prompt whatever the weights."""

    def generate(self, requests: Sequence[Request], *, seed: int, step: int) -> list[list[Completion]]:
        return [
            [self._answer(request.index, request.first_sample + n) for n in range(request.num_samples)]
            for request in requests
        ]

    def _answer(self, index: int, sample: int) -> Completion:
        generator = torch.Generator().manual_seed(100 * index + sample)
        ids = [*torch.randint(2, 60, (LENGTHS[sample],), generator=generator).tolist(), 0]
        return Completion(ids, text=str(index % 5 + sample), stop_reason=StopReason.EOS)

    def sync(self, version: int) -> None: ...

    def close(self) -> None: ...


def spread(completions: list[str], **columns: Any) -> list[float]:
    return [float(text) ** 2 for text in completions]


@dataclass
class Found:
    """A run of a step, or the last step of several.

    Attributes:
        loss: its value; of several steps, the sum.
        gradients: by name of the weight; of a critic, the weights after its own step.
        weights: trained weights after the run.
        seen: pieces that took part.
    """

    loss: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)


@contextmanager
def under(pieces: Iterable[str], seen: set[str], *, plain: bool = False) -> Generator[None]:
    """Give the pieces something to do on a tiny model and a CPU, and record those that do it.

    Args:
        pieces: those of the run.
        seen: gets the names of the pieces that took part.
        plain: compute as transformers does: padded rows, its own attention, whole logits, all activations kept.
    """
    with ExitStack() as stack:

        def put(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(patch.object(owner, name, value))

        def watch(owner: Any, name: str, piece: str, does: Callable[[Any], bool] = lambda found: True) -> None:
            original = getattr(owner, name)

            @functools.wraps(original)
            def watched(*args: Any, **kwargs: Any) -> Any:
                found = original(*args, **kwargs)
                seen.update([piece] if does(found) else [])
                return found

            put(owner, name, watched)

        put(offload, "_MIN_BYTES", 1)
        put(memory, "KEPT_PROMPT_TOKENS", 16)
        for module in (learner, critic):
            put(module, "offloading", lambda model: offloading(model, copies_on_cpu=True))
        if plain:
            for module in (scoring, classifier):
                put(module, "supports_prefix", lambda model: PrefixSupport(False, "a reference"))
                put(module, "save_less", lambda model: None)
            put(scoring, "_probe_head", lambda lm: 1.0)
        if "tiles" in pieces:
            put(tiled_head, "_TILE_BYTES", {"cpu": 4096})
            put(prefix, "_MAX_QUERIES", 3)
        watch(offload._Mover, "begin_back", "offloading")
        watch(recomputation, "_tiled", "mlp_tiles")
        watch(KeptPrompt, "end_piece", "parts")
        watch(host_embedding, "_forward", "embedding")
        watch(tiled_head, "_split", "tiles", lambda slices: len(slices) > 1)
        watch(prefix, "_bucket_tiles", "attention tiles", lambda tiles: len(tiles) > 1)
        yield


class _Recorder(TrainerCallback):
    def __init__(self, found: Found) -> None:
        self.found, self.trainer = found, None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        masters: Any = self.trainer.master_weights
        owned = {} if masters is None else dict(zip(masters.trained, masters.gradients, strict=True))
        for name, parameter in model.named_parameters():
            gradient = owned.get(parameter, parameter.grad)
            if gradient is not None:
                self.found.gradients[name] = gradient.detach().clone()
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            self.found.seen.add("checkpointing")
        for name, other in self.trainer.stage.other_trained_models().items():
            trained = [(key, p) for key, p in other.named_parameters() if p.requires_grad]
            self.found.gradients |= {f"{name}.{key}": parameter.detach().clone() for key, parameter in trained}


def model_of(kind: str, mode: Mode, dtype: torch.dtype, **changes: Any) -> Any:
    """A tiny model whose weights train as `mode` says; adapters come with the trainer."""
    if mode == "nf4":
        return copy.deepcopy(_quantised(kind, dtype))
    model = tiny.model(kind, dtype=dtype, tie_word_embeddings=False, **{**KINDS[kind], **changes}).train()
    if mode == "frozen":
        model.get_input_embeddings().weight.requires_grad_(False)
    return model


@functools.cache
def _quantised(kind: str, dtype: torch.dtype) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        tiny.model(kind, tie_word_embeddings=False, **{**BLOCKS, **KINDS[kind]}).save_pretrained(folder)
        return load_model(folder, bf16=dtype == torch.bfloat16, init_kwargs={"quantization_config": "nf4"})[0]


def dense(model: Any) -> Any:
    """A model with the same weights, not quantised, in float64."""
    model = copy.deepcopy(model).dequantize().double()
    model.set_experts_implementation("eager")  # grouped products take no float64
    return model


def lora() -> LoraConfig:
    """Adapters that change the model from the start."""
    return LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)


def grpo(folder: Path, model: Any, mode: Mode, callbacks: Any, **changes: Any) -> GRPOTrainer:
    """Two groups of four completions with an entropy bonus, so that every output of the head has a gradient."""
    fields = settings(
        folder, per_device_train_batch_size=8, num_generations=4, max_completion_length=10, entropy_coef=0.05,
        temperature=0.7, max_steps=1, optim="sgd", max_grad_norm=0.0, log_metrics=False, disable_tqdm=True,
    )  # fmt: skip
    engine = changes.pop("engine", Answers())
    args = GRPOConfig(**{**fields, **changes})
    return GRPOTrainer(
        model, digits if engine is None else spread, args, PROMPTS, processing_class=tiny.tokenizer(), engine=engine,
        callbacks=callbacks,
        peft_config=lora() if mode in ("lora", "nf4") else None,
    )  # fmt: skip


def of_stage(stage: str, folder: Path, model: Any, mode: Mode, callbacks: Any, **changes: Any) -> Any:
    """The trainer of another stage, on eight rows or, of an online stage, on the completions of two prompts."""
    online = stage in ("ppo", "online_dpo")
    fields = settings(folder, per_device_train_batch_size=8, max_steps=1, optim="sgd", max_grad_norm=0.0,
                      log_metrics=False, disable_tqdm=True)  # fmt: skip
    fields |= {"max_completion_length": 10, "temperature": 0.7, "beta": 0.1} if online else {}
    fields |= {"num_generations": 4} if stage == "online_dpo" else {"num_iterations": 1} if stage == "ppo" else {}
    config, trainer = getattr(burnish, f"{NAMES[stage]}Config"), getattr(burnish, f"{NAMES[stage]}Trainer")
    rows = {"reward_funcs": spread, "engine": Answers(), "train_dataset": PROMPTS * 4} if online else {
        "train_dataset": ROWS[stage][:8]
    }  # fmt: skip
    return trainer(
        model=model, args=config(**{**fields, **changes}), processing_class=tiny.tokenizer(), callbacks=callbacks,
        peft_config=lora() if mode in ("lora", "nf4") else None, **rows,
    )  # fmt: skip


def step(
    folder: Path,
    model: Any,
    mode: Mode,
    pieces: Iterable[str] = (),
    *,
    accumulation: int = 1,
    ranks: int = 1,
    plain: bool = False,
    make: Callable[..., Any] = grpo,
    **changes: Any,
) -> Found:
    """Train one step and return its loss and gradients, before the optimizer."""
    found = Found()
    recorder = _Recorder(found)
    fields = {name: value for piece in pieces for name, value in FIELDS[piece].items()}
    if accumulation * ranks > 1:
        fields |= {"per_device_train_batch_size": 8 // accumulation // ranks}
        fields |= {"gradient_accumulation_steps": accumulation}
    with under(pieces, found.seen, plain=plain):
        trainer = make(folder, model, mode, [recorder], **{**fields, **changes})
        recorder.trainer = trainer
        loss = trainer.stage.loss

        def recorded(*args: Any) -> Any:
            part = loss(*args)
            found.loss += part.value.detach()
            return part

        trainer.stage.loss = recorded
        trainer.train()
    found.weights = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return found


def combinations(names: Sequence[str] = PIECES) -> list[tuple[str, ...]]:
    """All subsets."""
    return [tuple(itertools.compress(names, chosen)) for chosen in itertools.product((0, 1), repeat=len(names))]


def pairs(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Eight subsets of up to seven names, in which any two of them take all four combinations."""
    assert len(names) <= 7
    rows = []
    for a, b, c in itertools.product((0, 1), repeat=3):
        chosen = (a, b, a ^ b, c, a ^ c, b ^ c, a ^ b ^ c)
        rows.append(tuple(itertools.compress(names, chosen)))
    return rows


SHARED: list[tuple[str, Mode, torch.dtype, tuple[str, ...], int]] = [
    *(("stablelm", "full", torch.float64, pieces, n) for n, pieces in ((1, ()), (1, ON_DEVICE), (2, ("parts",)))),
    *(("stablelm", "lora", torch.float64, pieces, n) for n, pieces in ((1, PIECES), (2, ("mlp_tiles", "parts")))),
    *(("stablelm", "nf4", torch.float32, pieces, n) for n, pieces in ((1, ()), (1, PIECES), (2, PIECES))),
    ("stablelm", "nf4", torch.bfloat16, PIECES, 2),
    ("stablelm", "full", torch.bfloat16, ("checkpointing", "parts", "tiles"), 1),
    ("qwen2_moe", "full", torch.float64, ("checkpointing", "mlp_tiles", "parts"), 1),
    ("qwen2_moe", "nf4", torch.float32, PIECES, 1),
]
"""Steps of the worker: kind, mode, dtype, pieces, accumulation."""


def main(folder: Path) -> None:
    """Take every shared step on this rank; the first rank saves the sums of losses, and gradients."""
    # Within a process group, transformers writes models on the first rank alone.
    models = [model_of(kind, mode, dtype) for kind, mode, dtype, *_ in SHARED]
    results = []
    for number, (_, mode, dtype, pieces, accumulation) in enumerate(SHARED):
        found = step(
            folder / str(number), models[number], mode, pieces, accumulation=accumulation,
            ranks=int(os.environ["WORLD_SIZE"]), ddp_backend="gloo", bf16=dtype == torch.bfloat16,
        )  # fmt: skip
        torch.distributed.all_reduce(found.loss)
        everywhere: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, found.seen)
        found.seen = set.union(*everywhere)
        results.append(found)
    if torch.distributed.get_rank() == 0:
        torch.save([(found.loss, found.gradients, found.seen) for found in results], folder / "result.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
