"""Arguments, parser, data sets and adapters of training scripts, and configs that argument parsers fill."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import HfArgumentParser

import burnish
from burnish import (
    ConfigError,
    DatasetConfig,
    DatasetMixtureConfig,
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    MissingName,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)
from burnish.config import Kind, elsewhere, known_fields
from burnish.config.compat import NO_IMPORTS

CONFIGS: dict[Kind, Any] = {
    "sft": burnish.SFTConfig,
    "reward": burnish.RewardConfig,
    "dpo": burnish.DPOConfig,
    "kto": burnish.KTOConfig,
    "online_dpo": burnish.OnlineDPOConfig,
    "grpo": burnish.GRPOConfig,
    "rloo": burnish.RLOOConfig,
    "ppo": burnish.PPOConfig,
}
FOUR = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)


def parsed(words: str, *types: Any) -> Any:
    return TrlParser(types or FOUR).parse_args_and_config(words.split())


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_argument_parser_of_transformers_fills_every_config(kind: Kind, tmp_path: Path) -> None:
    before = {name: info.type for name, info in known_fields(kind).items()}
    words = [
        "--output_dir",
        str(tmp_path),
        "--bf16",
        "false",
        "--model_init_kwargs",
        '{"revision": "v1"}',
        "--seed",
        "7",
    ]
    (config,) = HfArgumentParser(CONFIGS[kind]).parse_args_into_dataclasses(words)
    wanted = CONFIGS[kind](output_dir=str(tmp_path), bf16=False, model_init_kwargs={"revision": "v1"}, seed=7)
    assert config.to_dict() == wanted.to_dict()
    known_fields.cache_clear()  # the parser writes types into the fields of the class it is given
    assert {name: info.type for name, info in known_fields(kind).items()} == before


VALUES: dict[str, tuple[str, Any]] = {
    "bf16": ("", True),
    "resume_from_checkpoint": ("", True),
    "log_metrics": ("logs", "logs"),
    "max_dead_steps": ("none", None),
    "token_budget": ("4096", 4096),
    "model_init_kwargs": ('{"dtype":"float32"}', {"dtype": "float32"}),
    "max_length": ("None", None),
    "completion_only_loss": ("no", False),
    "chat_template": ("123", "123"),
    "center_rewards_coefficient": ("0.01", 0.01),
    "ld_alpha": ("1", 1.0),
    "loss_weights": ("1 0.5", [1.0, 0.5]),
    "vllm_server_base_url": ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
    "reward_weights": ("1 0.5", [1.0, 0.5]),
    "reward_clip_range": ("-1 1", [-1.0, 1.0]),
    "scale_rewards": ("false", False),
    "log_completions": ("", True),
    "stop": ("a b", ["a", "b"]),
    "chat_template_kwargs": ("{enable_thinking=false}", {"enable_thinking": False}),
    "overlong_buffer": ("0.25", 0.25),
    "epsilon_high": ("0.28", 0.28),
    "use_bias_correction_kl": ("false", False),
    "steps_per_generation": ("2", 2),
    "cliprange_value": ("none", None),
    "compile_rollouts": ("false", False),
    "sampling_correction": ("token_mask", "token_mask"),
    "rollout_cache_dtype": ("int8", "int8"),
}
"""Field -> words of the command line, and what they mean: every union that a config has."""


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_words_become_values_in_the_type_of_the_field(kind: Kind, parser: Any, tmp_path: Path) -> None:
    own = {name for name, info in known_fields(kind).items() if info.own}
    words, wanted = ["--output_dir", str(tmp_path)], {}
    for name, (text, value) in VALUES.items():
        if name in own and not (name == "completion_only_loss" and kind != "sft"):
            words += [f"--{name}", *text.split()]
            wanted[name] = value
    if kind == "dpo":
        words, wanted = [*words, "--loss_type", "sigmoid", "sft"], {**wanted, "loss_type": ["sigmoid", "sft"]}
    # A word of two meanings is one of the field's: yes and no are those of bool.
    words = ["false" if word == "no" else word for word in words]
    (config,) = parser(CONFIGS[kind]).parse_args_into_dataclasses(words)
    assert {name: getattr(config, name) for name in wanted} == wanted


def test_every_union_of_a_config_is_tried() -> None:
    unions = {
        name
        for kind in CONFIGS
        for name, info in known_fields(kind).items()
        if info.own and "|" in info.type and not info.type.startswith(("int |", "float |", "str | None"))
    }
    assert unions - set(VALUES) == {"loss_type"}


def test_a_parser_leaves_to_the_algorithm_what_nobody_set(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--algorithm", "reinforce_pp"]
    for parser in (HfArgumentParser, TrlParser):
        (config,) = parser(GRPOConfig).parse_args_into_dataclasses(words)
        assert (config.kl_in, config.beta) == ("reward", 0.01)
    # TrlParser knows that a default was asked for; HfArgumentParser cannot.
    (config,) = TrlParser(GRPOConfig).parse_args_into_dataclasses([*words, "--beta", "0.0"])
    assert config.beta == 0.0
    assert dataclasses.replace(config, seed=3).beta == 0.0
    with pytest.raises(ConfigError, match=r"kl_in = 'loss' with algorithm"):
        TrlParser(GRPOConfig).parse_args_into_dataclasses([*words, "--kl_in", "loss"])


LINES = {
    SFTConfig: "--learning_rate 2.0e-5 --num_train_epochs 1 --packing --per_device_train_batch_size 2 --eos_token "
    "<eos> --eval_strategy steps --eval_steps 100 --gradient_checkpointing --no_remove_unused_columns --push_to_hub "
    "--dataset_num_proc 4 --chat_template_path folder --warmup_ratio 0.1 --use_liger_kernel --bf16 --no_packing",
    DPOConfig: "--learning_rate 5.0e-6 --max_steps 1000 --gradient_accumulation_steps 8 --no_remove_unused_columns "
    "--loss_type sigmoid bco_pair sft --loss_weights 0.8 0.2 1.0 --beta 0.1 --precompute_ref_log_probs",
    KTOConfig: "--learning_rate 5e-7 --lr_scheduler_type=cosine --warmup_steps 0.1 --logging_first_step --bf16 "
    "--eval_steps 500",
    GRPOConfig: "--max_completion_length 128 --num_generations 4 --use_vllm False --log_completions --epsilon_high 0.28"
    " --scale_rewards none --no_mask_truncated_completions --vllm_mode colocate --no-shuffle-dataset "
    "--gradient_checkpointing_kwargs {\"use_reentrant\":false} --generation_kwargs {\"top_p\":0.9}",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("config", LINES)
def test_command_lines_for_trl_are_understood(config: Any, tmp_path: Path) -> None:
    model = "--use_peft --load_in_4bit --lora_target_modules=all-linear --lora_r=16 --lora_alpha=16"
    _, args, model_args, _ = parsed(
        f"--model_name_or_path m --dataset_name d --output_dir {tmp_path} {LINES[config]} {model}",
        ScriptArguments, config, ModelConfig, DatasetMixtureConfig,
    )  # fmt: skip
    assert model_args == ModelConfig(
        model_name_or_path="m", use_peft=True, load_in_4bit=True, lora_target_modules=["all-linear"], lora_alpha=16
    )
    if config is SFTConfig:
        assert (args.warmup_steps, args.chat_template, args.bf16) == (0.1, "folder", True)
    if config is GRPOConfig:
        assert (args.scale_rewards, args.top_p, args.log_completions) == ("none", 0.9, True)
        assert args.shuffle_dataset is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--learning_rat 1", r"^--learning_rat: unknown in the command line, did you mean learning_rate"),
        ("--learning_rate fast", r"^argument --learning_rate.*: invalid float value: 'fast'; --help lists"),
        ("--max_length long", r"^max_length = 'long': expected int \| None, got str"),
        ("--max_length -3", r"^max_length = -3"),
        ("--packing_strategy wrapped", r"^packing_strategy = 'wrapped': .* truncation_mode"),
        ("--max_seq_length 512", r"its name is max_length"),
        ("--config", r"^--config: without a file; write --config FILE"),
        ("--config nowhere.yaml", r"nowhere.yaml: cannot be read"),
        ("--lora_r 0.5", r"--lora_r.*invalid int value"),
        ("--dtype float8", r"^dtype = 'float8': use one of auto"),
        ("--load_in_4bit --load_in_8bit", r"are both set"),
        ("--test_split_size 1.5", r"^test_split_size = 1.5: use a fraction"),
        ("stray", r"^stray: unknown in the command line"),
    ],
)
def test_a_bad_word_is_named_with_what_to_do(words: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(f"--output_dir {tmp_path} {words}")


def test_a_file_sets_what_the_command_line_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BURNISH_TEST_VARIABLE", raising=False)
    monkeypatch.setattr(os, "environ", {**os.environ})
    file = tmp_path / "config.yaml"
    file.write_text(
        f"output_dir: {tmp_path}\nlearning_rate: 1e-4\nmax_length: 64\npacking: true\nuse_peft: true\nlora_r: 4\n"
        "lora_target_modules: [q_proj, v_proj]\nenv: {BURNISH_TEST_VARIABLE: 3}\n"
        "datasets:\n  - path: a.jsonl\n    columns: [text]\n  - path: b\n    split: test\ntest_split_size: 0.25\n"
    )
    for words in (f"--config {file} --max_length 32", f"--max_length=32 --config={file}"):
        script, args, model, data = parsed(words)
        assert script == ScriptArguments()
        assert (args.learning_rate, args.max_length) == (1e-4, 32)
        assert (model.lora_r, model.lora_target_modules) == (4, ["q_proj", "v_proj"])
        assert data.datasets == [DatasetConfig("a.jsonl", columns=["text"]), DatasetConfig("b", split="test")]
        assert data.test_split_size == 0.25
    assert os.environ["BURNISH_TEST_VARIABLE"] == "3"


def test_names_of_a_file_that_nothing_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"output_dir: {tmp_path}\nlearning_rat: 1.0\nnum_processes: 2\n")
    words = ["--config", str(file), "--verbos", "1"]
    with pytest.raises(ConfigError, match=r"^--learning_rat: unknown in .*config.yaml, did you mean learning_rate"):
        TrlParser(FOUR).parse_args_and_config(words)
    assert len(TrlParser(FOUR).parse_args_and_config(words[:2], fail_with_unknown_args=False)) == 4
    assert "ignored: --learning_rat: unknown in" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--verbos: unknown in the command line"):
        TrlParser(FOUR).parse_args_and_config(words, fail_with_unknown_args=False)
    left = ["--learning_rat", "1.0", "--num_processes", "2"]
    assert TrlParser(FOUR).parse_args_and_config(words, return_remaining_strings=True)[4] == [*left, "--verbos", "1"]
    apart = TrlParser(FOUR).parse_args_and_config(words, True, True, True)
    assert apart[4:] == (left, ["--verbos", "1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "contains list instead of tables"),
        ("env: 3", "env = 3: use a table"),
        ("a: 1\na: 2", "'a' is given twice"),
        ("lora_r: [1]", r"\[ModelConfig\] lora_r = \[1\]: expected int"),
        ("use_peft: maybe", r"--use_peft.*Truthy value expected"),
        ("datasets: {path: x}", "datasets = {'path': 'x'}: use a list of tables"),
        ("datasets: [{pat: x}]", r"datasets\[0\].pat is unknown"),
        ("datasets: [{split: x}]", r"path is missing"),
        ("datasets: [{path: 3}]", r"path = 3: expected str"),
        ("datasets: [{path: a, fraction: 0.5}, {path: b}]", "fraction = .*set it for every data set"),
        ("datasets: [{path: a, fraction: -1}]", "fraction = -1.0: use a finite number above 0"),
        ("streaming: true\ntest_split_size: 0.5", "streaming = true with test_split_size"),
        ("datasets: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_a_bad_file_is_named_with_what_to_do(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        parsed(f"--output_dir {tmp_path} --config {file}")


def test_dataclasses_of_a_script_s_own(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Own:
        needed: int
        word: str = "alpha"
        flag: bool = True

    Own.__annotations__ = {"needed": int, "word": str, "flag": bool}
    file = tmp_path / "own.toml"
    file.write_text("needed = 23\n")
    assert TrlParser(Own).parse_args_and_config(["--config", str(file)]) == (Own(23),)
    assert TrlParser([Own]).parse_args_and_config(["--needed", "5", "--no_flag"]) == (Own(5, flag=False),)
    with pytest.raises(ConfigError, match="required: --needed"):
        TrlParser(Own).parse_args_and_config([])
    parser = TrlParser(Own)
    parser.add_argument("--more", default=2)
    assert parser.parse_args_and_config(["--needed", "1"])[1] == argparse.Namespace(more=2)
    assert dataclasses.replace(Own(1), needed=2) == Own(2)

    @dataclasses.dataclass
    class Taken:
        config: int = 1

    Taken.__annotations__ = {"config": int}
    with pytest.raises(ConfigError, match="Taken has a field config"):
        TrlParser(Taken)


def test_help_shows_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        TrlParser((SFTConfig, ModelConfig)).parse_args_and_config(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Rank of the adapters. (default: 16)" in shown
    assert "--packing" not in shown


def test_a_parser_in_a_subcommand(tmp_path: Path) -> None:
    parser = TrlParser()
    commands = parser.add_subparsers()
    commands.add_parser("sft", help="train", dataclass_types=[ScriptArguments])
    assert parser.set_defaults_with_config(dataset_name="rows", other=1) == ["--other", "1"]
    assert parser.parse_args(["sft"]).dataset_name == "rows"


def test_model_arguments_become_adapters() -> None:
    assert get_peft_config(ModelConfig()) is None
    lora = get_peft_config(ModelConfig(use_peft=True, lora_r=8, lora_modules_to_save=["lm_head"], use_rslora=True))
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.task_type) == (8, 32, 0.05, "CAUSAL_LM")
    assert (lora.target_modules, lora.modules_to_save, lora.use_rslora) == (None, ["lm_head"], True)


@pytest.mark.parametrize(
    ("given", "target"),
    [
        (["all-linear"], "all-linear"),
        (["q_proj"], {"q_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        ([r".*\.(q|v)_proj"], r".*\.(q|v)_proj"),
    ],
)
def test_one_module_is_not_a_regular_expression(given: list[str], target: Any) -> None:
    assert get_peft_config(ModelConfig(use_peft=True, lora_target_modules=given)).target_modules == target


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_r": 0}, "^lora_r = 0: use a rank"),
        ({"lora_dropout": 1.5}, "^lora_dropout = 1.5: use a number in"),
        ({"lora_task_type": "QA"}, "^lora_task_type = 'QA': use CAUSAL_LM or SEQ_CLS"),
    ],
)
def test_adapters_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_peft_config(ModelConfig(use_peft=True, **fields))


def test_model_arguments_become_a_quantisation() -> None:
    pytest.importorskip("bitsandbytes")
    assert get_quantization_config(ModelConfig()) is None
    four = get_quantization_config(ModelConfig(load_in_4bit=True, use_bnb_nested_quant=True, dtype="bfloat16"))
    assert (four.load_in_4bit, four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert four.bnb_4bit_compute_dtype == torch.bfloat16
    assert get_quantization_config(ModelConfig(load_in_8bit=True)).load_in_8bit
    with pytest.raises(ConfigError, match="bnb_4bit_quant_type = 'int3'"):
        get_quantization_config(ModelConfig(load_in_4bit=True, bnb_4bit_quant_type="int3"))


def rows_file(folder: Path, name: str, count: int, **more: Any) -> str:
    path = folder / name
    path.write_text("".join(json.dumps({"text": f"{name} {i}", **more}) + "\n" for i in range(count)))
    return str(path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def test_data_sets_of_every_kind_become_one(tmp_path: Path) -> None:
    file = rows_file(tmp_path, "a.jsonl", 4, extra=1)
    (tmp_path / "folder").mkdir()
    rows_file(tmp_path / "folder", "train.jsonl", 3)
    saved = tmp_path / "saved"
    DatasetDict({"best": Dataset.from_list([{"text": "s"}] * 2)}).save_to_disk(saved)
    mixture = DatasetMixtureConfig(
        [
            DatasetConfig(file, columns=["text"]),
            DatasetConfig(str(tmp_path / "folder")),
            DatasetConfig(str(saved), split="best"),
            DatasetConfig("json", data_files=[file], columns=["text"]),
        ]
    )
    found = get_dataset(mixture)
    assert list(found) == ["train"]
    assert found["train"].column_names == ["text"]
    assert [text[0] for text in found["train"]["text"]] == [*"aaaa", *"ttt", *"ss", *"aaaa"]
    streamed = get_dataset(dataclasses.replace(mixture, streaming=True))
    assert [row["text"] for row in streamed["train"]] == list(found["train"]["text"])


def test_held_out_rows_are_the_same_each_time(tmp_path: Path) -> None:
    mixture = DatasetMixtureConfig([DatasetConfig(rows_file(tmp_path, "a.jsonl", 12))], test_split_size=0.25)
    first, second = get_dataset(mixture), get_dataset(mixture)
    assert (len(first["train"]), len(first["test"])) == (9, 3)
    assert first["test"]["text"][:] == second["test"]["text"][:]
    assert set(first["train"]["text"]).isdisjoint(first["test"]["text"])
    assert len(get_dataset(dataclasses.replace(mixture, test_split_size=2))["test"]) == 2
    with pytest.raises(ConfigError, match=r"test_split_size = 20.0 of 12 rows"):
        get_dataset(dataclasses.replace(mixture, test_split_size=20))


def test_fractions_use_no_row_twice(tmp_path: Path) -> None:
    a, b = rows_file(tmp_path, "a.jsonl", 100), rows_file(tmp_path, "b.jsonl", 30)
    found = get_dataset(DatasetMixtureConfig([DatasetConfig(a, fraction=1.0), DatasetConfig(b, fraction=3)]))["train"]
    # b is what runs out: 30 rows are three quarters of 40.
    texts = list(found["text"])
    assert texts == [f"a.jsonl {i}" for i in range(10)] + [f"b.jsonl {i}" for i in range(30)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"path": "nowhere.jsonl"}, r"datasets\[0\].path = 'nowhere.jsonl': cannot be loaded"),
        ({"path": "FILE", "split": "validation"}, "cannot be loaded .*validation"),
        ({"path": "FILE", "columns": ["text", "label"]}, "no column 'label'; use some of text"),
        ({"path": "SAVED", "split": "best"}, "split = 'best': use one of train"),
    ],
)
def test_a_data_set_that_is_not_there(spec: dict[str, Any], message: str, tmp_path: Path) -> None:
    names = {"FILE": rows_file(tmp_path, "a.jsonl", 2), "SAVED": str(tmp_path / "saved")}
    DatasetDict({"train": Dataset.from_list([{"text": "s"}])}).save_to_disk(names["SAVED"])
    with pytest.raises(ConfigError, match=message):
        get_dataset(DatasetMixtureConfig([{**spec, "path": names.get(spec["path"], spec["path"])}]))  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="datasets is empty"):
        get_dataset(DatasetMixtureConfig())


def test_quiet_output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    monkeypatch.setattr(root, "level", root.level)
    with warnings.catch_warnings():
        burnish.init_zero_verbose()
        logging.getLogger("burnish.tests").warning("hidden")
        warnings.warn("hidden", stacklevel=1)
        logging.getLogger("burnish.tests").error("shown")
    out, error = capsys.readouterr()
    assert "shown" in out + error
    assert "hidden" not in out + error
    root.manager._clear_cache()  # type: ignore[attr-defined]  # levels are cached by logger


def test_an_import_that_is_not_there_says_so() -> None:
    assert not set(NO_IMPORTS) & set(burnish.__all__)
    for name, fix in NO_IMPORTS.items():
        with pytest.raises(MissingName, match=f"burnish has no {name}: "):
            exec(f"from burnish import {name}")
        assert fix[0].islower() or fix.startswith(("DPOTrainer", "KTOTrainer", "PPOTrainer", "RewardTrainer"))
    with pytest.raises(ImportError, match="cannot import name 'pack_datasets'"):
        exec("from burnish import pack_datasets")


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_parser_knows_every_name_of_trl_s(kind: Kind) -> None:
    options = TrlParser(CONFIGS[kind])._option_string_actions
    assert {f"--{name}" for name in (*known_fields(kind), *elsewhere(kind))} <= set(options)


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ";"), (".csv", ","), (".tsv", "\t"), (".csv", "|")])
@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_a_mixture_are_split_at_their_own_delimiter(
    tmp_path: Path, suffix: str, delimiter: str, streaming: bool
) -> None:
    file = tmp_path / f"rows{suffix}"
    file.write_text(f"prompt{delimiter}completion\na{delimiter}b\n")
    mixture = DatasetMixtureConfig([DatasetConfig(str(file))], streaming=streaming)
    assert list(get_dataset(mixture)["train"]) == [{"prompt": "a", "completion": "b"}]
