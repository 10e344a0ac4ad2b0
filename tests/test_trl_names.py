"""Constructors, fields and metrics by TRL's names: the same here, or refused with what to do instead."""

from __future__ import annotations

import inspect
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import burnish
import tiny
from burnish import ConfigError, DataError, SFTConfig, SFTTrainer
from burnish.config import Kind, check_fields, elsewhere, known_fields
from burnish.config.compat import translated_names
from conftest import load_script
from test_preference_trainer import LABELLED, PAIRS, dpo, kto
from test_reward_trainer import trainer as reward
from test_trainers import PROMPTS, TEXTS, digits, grpo, settings

ROOT = Path(__file__).parent.parent
TRL = ROOT / ".venv-trl" / "bin" / "python"

STAGES: dict[str, Kind] = {"SFT": "sft", "Reward": "reward", "DPO": "dpo", "KTO": "kto", "GRPO": "grpo", "RLOO": "rloo"}

# Constructors of TRL 1.16, in the order of their positional parameters; the slow test asks TRL itself.
ARGUMENTS = {
    "SFT": "model args data_collator train_dataset eval_dataset processing_class compute_loss_func compute_metrics "
    "callbacks optimizers optimizer_cls_and_kwargs preprocess_logits_for_metrics quantization_config peft_config "
    "formatting_func",
    "Reward": "model args data_collator train_dataset eval_dataset processing_class compute_metrics callbacks "
    "optimizers optimizer_cls_and_kwargs preprocess_logits_for_metrics quantization_config peft_config",
    "DPO": "model ref_model args data_collator train_dataset eval_dataset processing_class compute_metrics callbacks "
    "optimizers quantization_config peft_config",
    "KTO": "model ref_model args data_collator train_dataset eval_dataset processing_class compute_metrics callbacks "
    "optimizers quantization_config peft_config",
    "GRPO": "model reward_funcs args train_dataset eval_dataset processing_class reward_processing_classes callbacks "
    "optimizers quantization_config peft_config tools rollout_func environment_factory",
    "RLOO": "model reward_funcs args train_dataset eval_dataset processing_class reward_processing_classes callbacks "
    "optimizers quantization_config peft_config",
}  # fmt: skip

# Defaults that differ on purpose; docs/trl.md says why.
OTHER_DEFAULTS = {
    "gradient_checkpointing": (True, None),
    "loss_type": (["sigmoid"], "sigmoid"),
    "train_sampling_strategy": ("sequential", "random"),
    "disable_dropout": (False, True),
    "use_bias_correction_kl": (True, None),
}

# Metrics of TRL's without one here; docs/trl.md says why.
NO_METRICS = {
    "DPO": {"logits/chosen", "logits/rejected", "entropy"},
    "KTO": {"logits/chosen", "logits/rejected", "entropy"},
    **{
        name: {
            "clip_ratio/high_max",
            "clip_ratio/low_min",
            "completions/max_terminated_length",
            "completions/mean_terminated_length",
            "completions/min_terminated_length",
            "step_time",
        }
        for name in ("GRPO", "RLOO")
    },
}  # fmt: skip


@pytest.mark.parametrize("stage", ARGUMENTS)
def test_constructors_take_trl_s_arguments_in_trl_s_order(stage: str) -> None:
    parameters = inspect.signature(getattr(burnish, f"{stage}Trainer").__init__).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    theirs = ARGUMENTS[stage].split()
    assert positional[1 : len(theirs) + 1] == theirs
    assert positional[len(theirs) + 1 :] == (ARGUMENTS["GRPO"].split()[-3:] if stage == "RLOO" else [])


def made(stage: str, folder: Path, **arguments: Any) -> Any:
    trainer = getattr(burnish, f"{stage}Trainer")
    config = getattr(burnish, f"{stage}Config")
    online = {"reward_funcs": digits} if stage == "GRPO" else {}
    rows = {"SFT": TEXTS, "KTO": LABELLED, "GRPO": PROMPTS}.get(stage, PAIRS)
    given = {"train_dataset": rows, "processing_class": tiny.tokenizer(), **online, **arguments}
    return trainer(tiny.model(), args=config(**settings(folder, per_device_train_batch_size=8)), **given)


