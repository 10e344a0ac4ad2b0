from __future__ import annotations

import dataclasses
import enum
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from burnish.config import (
    ALGORITHMS,
    STAGES,
    CommonFields,
    GRPOFields,
    Kind,
    SFTFields,
    apply_algorithm,
    check_fields,
    check_mapping,
    known_fields,
    lora_fields,
    refused_fields,
    training_argument_fields,
)
from burnish.config.declare import GROUPS
from burnish.config.training_arguments import TRAINING_ARGUMENTS
from burnish.errors import ConfigError
from conftest import load_script

EXAMPLES = Path(__file__).parent.parent / "examples"
KINDS: tuple[Kind, ...] = ("sft", "grpo")


def plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value


def test_inherited_fields_are_those_of_training_arguments():
    from transformers import TrainingArguments

    real = {item.name: item for item in dataclasses.fields(TrainingArguments)}
    read = training_argument_fields()
    assert list(read) == list(real)
    for name, item in real.items():
        default = item.default_factory() if item.default is dataclasses.MISSING else plain(item.default)
        assert read[name].default == default, name
        assert not read[name].own


def test_every_inherited_field_is_ours_or_has_a_row():
    """A field of a new version of transformers is looked at before it can be set."""
    ours = set.intersection(*({name for name, info in known_fields(kind).items() if info.own} for kind in STAGES))
    assert set(training_argument_fields()) <= ours | set(TRAINING_ARGUMENTS)
    assert set(TRAINING_ARGUMENTS) <= set(training_argument_fields()), "fields that transformers does not have"
    assert not ours & set(TRAINING_ARGUMENTS), "declared twice"


def test_lora_fields_are_those_of_peft():
    from peft import LoraConfig

    real = {item.name for item in dataclasses.fields(LoraConfig)}
    internal = real - set(lora_fields())
    assert set(lora_fields()) < real
    assert internal == {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "runtime_config",
    }


@pytest.mark.parametrize(("kind", "own"), [("sft", SFTFields), ("grpo", GRPOFields)])
def test_known_fields_hold_own_fields_with_help(kind: Kind, own: type[CommonFields]):
    fields = known_fields(kind)
    for item in dataclasses.fields(own):
        assert fields[item.name].own
        assert fields[item.name].default == item.default
        assert fields[item.name].group in GROUPS
        assert fields[item.name].help.endswith(".")
    assert set(fields) == set(training_argument_fields()) | {item.name for item in dataclasses.fields(own)}


@pytest.mark.parametrize(("kind", "own"), [("sft", SFTFields), ("grpo", GRPOFields)])
def test_own_fields_combine_with_training_arguments(kind: Kind, own: type[CommonFields], tmp_path: Any):
    from transformers import TrainingArguments

    config = dataclasses.make_dataclass("Config", [], bases=(own, TrainingArguments))(output_dir=str(tmp_path))
    assert {item.name for item in dataclasses.fields(config)} == set(known_fields(kind))
    assert config.logging_nan_inf_filter is False
    # A resolved config holds objects where fields were left out: they must not be taken for settings.
    config.check()
    with pytest.raises(ConfigError, match=r"^fp16 = True: .* bf16 = true"):
        dataclasses.replace(config, use_cpu=True).__class__(output_dir=str(tmp_path), fp16=True).check()


def test_defaults_follow_trl():
    grpo = GRPOFields()
    assert (grpo.learning_rate, grpo.num_generations, grpo.max_completion_length) == (1e-6, 8, 512)
    assert (grpo.beta, grpo.epsilon, grpo.loss_type, grpo.scale_rewards) == (0.0, 0.2, "dapo", "group")
    sft = SFTFields()
    assert (sft.learning_rate, sft.max_length, sft.dataset_text_field, sft.loss_type) == (2e-5, 1024, "text", "nll")


