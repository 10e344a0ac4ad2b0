"""A run's memory before it starts: what `memory_budget` chooses, what is refused, and what is said of both."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback, TrainingArguments

import burnish
import tiny
from burnish.cli.main import main
from burnish.config import known_fields
from burnish.errors import ConfigError
from burnish.model.checkpointing import checkpointing_field
from burnish.planner.devices import find_device
from burnish.planner.plan import USABLE, Plan
from burnish.training import learner, memory_plan
from burnish.training.process_memory import HeldMemory

PAIRS = [{"prompt": f"{i}+{i}=" * (1 + i % 3), "chosen": f"{i}" * 9, "rejected": f"{i + 1}" * 5} for i in range(8)]
ANSWERS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
ROWS: dict[str, Sequence[dict[str, Any]]] = {"SFT": ANSWERS, "DPO": PAIRS, "Reward": PAIRS, "GRPO": PAIRS, "PPO": PAIRS}


CHECKPOINTING = checkpointing_field(TrainingArguments)


def digits(completions: list[str], **columns: Any) -> list[float]:
    return [float(sum(c.isdigit() for c in text)) for text in completions]


def trainer(stage: str, folder: Path, *, model: Any = None, lora: bool = False, **fields: Any) -> Any:
    config, kind = (getattr(burnish, f"{stage}{end}") for end in ("Config", "Trainer"))
    online: dict[str, Any] = {"max_completion_length": 8} if stage in ("GRPO", "PPO") else {}
    args = config(
        output_dir=str(folder), max_steps=1, report_to=[], progress=False, use_cpu=True, bf16=False,
        learning_rate=1e-3, **online, **fields,
    )  # fmt: skip
    return kind(
        model=tiny.model() if model is None else model,
        args=args,
        train_dataset=ROWS[stage],
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
        **({"reward_funcs": digits} if online else {}),
    )


def just_below(plan: Plan) -> str:
    """A budget that a run misses by one byte in 10^9, whose usable part is `USABLE` of it."""
    return f"{plan.peak_bytes / USABLE / 1e9 - 1e-9:.9f}GB"


@pytest.mark.parametrize("stage", ROWS)
@pytest.mark.parametrize("lora", [False, True])
def test_what_is_chosen_fits_and_changes_no_gradient(
    stage: str, lora: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    free = trainer(stage, tmp_path / "free", lora=lora)
    before = {name: getattr(free.args, name) for name in known_fields(free.args.kind)}
    with caplog.at_level(logging.INFO, "burnish.training.memory_plan"):
        kept = trainer(stage, tmp_path / "kept", lora=lora, memory_budget=just_below(free._memory_plan))
    plan: Plan = kept._memory_plan
    assert plan.fits
    assert plan.peak_bytes < free._memory_plan.peak_bytes
    chosen = {name for name, value in before.items() if getattr(kept.args, name) != value} - {
        "output_dir", "logging_dir", "memory_budget", "run_name", "activation_checkpointing",
        "activation_checkpointing_kwargs",
    }  # fmt: skip
    exact = {"gradient_checkpointing", "mlp_tiles", "token_budget", "rollout_cache_gib", "precompute_ref_log_probs"}
    assert chosen
    assert chosen <= exact
    first, second = (record.getMessage() for record in caplog.records if record.name == memory_plan.__name__)
    assert all(f"{name} = " in first for name in chosen)
    assert re.search(r"with that, the run takes 0\.\d\d GB \([\w ]+\), in \d\.\d\d times the time a step", second)
    for one in (free, kept):
        one.train()
    for one, other in zip(free.model.parameters(), kept.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", ROWS)
def test_what_is_chosen_is_what_a_run_of_these_settings_does(stage: str, tmp_path: Path) -> None:
    """GPT-2 has no gated MLP to compute in tiles, and its rows are in parts already: layers are left to checkpoint."""
    used: list[bool] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            used.append(any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules()))

    def made(name: str, **fields: Any) -> Any:
        scored = {"precompute_ref_log_probs": True} if stage == "DPO" else {}
        return trainer(stage, tmp_path / name, model=tiny.model("gpt2"), token_budget=64, **scored, **fields)

    kept = made("kept", memory_budget=just_below(made("free")._memory_plan))
    assert kept.args.gradient_checkpointing
    given = made("given", **{CHECKPOINTING: True})
    differ = {name for name, value in vars(given.args).items() if value != vars(kept.args)[name]}
    # Objects of each config's own, and of the kwargs the name that the trainer does not read.
    differ -= {"distributed_state", "deepspeed_plugin", "gradient_checkpointing_kwargs"}
    assert differ <= {"output_dir", "logging_dir", "run_name", "memory_budget"}
    for one in (given, kept):
        one.add_callback(Watch())
        one.train()
    assert used == [True, True]


def test_checkpointing_that_nothing_chose_stays_as_it_was_set(tmp_path: Path) -> None:
    args = burnish.SFTConfig(output_dir=str(tmp_path), report_to=[], progress=False, use_cpu=True, bf16=False)
    setattr(args, CHECKPOINTING, True)
    burnish.SFTTrainer(model=tiny.model(), args=args, train_dataset=ANSWERS, processing_class=tiny.tokenizer())
    assert getattr(args, CHECKPOINTING)


def test_a_budget_that_fits_sets_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "burnish.training.memory_plan"):
        made = trainer("SFT", tmp_path, memory_budget="2 GB")
        assert not caplog.records
        assert made._memory_plan.device.memory_bytes == 2_000_000_000
        made.train()
    said = r"memory: (\d+\.\d\d GB at most|no more than the \d+\.\d\d GB that .*) \(\d+\.\d\d GB as it began\)"
    assert re.fullmatch(said + r", 0\.\d\d GB planned", caplog.records[-1].getMessage())


HIDDEN = "no more than the 1.20 GB that the process took before the run"


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ((700, 900), (1000, 1200), "1.20 GB at most (0.70 GB as it began)"),
        ((700, 1200), (1000, 1200), f"{HIDDEN} (0.70 GB as it began)"),
        ((700, 1196), (1000, 1200), f"{HIDDEN} (0.70 GB as it began)"),
        ((None, 900), (None, 1200), "1.20 GB at most"),
    ],
)
@pytest.mark.parametrize(("device", "planned"), [("cpu", "0.90"), ("cuda", "0.80")])
def test_what_a_run_took_is_told_from_what_the_process_had_taken(
    before: Any, after: Any, said: str, device: str, planned: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """In MB; a GPU's allocator does not count its context."""
    plan = SimpleNamespace(peak_bytes=900_000_000, fixed={"context": 100_000_000})
    found = [HeldMemory(now and now * 10**6, peak * 10**6) for now, peak in (before, after)]
    monkeypatch.setattr(memory_plan, "held_memory", lambda _: found[1])
    with caplog.at_level(logging.INFO, "burnish.training.memory_plan"):
        memory_plan.compare_with_plan(cast(Plan, plan), torch.device(device), found[0])
    assert caplog.messages == [f"memory: {said}, {planned} GB planned"]