def some_function(*args: Any) -> None:
    """Anything that can be called."""


@pytest.mark.parametrize(
    ("stage", "name", "fix"),
    [
        ("SFT", "data_collator", "prepare the rows instead"),
        ("SFT", "compute_loss_func", "override the loss of a stage"),
        ("SFT", "compute_metrics", "read the metrics of evaluate"),
        ("SFT", "preprocess_logits_for_metrics", "does not keep the logits of a batch"),
        ("Reward", "data_collator", "prepare the rows instead"),
        ("Reward", "compute_metrics", "read the metrics of evaluate"),
        ("DPO", "data_collator", "prepare the rows instead"),
        ("KTO", "data_collator", "prepare the rows instead"),
    ],
)
def test_an_argument_without_a_place_says_what_to_do(tmp_path: Path, stage: str, name: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} = some_function: .*{fix}"):
        made(stage, tmp_path, **{name: some_function})


@pytest.mark.parametrize("stage", ["SFT", "Reward", "DPO", "KTO"])
def test_rows_in_the_place_of_the_collator_are_named(tmp_path: Path, stage: str) -> None:
    with pytest.raises(ConfigError, match=r"data_collator = list: .* by position, .* pass rows as train_dataset"):
        made(stage, tmp_path, data_collator=TEXTS)


def test_arguments_of_another_trainer_are_refused(tmp_path: Path) -> None:
    other = burnish.DPOConfig(**settings(tmp_path))
    with pytest.raises(ConfigError, match="args = DPOConfig: use a SFTConfig"):
        SFTTrainer(tiny.model(), other, train_dataset=TEXTS, processing_class=tiny.tokenizer())  # type: ignore[arg-type]


def test_a_formatting_function_makes_texts(tmp_path: Path) -> None:
    rows = [{"question": f"{i}+{i}", "answer": str(2 * i), "messages": None} for i in range(6)]
    args = SFTConfig(**settings(tmp_path, max_steps=1))
    tokenizer = tiny.tokenizer()
    trainer = SFTTrainer(
        tiny.model(), args, train_dataset=rows, eval_dataset=rows[:2], processing_class=tokenizer,
        formatting_func=lambda row: f"{row['question']}={row['answer']}",
    )  # fmt: skip
    groups: Any = trainer.train_dataset
    assert groups[3].completions[0].token_ids == [*tokenizer("3+3=6")["input_ids"], tokenizer.eos_token_id]
    trainer.train()
    with pytest.raises(DataError, match="row 0: formatting_func returned list: return one string for one row"):
        SFTTrainer(
            tiny.model(), args, train_dataset=rows, processing_class=tokenizer,
            formatting_func=lambda row: [row["question"]],  # type: ignore[arg-type, return-value]
        )  # fmt: skip


@pytest.mark.parametrize("stage", ["SFT", "Reward"])
def test_an_optimizer_class_is_used(tmp_path: Path, stage: str) -> None:
    trainer = made(stage, tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5, "momentum": 0.25}))
    trainer.train()
    own = trainer.optimizer.optimizer
    assert isinstance(own, torch.optim.SGD)
    assert own.param_groups[0]["momentum"] == 0.25
    with pytest.raises(ConfigError, match="both name an optimizer"):
        made(stage, tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {}), optimizers=(own, None))