@pytest.mark.parametrize("fields", [SFTFields(), GRPOFields()])
def test_defaults_pass_their_own_check(fields: CommonFields):
    fields.check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generations": 1}, r"^num_generations = 1: .* at least 2\.$"),
        ({"num_generations": True}, r"^num_generations = True: "),
        ({"temperature": 0.0}, r"^temperature = 0\.0: .* above 0\.$"),
        ({"temperature": float("nan")}, r"^temperature = nan: "),
        ({"top_p": 0.0}, r"^top_p = 0\.0: .*\(0, 1\]"),
        ({"min_p": 1.5}, r"^min_p = 1\.5: "),
        ({"stop": ["a", ""]}, r"^stop = \['a', ''\]: .*non-empty"),
        ({"stop": "</answer>"}, r"^stop = '</answer>': .*list"),
        ({"loss_type": "ppo"}, r"^loss_type = 'ppo': use one of grpo, bnpo, dapo, dr_grpo"),
        ({"loss_type": "cispo"}, r"^epsilon_high = 0\.2 with loss_type cispo: .*5\.0"),
        ({"epsilon_high": 5.0}, r"^epsilon_high = 5\.0: "),
        ({"loss_type": "luspo"}, r"use sequence"),
        ({"kl_estimator": "k4"}, r"^kl_estimator = 'k4': "),
        ({"kl_estimator": "k1", "use_bias_correction_kl": False}, r"the mean gradient of k1 alone is 0; use k2"),
        ({"kl_in": "reward", "use_bias_correction_kl": True}, r"^use_bias_correction_kl"),
        ({"kl_target": 5.0}, r"^kl_target = 5\.0 with beta = 0: set the initial value of beta"),
        ({"loss_type": "vespo", "delta": 2.0}, r"^delta = 2\.0 with loss_type vespo"),
        (
            {"loss_type": "vespo", "importance_sampling_level": "sequence"},
            r"^importance_sampling_level = 'sequence' with loss_type vespo, .*: use token",
        ),
        (
            {"loss_type": "vespo", "sampling_correction": "sequence_mask"},
            r"^sampling_correction = 'sequence_mask' with loss_type vespo, .*: use token_truncate or token_mask",
        ),
        ({"vespo_lambda_pos": 0.0}, r"^vespo_lambda_pos = 0\.0: use a number above 0"),
        ({"use_adaptive_entropy": True, "entropy_coef": 2.0}, r"^entropy_coef = 2\.0 with use_adaptive_entropy"),
        ({"use_adaptive_entropy": True, "entropy_coef_min": 1.0}, r"^entropy_coef_min = 1\.0: not below"),
        ({"sampling_correction": "icepop"}, r"^sampling_correction = 'icepop': use token_truncate"),
        ({"sampling_correction": "token_truncate", "sampling_correction_max": None}, r"nothing is truncated"),
        ({"sampling_correction": "token_truncate", "sampling_correction_min": 0.5}, r"only masks have a lower"),
        ({"sampling_correction": "token_mask", "sampling_correction_min": 4.0}, r"not below sampling_correction_max"),
        ({"overlong_buffer": 600.0}, r"^overlong_buffer = 600\.0: longer than max_completion_length = 512"),
        ({"prompt_sampling": "random"}, r"^prompt_sampling = 'random': "),
        ({"top_entropy_quantile": 0.0}, r"^top_entropy_quantile = 0\.0: "),
        ({"reward_clip_range": [1.0, -1.0]}, r"^reward_clip_range = "),
        ({"multi_objective_aggregation": "normalize_then_sum", "advantage_estimator": "batch"}, r"use group"),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "overlong_buffer": 8.0},
            r"^overlong_buffer = 8\.0 with multi_objective_aggregation",
        ),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "reward_clip_range": [0.0, 1.0]},
            r"^reward_clip_range = \[0\.0, 1\.0\] with multi_objective_aggregation",
        ),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "kl_in": "reward", "beta": 0.1},
            r"^kl_in = 'reward' with multi_objective_aggregation",
        ),
        ({"scale_rewards": "std"}, r"^scale_rewards = 'std': "),
        ({"scale_rewards": 1}, r"^scale_rewards = 1: "),
        ({"epsilon": 1.0}, r"^epsilon = 1\.0: "),
        ({"delta": 1.2, "epsilon_high": 0.28}, r"^delta = 1\.2: .* epsilon_high = 1\.28"),
        ({"importance_sampling_level": "sentence"}, r"use token, sequence"),
        ({"reward_weights": []}, r"^reward_weights = \[\]: "),
        ({"token_budget": 0}, r"^token_budget = 0: "),
        ({"logprob_check_bound": -1.0}, r"^logprob_check_bound = -1\.0: "),
    ],
)
def test_bad_grpo_values(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        GRPOFields(**changes).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "chunked_nll"}, r"^loss_type = 'chunked_nll': use nll or dft"),
        (
            {"truncation_mode": "keep_middle"},
            r"^truncation_mode = 'keep_middle': use keep_start, keep_end, drop or split",
        ),
        ({"max_length": 1}, r"^max_length = 1: "),
        (
            {"assistant_only_loss": True, "completion_only_loss": True},
            r"True: they select different tokens; set one, assistant_only_loss",
        ),
    ],
)
def test_bad_sft_values(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        SFTFields(**changes).check()


@pytest.mark.parametrize("value", ["group", "batch", "none", True, False])
def test_every_scaling_of_rewards_is_accepted(value: str | bool):
    assert check_fields("grpo", {"scale_rewards": value}) == {"scale_rewards": value}


def test_groups_fill_each_round_of_sampling(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    one_each = {"per_device_train_batch_size": 1, "num_generations": 8}
    with pytest.raises(ConfigError, match=r"samples 1 completions .* multiple of 8"):
        check_fields("grpo", one_each)
    check_fields("grpo", one_each | {"gradient_accumulation_steps": 8})
    check_fields("grpo", one_each | {"steps_per_generation": 16, "gradient_accumulation_steps": 4})
    with pytest.raises(ConfigError, match=r"^\[training\] steps_per_generation = 8: .* multiple of 3"):
        check_fields("grpo", one_each | {"steps_per_generation": 8, "gradient_accumulation_steps": 3})
    check_fields("grpo", one_each | {"steps_per_generation": 4, "gradient_accumulation_steps": 8})
    with pytest.raises(ConfigError, match=r"^\[training\] steps_per_generation = 10: .* use one of 1, 2, 4, 8, 16, or"):
        check_fields("grpo", one_each | {"steps_per_generation": 10, "gradient_accumulation_steps": 8})
    repeated = {"steps_per_generation": 4, "gradient_accumulation_steps": 8, "num_iterations": 2}
    with pytest.raises(ConfigError, match=r"steps_per_generation = 4 with num_iterations = 2: .* multiple of 8"):
        check_fields("grpo", one_each | repeated)
    monkeypatch.setenv("WORLD_SIZE", "8")
    check_fields("grpo", one_each)


@pytest.mark.parametrize("kind", KINDS)
def test_refused_fields_exist_and_say_what_to_do(kind: Kind):
    for name, reason in refused_fields(kind).items():
        assert name in training_argument_fields()
        assert ";" in reason, name


@pytest.mark.parametrize("kind", KINDS)
def test_every_refused_field_is_refused_unless_it_holds_the_default(kind: Kind):
    other: dict[type, Any] = {bool: True, float: 0.5, str: "batch", type(None): "x", list: ["x"], int: 3}
    typed = {"eval_accumulation_steps": 2, "torch_empty_cache_steps": 2, "neftune_noise_alpha": 5.0, "data_seed": 1}
    typed |= {"liger_kernel_config": {"rope": True}, "label_names": ["x"], "dataloader_prefetch_factor": 2}
    for name, reason in refused_fields(kind).items():
        default = known_fields(kind)[name].default
        value = typed.get(name, (not default) if isinstance(default, bool) else other[type(default)])
        if name == "parallelism_config":
            continue  # a Python object only: no file can set it
        with pytest.raises(ConfigError) as caught:
            check_fields(kind, {name: value})
        assert str(caught.value) == f"[training] {name} = {value!r}: {reason}."
        if default is not None:
            assert check_fields(kind, {name: default}) == {name: default}


def test_noise_on_embeddings_is_for_sft_only():
    assert check_fields("sft", {"neftune_noise_alpha": 5}) == {"neftune_noise_alpha": 5.0}
    with pytest.raises(ConfigError, match=r"neftune_noise_alpha = 0\.0: use a number above 0"):
        check_fields("sft", {"neftune_noise_alpha": 0.0})
    for kind in ("reward", "dpo", "kto", "grpo"):
        with pytest.raises(
            ConfigError, match=r"neftune_noise_alpha = 5\.0: only supervised fine-tuning supports .*; remove the field"
        ):
            check_fields(kind, {"neftune_noise_alpha": 5.0})


def test_data_loader_fields_are_dropped_where_prompts_are_drawn_only():
    assert check_fields("sft", {"dataloader_num_workers": 2}) == {"dataloader_num_workers": 2}
    assert check_fields("grpo", {"dataloader_num_workers": 2}) == {}


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo", "ppo"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eval_accumulation_steps", 0), ("eval_accumulation_steps", -1.0), ("torch_empty_cache_steps", -1),
        ("torch_empty_cache_steps", 2**63), ("length_column_name", "a\0b"), ("length_column_name", ""),
        ("length_column_name", "\ud800"), ("local_rank", -2), ("use_cache", "perhaps"), ("use_liger_kernel", 7),
        ("liger_kernel_config", [1]), ("dataloader_num_workers", -1),
    ],
)  # fmt: skip
def test_fields_that_nothing_reads_refuse_nonsense_too(kind: Kind, name: str, value: Any):
    """A field whose intent is met anyway is dropped; a value that means nothing is a mistake all the same."""
    with pytest.raises(ConfigError, match=rf"^\[training\] {name} = "):
        check_fields(kind, {name: value})


