"""The plug-in of vLLM: a version is prepared whole or not at all, and a commit that fails ends the worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from burnish import vllm_plugin
from burnish.cli.serve import plugin_path
from burnish.vllm_plugin import FolderTransferEngine, folder_checksum, register


class Worker:
    """A model that keeps what it loads, and the plug-in on it."""

    def __init__(self, **sizes: Any) -> None:
        self.loaded: dict[str, torch.Tensor] = {}
        self.fails = False
        self.calls: list[str] = []
        served = SimpleNamespace(**{"hidden_size": tiny.SIZES["hidden_size"], **sizes})
        self.engine = FolderTransferEngine(
            None, SimpleNamespace(model_config=SimpleNamespace(hf_text_config=served)), None, self
        )

    def load_weights(self, pairs: Any) -> None:
        self.calls.append("load")
        self.loaded = dict(pairs)
        if self.fails:
            raise KeyError("layers.9")

    def modules(self) -> Any:
        return iter([Head(self.calls), object()])

    def prepare(self, folder: Path, version: str = "run-1", run: str = "run", checksum: int | None = None) -> None:
        if checksum is None:
            checksum = folder_checksum(str(folder))
        given = {"folder": str(folder), "version": version, "run": run, "checksum": checksum}
        self.engine.init_transfer_engine(self.engine.parse_init_info(given))

    def commit(self, version: str = "run-1") -> None:
        self.engine.start_weight_update()
        self.engine.update_weights({"version": version})
        self.engine.finish_weight_update()


class Head:
    def __init__(self, calls: list[str]) -> None:
        self.quant_method = SimpleNamespace(process_weights_after_loading=lambda module: calls.append("pack"))


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    made = Worker()
    modules = {
        "vllm.model_executor.model_loader.reload": SimpleNamespace(
            initialize_layerwise_reload=lambda model: made.calls.append("initialize"),
            finalize_layerwise_reload=lambda model, config: made.calls.append("finalize"),
        ),
        "vllm.platforms": SimpleNamespace(current_platform=SimpleNamespace(is_cpu=lambda: True)),
        "vllm.model_executor.layers.vocab_parallel_embedding": SimpleNamespace(ParallelLMHead=Head),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "weights"
    tiny.model().save_pretrained(made)
    return made


def changed(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Add, replace or remove tensors of the file."""
    file = folder / "model.safetensors"
    weights = {name: value.clone() for name, value in load_file(file).items()}
    for name, value in tensors.items():
        if value is None:
            del weights[name]
        else:
            weights[name] = value
    save_file(weights, file, metadata={"format": "pt"})


def test_a_prepared_version_is_loaded_in_vllms_order(worker: Worker, folder: Path) -> None:
    wanted = load_file(folder / "model.safetensors")
    worker.prepare(folder)
    assert worker.calls == [], "the first phase changes nothing"
    for file in folder.iterdir():
        file.unlink()  # the trainer may be at its next version already
    worker.commit()
    assert worker.calls == ["initialize", "load", "finalize", "pack"]
    assert worker.loaded.keys() == wanted.keys()
    assert all(torch.equal(worker.loaded[name], value) for name, value in wanted.items())


def test_what_is_damaged_is_not_prepared(worker: Worker, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weights not prepared: .*No such file"):
        worker.prepare(tmp_path / "elsewhere", checksum=0)
    with pytest.raises(ValueError, match=r"weights not prepared: the checksum of .* is \d+, not 7"):
        worker.prepare(folder, checksum=7)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no safetensors file"):
        worker.prepare(tmp_path / "empty", checksum=0)
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 64)
    with pytest.raises(ValueError, match=r"weights not prepared: .*is damaged"):
        worker.prepare(folder)
    with pytest.raises(RuntimeError, match="no version is prepared"):
        worker.commit()
    assert worker.calls == []


def test_another_model_is_not_prepared(worker: Worker, folder: Path) -> None:
    other = Worker(hidden_size=48)
    with pytest.raises(ValueError, match=r"hidden_size = \d+, and the served model has 48"):
        other.prepare(folder)
    # Of a model with several parts the text model counts.
    config = folder / "config.json"
    config.write_text(json.dumps({"hidden_size": 1, "text_config": json.loads(config.read_text())}))
    worker.prepare(folder)


def test_a_version_has_the_tensors_of_the_one_before(worker: Worker, folder: Path) -> None:
    worker.prepare(folder)
    worker.commit()
    norm = "model.norm.weight"
    whole = load_file(folder / "model.safetensors")[norm].clone()
    for value, message in (
        (None, f"{norm} is missing, and in the version before"),
        (whole.bfloat16(), f"{norm} is .*bfloat16"),
        (whole[:-1].clone(), f"{norm} is .*{len(whole) - 1}"),
    ):
        changed(folder, **{norm: value})
        with pytest.raises(ValueError, match=message):
            worker.prepare(folder, "run-2")
        changed(folder, **{norm: whole})
    changed(folder, extra=torch.zeros(1))
    with pytest.raises(ValueError, match=r"extra is .*and in the version before missing"):
        worker.prepare(folder, "run-2")
    worker.prepare(folder, "other-1", run="other")


def test_only_the_prepared_version_is_committed_and_once(worker: Worker, folder: Path) -> None:
    worker.prepare(folder)
    with pytest.raises(ValueError, match="run-1 is prepared, not run-2"):
        worker.commit("run-2")
    worker.commit()
    with pytest.raises(RuntimeError, match="no version is prepared"):
        worker.commit()
    worker.prepare(folder)
    worker.engine.shutdown()
    with pytest.raises(RuntimeError, match="no version is prepared"):
        worker.commit()


def test_a_commit_that_fails_ends_the_worker(worker: Worker, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended(BaseException):
        pass

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(vllm_plugin.os, "_exit", end)
    worker.fails = True
    worker.prepare(folder)
    with pytest.raises(Ended, match="70"):
        worker.commit()


def test_it_is_registered_once_however_often_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}

    def register_engine(name: str, engine: Any) -> None:
        if name in found:
            raise ValueError("already registered")
        found[name] = engine

    factory = SimpleNamespace(register_engine=register_engine)
    module = SimpleNamespace(WeightTransferEngineFactory=factory)
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer", module)
    register()
    register()
    assert found == {"burnish": FolderTransferEngine}


def test_a_python_without_burnish_finds_it() -> None:
    """vLLM's environment need not have burnish, nor transformers of the trainer's version."""
    line = (
        "from importlib.metadata import entry_points\n"
        "(found,) = [one for one in entry_points(group='vllm.general_plugins') if one.name == 'burnish']\n"
        "import sys\n"
        "print(found.load().__module__, [name for name in ('burnish', 'torch') if name in sys.modules])"
    )
    with plugin_path() as path:
        done = subprocess.run(
            # -S: no site-packages, where an installed burnish has the entry point too.
            [sys.executable, "-S", "-c", line],
            env={"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stdout.split(maxsplit=1) == ["burnish_vllm_plugin", "[]\n"]