@pytest.mark.parametrize(
    ("config", "field", "message"),
    [
        ("SFT", {"max_seq_length": 512}, r"^max_seq_length = 512: not a field of burnish; its name is max_length\.$"),
        ("SFT", {"packing_strategy": "wrapped"}, r"^packing_strategy = 'wrapped': .* truncation_mode"),
        ("SFT", {"learning_rat": 1.0}, r"^learning_rat = 1\.0: unknown field; did you mean learning_rate"),
        ("SFT", {"evaluation_strategy": "no"}, r"unknown field; did you mean eval_strategy"),
        ("DPO", {"rpo_alpha": 1.0}, r'^rpo_alpha = 1\.0: .*loss_type = \["sigmoid", "sft"\]'),
        ("DPO", {"max_prompt_length": 128}, r"set max_length"),
        ("DPO", {"truncation_mode": "keep_end"}, r"cut at their end; raise max_length"),
        ("Reward", {"chat_template_path": "x", "chat_template": "chatml"}, r"are one field: set chat_template alone"),
        ("GRPO", {"disable_dropout": False}, r"^disable_dropout = False: samples are drawn without dropout"),
        ("OnlineDPO", {"max_new_tokens": 64}, r"its name is max_completion_length"),
    ],
)
def test_a_config_in_python_says_what_to_do(config: str, field: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        getattr(burnish, f"{config}Config")(**field)


@pytest.mark.parametrize("kind", [*STAGES.values(), "online_dpo"])
def test_a_field_that_asks_for_what_happens_anyway_is_dropped(kind: Kind) -> None:
    for name, there in elsewhere(kind).items():
        if name in known_fields(kind):
            continue
        assert ";" in there.fix or there.fix.startswith(("set ", "its name is", "pass ", "load "))
        for neutral in there.neutral if isinstance(there.neutral, tuple) else (there.neutral,):
            assert check_fields(kind, {name: neutral}) == {}
        with pytest.raises(ConfigError, match=rf"^\[training\] {name}"):
            check_fields(kind, {name: ["other"]})


MET = [
    (
        "sft",
        {"packing": True, "padding_free": True, "pad_to_multiple_of": 8, "dataset_num_proc": 4, "use_cache": False},
    ),
    ("dpo", {"use_liger_kernel": True, "use_liger_loss": True, "padding_value": 0, "precompute_ref_batch_size": 4}),
    (
        "grpo",
        {
            "vllm_group_port": 1,
            "cache_implementation": "static",
            "dataloader_num_workers": 2,
        },
    ),
]


@pytest.mark.parametrize(("kind", "fields"), MET)
def test_fields_whose_intent_is_met_are_named_in_one_line(
    kind: Kind, fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="burnish.config"):
        assert check_fields(kind, fields) == {}
    assert len(caplog.records) == 1
    named = caplog.records[0].getMessage().partition(": ")[2].split(", ")
    assert named == sorted(set(fields) - {"use_cache"})


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        ({"generation_batch_size": 32, "per_device_train_batch_size": 8},
         {"steps_per_generation": 4, "per_device_train_batch_size": 8}),
        ({"generation_kwargs": {"top_p": 0.9, "repetition_penalty": 1.1, "do_sample": True, "stop_strings": "#"}},
         {"top_p": 0.9, "repetition_penalty": 1.1, "stop": ["#"]}),
    ],
)  # fmt: skip
def test_fields_that_say_it_in_another_way_are_rewritten(given: dict[str, Any], means: dict[str, Any]) -> None:
    assert check_fields("grpo", given) == means


def test_shuffled_rows_are_rows_in_random_order() -> None:
    assert check_fields("sft", {"shuffle_dataset": True}) == {"train_sampling_strategy": "random"}
    assert check_fields("sft", {"shuffle_dataset": False}) == {}
    with pytest.raises(ConfigError, match="are one field: set train_sampling_strategy alone"):
        check_fields("sft", {"shuffle_dataset": True, "train_sampling_strategy": "sequential"})