def test_a_data_loader_that_only_counts_refuses_nonsense_too():
    with pytest.raises(ConfigError, match="dataloader_prefetch_factor = 0: use at least 1, or leave it out"):
        check_fields("grpo", {"dataloader_prefetch_factor": 0})


def test_sft_samples_rows_in_order_or_at_random():
    assert check_fields("sft", {"train_sampling_strategy": "sequential"}) == {"train_sampling_strategy": "sequential"}
    with pytest.raises(ConfigError, match="train_sampling_strategy = 'group_by_length': use random or sequential"):
        check_fields("sft", {"train_sampling_strategy": "group_by_length"})


def test_unknown_field_names_the_close_ones():
    with pytest.raises(ConfigError, match=r"^\[grpo\] num_generatons = 4: unknown field; did you mean num_generations"):
        check_fields("grpo", {"num_generatons": 4}, "grpo")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("learning_rate", 1, 1.0),
        ("learning_rate", "1e-6", 1e-6),
        ("per_device_train_batch_size", 8.0, 8),
        ("report_to", ["wandb", "tensorboard"], ["wandb", "tensorboard"]),
        ("include_num_input_tokens_seen", "all", "all"),
        ("eval_steps", 5, 5.0),
        ("lr_scheduler_type", "cosine", "cosine"),
        ("reward_weights", [1, 0.5], [1.0, 0.5]),
        ("chat_template_kwargs", {"enable_thinking": False}, {"enable_thinking": False}),
    ],
)
def test_values_take_the_type_of_their_field(name: str, value: Any, expected: Any):
    got = check_fields("grpo", {name: value})[name]
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bf16", "yes", r"bf16 = 'yes': expected bool \| None, got str"),
        ("bf16", 1, r"bf16 = 1: expected bool \| None, got int"),
        ("seed", True, r"seed = True: expected int, got bool"),
        ("seed", 1.5, r"seed = 1\.5: expected int, got float"),
        ("learning_rate", "fast", r"learning_rate = 'fast': expected float, got str"),
        ("learning_rate", "nan", r"learning_rate = 'nan': expected float"),
        ("reward_weights", [1, "x"], r"reward_weights = \[1, 'x'\]: expected list\[float\] \| None, got list"),
    ],
)
def test_wrong_types(name: str, value: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        check_fields("grpo", {name: value})


def test_lora_values_are_checked():
    values = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "bias": "none"}
    assert check_mapping(lora_fields(), values, "peft") == values
    with pytest.raises(ConfigError, match=r"^\[peft\] rank = 8: unknown field"):
        check_mapping(lora_fields(), {"rank": 8}, "peft")
    with pytest.raises(ConfigError, match=r"bias = 'some': use none, all or lora_only"):
        check_mapping(lora_fields(), {"bias": "some"}, "peft")


