"""Fields of vLLM servers, what is refused before weights load, and a run of GRPO from a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny
from burnish import GRPOConfig, GRPOTrainer
from burnish.config.validation import check_fields
from burnish.errors import ConfigError, EngineError
from burnish.rollout import NativeEngine
from burnish.rollout.vllm import VLLMServerEngine
from burnish.rollout.vllm.weights import refuse_unsupported, refuse_unsupported_config
from local_server import LocalServer


@pytest.mark.parametrize(
    ("fields", "urls"),
    [
        ({}, ["http://127.0.0.1:8000"]),
        ({"vllm_server_host": "gpu-box", "vllm_server_port": 9000}, ["http://gpu-box:9000"]),
        ({"vllm_server_base_url": "http://a:1/", "vllm_server_port": 9}, ["http://a:1"]),
        ({"vllm_server_base_url": ["http://a:1/v1", "https://b", "http://a:1"]}, ["http://a:1", "https://b"]),
    ],
)
def test_servers_are_named_as_in_trl_or_listed(fields: dict[str, Any], urls: list[str]) -> None:
    assert GRPOConfig(**fields).server_urls == urls


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vllm_server_base_url": "localhost:8000"}, r"vllm_server_base_url = 'localhost:8000'.*http://127"),
        ({"vllm_server_base_url": ["http://a", "b"]}, r"URL of a server"),
        ({"vllm_server_base_url": []}, r"URL of a server"),
        (
            {"use_vllm": True, "vllm_mode": "server", "stop": list("abcde")},
            r"stop = \['a'.*use_vllm = True: a vLLM server takes 4 strings",
        ),
        ({"vllm_server_port": 0}, r"vllm_server_port = 0"),
        ({"vllm_server_timeout": 0}, r"vllm_server_timeout = 0"),
        ({"vllm_mode": "remote"}, r"vllm_mode = 'remote'.*server"),
    ],
)
def test_fields_that_cannot_work_are_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GRPOConfig(**fields)


SERVER = {"use_vllm": True, "vllm_mode": "server"}


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ({"correction": True}, {"sampling_correction": "sequence_mask"}),
        ({"correction": False, "mode": "token_mask"}, {}),
        ({"mode": "token_truncate", "clip_max": 2.0},
         {"sampling_correction": "token_truncate", "sampling_correction_max": 2.0}),
        ({"mode": "token_mask", "clip_min": 0.5, "cap": 5.0},
         {"sampling_correction": "token_mask", "sampling_correction_max": 5.0, "sampling_correction_min": 0.5}),
        ({"clip_max": None}, {"sampling_correction": "sequence_mask", "sampling_correction_max": None}),
        ({}, {}),
    ],
)  # fmt: skip
def test_trls_importance_sampling_means_ours(given: dict[str, Any], means: dict[str, Any]) -> None:
    fields = {f"vllm_importance_sampling_{name}": value for name, value in given.items()}
    found = check_fields("grpo", {**SERVER, **fields})
    assert {name: value for name, value in found.items() if name not in SERVER} == means
    # In process it has no effect in TRL either.
    assert check_fields("grpo", fields) == {}


def test_a_correction_given_by_both_names_is_an_error() -> None:
    with pytest.raises(ConfigError, match="are one field: set sampling_correction alone"):
        check_fields(
            "grpo", {**SERVER, "vllm_importance_sampling_mode": "token_mask", "sampling_correction": "token_mask"}
        )


def lora(**changes: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora = True: .*magnitudes"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = .*keep the base's modules"),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_parameters": ["experts.up"]}, "target_parameters"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa': it changes the base's weights"),
        ({"r": 1024}, "r = 1024: .*1 to 512"),
        ({"target_modules": ["q_proj", "lm_head"]}, "leave out the adapter of lm_head"),
    ],
)
def test_adapters_that_a_server_would_ignore_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"{message}.*use_vllm = false"):
        refuse_unsupported_config(lora(**changes))


def test_other_adapters_are_refused_and_plain_ones_taken() -> None:
    from peft import IA3Config

    with pytest.raises(ConfigError, match="type = 'IA3'"):
        refuse_unsupported_config(IA3Config(task_type="CAUSAL_LM"))
    refuse_unsupported_config(None)
    refuse_unsupported_config(lora(use_rslora=True, init_lora_weights="gaussian", target_modules="all-linear"))


def test_weights_that_train_beside_the_adapters_are_refused() -> None:
    from burnish.model.adapters import add_adapters

    model, _ = add_adapters(tiny.model(), lora(), seed=0)
    refuse_unsupported(model)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"norm\.weight trains beside the adapters"):
        refuse_unsupported(model)


ROWS = [{"prompt": f"{i} + {i} =", "answer": str(2 * i)} for i in range(8)]


def wants_digits(completions: list[str], **_: Any) -> list[float]:
    return [sum(character.isdigit() for character in text) / max(len(text), 1) for text in completions]


def trainer(tmp_path: Path, url: str | list[str] | None, model: Any = None, **changes: Any) -> GRPOTrainer:
    parts = {name: changes.pop(name) for name in ("peft_config", "engine") if name in changes}
    fields: dict[str, Any] = {
        "output_dir": str(tmp_path), "use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url,
        "vllm_server_timeout": 20.0, "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 5,
        "max_steps": 3, "learning_rate": 1e-3, "save_strategy": "no", "logging_steps": 1, "report_to": "none",
        "progress": False, "bf16": False, "use_cpu": True,
    }  # fmt: skip
    return GRPOTrainer(
        tiny.model() if model is None else model,
        [wants_digits],
        GRPOConfig(**{**fields, **changes}),
        train_dataset=ROWS,
        processing_class=tiny.tokenizer(),
        **parts,
    )


def logged(made: GRPOTrainer, name: str) -> list[float]:
    return [row[name] for row in made.state.log_history if name in row]


@pytest.mark.parametrize("with_adapters", [False, True])
def test_grpo_trains_from_a_server(tmp_path: Path, with_adapters: bool) -> None:
    base = tiny.model() if with_adapters else tiny.model(seed=5)
    with LocalServer(base, tiny.tokenizer()) as server:
        made = trainer(tmp_path, server.url, peft_config=lora() if with_adapters else None)
        made.train()
        assert isinstance(made.stage.sampler.engine, VLLMServerEngine)
        assert max(logged(made, "sampling/logprob_difference/max")) < 1e-4
        assert len(logged(made, "sampling/probe/difference")) == 3
        assert server.calls.count("/v1/load_lora_adapter" if with_adapters else "/collective_rpc") == 3
        assert logged(made, "sampling/probe/moved")[1] > 0
        made.stage.sampler.engine.close()


def test_another_temperature_of_the_server_stops_the_run(tmp_path: Path) -> None:
    with LocalServer(tiny.model(), tiny.tokenizer()) as server:
        server.faults.add("hot")
        made = trainer(tmp_path, server.url)
        from burnish.errors import CheckFailed

        with pytest.raises(CheckFailed, match="step 0: sampler and trainer mismatch"):
            made.train()
        made.stage.sampler.engine.close()


def test_servers_are_looked_for_before_weights_load(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no vLLM server is ready.*burnish serve MODEL"):
        trainer(tmp_path, "http://127.0.0.1:9", model=str(tmp_path / "never-read"), vllm_server_timeout=0.1)


def test_adapters_are_refused_before_servers_are_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use_dora"):
        trainer(tmp_path, "http://127.0.0.1:9", peft_config=lora(use_dora=True))


def test_an_engine_and_servers_contradict_each_other(tmp_path: Path) -> None:
    model = tiny.model()
    with pytest.raises(ConfigError, match="use_vllm = True with an engine"):
        trainer(tmp_path, "http://127.0.0.1:9", model=model, engine=NativeEngine(model, tiny.tokenizer()))