def test_what_is_held_before_a_run_is_measured_before_its_weights_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    original = burnish.trainers.sft.SFTStage.load
    monkeypatch.setattr(learner, "held_memory", lambda _: order.append("measured"))
    monkeypatch.setattr(
        burnish.trainers.sft.SFTStage, "load", lambda *args: (order.append("loaded"), original(*args))[1]
    )
    trainer("SFT", tmp_path)
    assert order == ["measured", "loaded"]


def test_auto_is_the_device(tmp_path: Path) -> None:
    made = trainer("SFT", tmp_path, memory_budget="auto")
    assert made._memory_plan.device.memory_bytes == find_device("cpu").memory_bytes


def test_ranks_on_a_cpu_divide_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    made = trainer("SFT", tmp_path, memory_budget="auto")
    assert made._memory_plan.device.memory_bytes == find_device("cpu").memory_bytes // 4


def test_the_longest_row_decides_the_length(tmp_path: Path) -> None:
    run = trainer("DPO", tmp_path, max_length=None)._memory_plan.run
    longest = max(len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"]) for row in PAIRS)
    assert longest <= run.prompt_tokens + 2 * run.completion_tokens <= longest + 10


@pytest.mark.parametrize("value", ["8", "GB", "-1GB", "0GB", 8])
def test_bad_sizes(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"memory_budget = .*(use a size such as 8GB|expected)"):
        trainer("SFT", tmp_path, memory_budget=value)


def test_no_setting_keeps_a_budget_below_the_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"memory_budget = '0.1GB': the run takes 0.65 GB .* give it more memory"):
        trainer("SFT", tmp_path, memory_budget="0.1GB")


@pytest.mark.parametrize("budget", [None, "20GB"])
def test_what_cannot_fit_is_refused_before_weights_are_read(
    budget: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_plan, "find_device", lambda _: find_device("24GB"))
    monkeypatch.setattr(burnish.trainers.sft.SFTStage, "load", lambda *_: pytest.fail("weights are read"))
    field = "check_memory = True" if budget is None else "memory_budget = '20GB'"
    fix = r"set (\w+\.)?\w+ = .*quantization_config = \"nf4\""
    with pytest.raises(ConfigError, match=rf"{field}: the run takes \d+\.\d\d GB \(update\).*{fix}"):
        trainer("SFT", tmp_path, model="meta-llama/Llama-3.1-8B", memory_budget=budget)


def test_check_memory_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "find_device", lambda _: find_device("0.5GB"))
    with pytest.raises(ConfigError, match="check_memory = True"):
        trainer("SFT", tmp_path)
    assert not trainer("SFT", tmp_path, check_memory=False)._memory_plan.fits


def test_dimensions_that_are_not_known(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "bloom", vocab_size=96, hidden_size=32, n_layer=1, n_head=4, eos_token_id=0, bos_token_id=0, pad_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match=r"memory_budget = '8GB': the planner does not know .* leave the field out"):
        trainer("SFT", tmp_path, model=model, memory_budget="8GB")


@pytest.mark.parametrize(
    ("given", "expected"),
    [("nf4", "nf4"), ({"load_in_8bit": True}, {"load_in_8bit": True}),
     ({"load_in_4bit": True, "quant_method": "bitsandbytes"},
      {"load_in_4bit": True, "bnb_4bit_use_double_quant": False})],
)  # fmt: skip
def test_quantisations_are_reduced_to_what_decides_their_bytes(given: Any, expected: Any) -> None:
    assert memory_plan._quantization(given) == expected


def test_the_command_shows_what_a_budget_chooses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["plan", "Qwen3-0.6B", "--device", "H100", "--training.memory_budget=4GB", "--lora"]
    main([*words, "--json", str(tmp_path / "plan.json")])
    shown = capsys.readouterr().out
    assert "memory_budget = 4GB: the run takes " in shown
    assert "fits: " in shown
    plan = json.loads((tmp_path / "plan.json").read_text())["plans"][0]
    assert plan["chosen"]
    assert plan["device"]["memory_bytes"] == 4_000_000_000