def test_defaults_are_not_shared_between_checks():
    first = check_fields("sft", {})
    first["include_for_metrics"] = ["loss"]
    assert check_fields("sft", {}) == {}
    assert known_fields("sft")["include_for_metrics"].default == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"algorithm": "ppo"}, r"algorithm = 'ppo': PPOTrainer runs it"),
        ({"algorithm": "gpro"}, r"algorithm = 'gpro': use one of grpo"),
        ({"algorithm": "gspo", "importance_sampling_level": "token"}, r"importance_sampling_level = 'token' with alg"),
        ({"algorithm": "dapo", "loss_type": "grpo"}, r"loss_type = 'grpo' with algorithm = 'dapo'"),
        ({"algorithm": "cispo", "epsilon_high": 0.28}, r"epsilon_high = 0.28 with loss_type cispo"),
        ({"algorithm": "dapo", "max_completion_length": 1, "overlong_buffer": 2}, r"overlong_buffer = 2"),
    ],
)
def test_a_file_that_contradicts_its_algorithm(given: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        check_fields("grpo", given)


def test_an_algorithm_sets_its_fields_and_leaves_given_numbers():
    values = {name: info.default for name, info in known_fields("grpo").items()}
    applied = apply_algorithm(
        "grpo", {**values, "algorithm": "dapo", "epsilon_high": 0.5}, {"algorithm", "epsilon_high"}
    )
    assert applied["dynamic_sampling"] is True
    assert applied["epsilon_high"] == 0.5
    assert applied["overlong_buffer"] == 0.2
    assert apply_algorithm("grpo", values, ()) == values


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_row_of_the_table_is_a_valid_config(name: str):
    row = ALGORITHMS[name]
    assert row.summary
    assert set(row.parts) | set(row.defaults) <= set(known_fields(row.stage))
    assert not set(row.parts) & set(row.defaults)
    check_fields(row.stage, {"algorithm": name})
    check_fields(row.stage, {"algorithm": name, **row.parts, **row.defaults})


def test_ppo_understands_the_names_of_trl():
    assert check_fields("ppo", {"kl_coef": 0.1, "cliprange": 0.3, "num_ppo_epochs": 2}) == {
        "beta": 0.1,
        "epsilon": 0.3,
        "num_iterations": 2,
    }
    with pytest.raises(ConfigError, match="kl_coef and beta are one field"):
        check_fields("ppo", {"kl_coef": 0.1, "beta": 0.1})


def test_the_reference_is_of_this_configuration():
    reference = load_script("write_reference")
    assert (reference.DOCS / "reference.md").read_text() == reference.page(), "python scripts/write_reference.py"
    assert json.loads((reference.DOCS / "run_file.schema.json").read_text()) == reference.schema()


def test_the_schema_is_that_of_the_examples():
    """Every key of the shipped run files is in the schema."""
    properties = load_script("write_reference").schema()["properties"]
    for path in sorted(EXAMPLES.rglob("*.toml")):
        document = tomllib.loads(path.read_text())
        assert set(document) <= set(properties), path
        for name, table in document.items():
            if name in STAGES:
                assert set(table) <= set(properties[name]["properties"]), (path, name)