def test_the_page_of_trl_s_names_is_of_this_version() -> None:
    script = load_script("write_trl_page")
    stored = json.loads(script.STORED.read_text())
    assert script.PAGE.read_text() == script.page(stored), "python scripts/write_trl_page.py"
    for stage, arguments in ARGUMENTS.items():
        assert stored[stage]["arguments"] == arguments.split()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"generation_kwargs": {"num_beams": 4}}, r"generation_kwargs\['num_beams'\] = 4: .* use max_new_tokens"),
        ({"generation_kwargs": {"temperature": 0.5}, "temperature": 0.7}, "are one field: set temperature alone"),
        ({"generation_kwargs": [1]}, "use a table"),
        ({"generation_batch_size": 12}, "use a multiple of 8"),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, "are one field: set warmup_steps alone"),
        ({"warmup_ratio": 2.0}, "set warmup_steps to the fraction"),
    ],
)
def test_fields_without_a_counterpart_say_so(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_fields("grpo", given)


@pytest.mark.parametrize(
    ("stage", "given", "message"),
    [
        ("SFT", {"tokenizer": 1}, "^tokenizer = 1: SFTTrainer has no such argument; it is processing_class now"),
        ("SFT", {"max_seq_length": 512}, "of args, its name is max_length"),
        ("SFT", {"packing": True}, "of args, batches count rows"),
        ("DPO", {"beta": 0.1}, r"it is a field of args: DPOConfig\(beta=...\)"),
        ("KTO", {"max_length": 9}, r"KTOConfig\(max_length=...\)"),
        ("Reward", {"max_length": 9}, r"RewardConfig\(max_length=...\)"),
        ("GRPO", {"reward_model": "x"}, "pass it as reward_funcs"),
        ("RLOO", {"config": 1}, "it is args now"),
        ("SFT", {"train_datset": 1}, "did you mean train_dataset"),
        ("SFT", {"dataset_text_field": "text"}, r"it is a field of args: SFTConfig\(dataset_text_field=...\)"),
        ("SFT", {"chars_per_token": 3.6}, "packed by their tokens"),
        ("SFT", {"num_of_sequences": 1024}, "packed by their tokens"),
        ("SFT", {"infinite": True}, "set max_steps"),
        ("SFT", {"beta": 0.1}, "and args has no such field; it is a field of dpo, kto, online_dpo, grpo, rloo, ppo"),
        ("SFT", {"model_init": 1}, "pass the model as model"),
        ("Reward", {"tokenizer": 1}, "it is processing_class now"),
        ("Reward", {"formatting_func": 1}, "only SFTTrainer takes one"),
        ("DPO", {"tokenizer": 1}, "it is processing_class now"),
        ("DPO", {"max_target_length": 9}, "limits prompt and completion together"),
        ("DPO", {"loss_type": "ipo"}, r"DPOConfig\(loss_type=...\)"),
        ("DPO", {"precompute_ref_log_probs": True}, r"DPOConfig\(precompute_ref_log_probs=...\)"),
        ("KTO", {"tokenizer": 1}, "it is processing_class now"),
        ("KTO", {"beta": 0.1}, r"KTOConfig\(beta=...\)"),
        ("GRPO", {"generation_config": 1}, "set the sampling fields of args"),
        ("GRPO", {"max_prompt_length": 9}, r"GRPOConfig\(max_prompt_length=...\)"),
        ("RLOO", {"policy": 1}, "it is model now"),
        ("RLOO", {"ref_policy": 1}, "it is ref_model now"),
        ("RLOO", {"data_collator": 1}, "prepare the rows instead"),
        ("PPO", {"tokenizer": 1}, "it is processing_class now"),
        ("PPO", {"reward_processing_class": 1}, "it is reward_processing_classes now"),
        ("PPO", {"kl_coef": 0.1}, r"PPOConfig\(kl_coef=...\)"),
        ("PPO", {"generation_kwargs": {}}, "of args"),
        ("OnlineDPO", {"judge": 1}, "scores each completion in reward_funcs"),
        ("OnlineDPO", {"reward_processing_class": 1}, "it is reward_processing_classes now"),
        ("GRPO", {"args": None, "model": None}, "GRPOTrainer: multiple values for argument 'model'"),
    ],
)
def test_an_argument_of_an_older_trainer_says_where_it_lives(
    stage: str, given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        # PPO's first argument by position is args.
        getattr(burnish, f"{stage}Trainer")(*(() if stage == "PPO" else ("model",)), **given)


def test_a_constructor_without_arguments_names_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"SFTTrainer: missing a required argument: 'model'"):
        SFTTrainer()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    with pytest.raises(ConfigError, match=r"PPOTrainer .* it is args now"):
        burnish.PPOTrainer(config=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def test_no_field_is_both_there_and_elsewhere() -> None:
    both = {(kind, name) for kind in STAGES.values() for name in elsewhere(kind) if name in known_fields(kind)}
    assert not both


def test_dropout_of_adapters_is_off_online(tmp_path: Path) -> None:
    """With it the sampled policy would not be the trained one, and the check of both would stop the run."""
    from peft import LoraConfig

    lora = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    grpo(tmp_path, peft_config=lora).train()


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not TRL.is_file():
        pytest.skip("TRL's environment is not there: make trl")
    folder = tmp_path_factory.mktemp("names")
    tiny.model().save_pretrained(folder / "policy")
    tiny.tokenizer().save_pretrained(folder / "policy")
    rows = {"SFT": TEXTS, "Reward": PAIRS, "DPO": PAIRS, "KTO": LABELLED, "GRPO": PROMPTS, "RLOO": PROMPTS}
    (folder / "rows.json").write_text(json.dumps(rows))
    worker = Path(__file__).parent / "trl_names.py"
    done = subprocess.run([TRL, "-W", "ignore", worker, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "names.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_trl_s_constructors_are_as_written_here(names: dict[str, Any], stage: str) -> None:
    assert names[stage]["arguments"] == ARGUMENTS[stage].split()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_every_field_of_trl_s_is_known_or_explained(names: dict[str, Any], stage: str) -> None:
    kind = STAGES[stage]
    for name, theirs in names[stage]["fields"].items():
        there = elsewhere(kind).get(name)
        if name in known_fields(kind):
            ours = known_fields(kind)[name].default
            assert ours == theirs or OTHER_DEFAULTS.get(name) == (theirs, ours), name
        elif there is None:
            assert name in translated_names(kind), name
        else:
            neutral = there.neutral if isinstance(there.neutral, tuple) else (there.neutral,)
            assert theirs in neutral or OTHER_DEFAULTS.get(name) == (theirs, *neutral), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_every_field_of_trl_s_can_stand_on_a_command_line(names: dict[str, Any], stage: str, tmp_path: Path) -> None:
    """Each at TRL's default, in the words that TRL's own parser takes."""
    words = ["--output_dir", str(tmp_path)]
    wanted: dict[str, Any] = {}
    for name, value in names[stage]["fields"].items():
        if value is None or name in OTHER_DEFAULTS or name == "output_dir":
            continue
        words += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
        wanted[name] = value
    config = getattr(burnish, f"{stage}Config")
    (args,) = burnish.TrlParser(config).parse_args_and_config(words)
    for name in set(wanted) & set(known_fields(STAGES[stage])):
        assert getattr(args, name) == wanted[name], name


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_trl_s_metrics_have_our_names(tmp_path: Path, names: dict[str, Any], stage: str) -> None:
    evaluated = {"max_steps": 1, "per_device_eval_batch_size": 4, "eval_strategy": "steps", "eval_steps": 1}
    trainer: Any
    match stage:
        case "SFT":
            args = SFTConfig(**settings(tmp_path, **evaluated))
            trainer = SFTTrainer(
                tiny.model(), args, train_dataset=TEXTS, eval_dataset=TEXTS, processing_class=tiny.tokenizer()
            )
        case "Reward":
            trainer = reward(tmp_path, evaluated=PAIRS, **evaluated)
        case "DPO":
            trainer = dpo(tmp_path, eval_dataset=PAIRS, **evaluated)
        case "KTO":
            trainer = kto(tmp_path, eval_dataset=LABELLED, **evaluated)
        case _:
            args = getattr(burnish, f"{stage}Config")(
                **settings(tmp_path, **evaluated, per_device_train_batch_size=8, num_generations=4, beta=0.1),
                max_completion_length=8,
            )
            trainer = getattr(burnish, f"{stage}Trainer")(
                tiny.model(), digits, args, PROMPTS, PROMPTS, processing_class=tiny.tokenizer()
            )
    trainer.train()
    ours = {name for log in trainer.state.log_history for name in log}
    theirs = {name.replace("rewards/length/", "rewards/digits/") for name in names[stage]["metrics"]}
    without = {name for name in theirs - ours if not name.startswith("eval_")}
    assert without == NO_METRICS.get(stage, set())
