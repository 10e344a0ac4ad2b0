"""Real vLLM for the tests marked `vllm`: a server started by `burnish serve`, and one in this process."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

import tiny
from burnish.model.adapters import add_adapters
from burnish.model.scoring import causal_lm, prepare_for_scoring
from burnish.rollout import Engine
from burnish.rollout.vllm import (
    Deadlines,
    EmbeddedLLM,
    EmbeddedOptions,
    ServerPool,
    VLLMColocatedEngine,
    VLLMServerEngine,
)
from burnish.rollout.vllm.registry import token_of
from burnish.rollout.vllm.updates import Proof
from burnish.rollout.vllm.weights import has_adapters
from vllm_proxy import Proxy

ROOT = Path(__file__).resolve().parent.parent
VOCAB = len(tiny.tokenizer())
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
"""vLLM's CPU attention takes heads of 32 and more; it also samples columns that are no token of the tokenizer."""

DEADLINES = Deadlines(start=900.0, call=60.0, heartbeat=2.0, stall=60.0, slow=600.0)
START_SECONDS = 1200.0


def fresh(kind: str = "llama", **changes: Any) -> Any:
    model = tiny.model(kind, **{**SIZES, **changes})
    prepare_for_scoring(model)
    return model


def lora(model: Any) -> Any:
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted, _ = add_adapters(model, config, seed=0)
    prepare_for_scoring(adapted)
    return adapted


class Served:
    """A `burnish serve` process."""

    def __init__(self, folder: Path, log: Path, *words: str, environment: Mapping[str, str] | None = None) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = int(found.getsockname()[1])
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        line = "from burnish.cli.main import console; raise SystemExit(console())"
        command = [sys.executable, "-c", line, "serve", str(folder), "--port", str(self.port), "--dtype", "float32"]
        program = os.environ.get("BURNISH_VLLM", str(ROOT / ".venv-vllm" / "bin" / "vllm"))
        if shutil.which(program) is None:
            pytest.skip("no vLLM here: make vllm")
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, "--vllm", program, "--lora-rank", "8", *words, "--", "--enforce-eager"],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **(environment or {})},
            )

    def wait(self) -> None:
        ServerPool.connected([self.url], tiny.tokenizer(), START_SECONDS).close()

    def sampled_tokens(self) -> float:
        """Tokens that the server has sampled so far."""
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total"))

    def pids(self, word: str) -> list[int]:
        """Processes of the server, without the watch, whose title holds a word."""
        listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
        rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
        family = {self.process.pid}
        for _ in range(4):
            family |= {int(pid) for pid, parent, _ in rows if int(parent) in family}
        return [int(pid) for pid, _, args in rows if int(pid) in family - {self.process.pid} and word in args]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


class ServerSource:
    """Makes engines that sample from one server."""

    exceeds = r"exceeds the server's 256.*--max-model-len 257"

    def __init__(self, folder: Path) -> None:
        fresh(tie_word_embeddings=True).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        self.name = str(folder)
        self.server = Served(folder, folder.parent / "contract.log")
        self.server.wait()

    def engine(self, model: Any, faults: set[str] | None = None) -> Engine:
        """An engine; `faults` may change what reaches vLLM, see `Proxy`."""
        if has_adapters(model):
            # A server has the base from elsewhere; tests before this one left another.
            base = self.engine(fresh(tie_word_embeddings=True))
            base.sync(0)
            base.close()
        url = self.server.url
        if faults is not None:
            self.proxy = Proxy(url, self.name)
            self.proxy.faults, url = faults, self.proxy.url
        pool = ServerPool([(url, token_of(self.server.url))], tiny.tokenizer(), DEADLINES)
        pool.call(pool.connect())
        return VLLMServerEngine(model, tiny.tokenizer(), pool, bound=1e-6)

    def proof(self, engine: Any) -> Proof:
        return engine._pool.servers[0].proof

    def release(self, engine: Engine) -> None:
        """Close an engine; vLLM stays for the next one."""
        engine.close()
        if (proxy := self.__dict__.pop("proxy", None)) is not None:
            proxy.stop()

    def stop(self) -> None:
        self.server.stop()


class ColocatedSource:
    """Makes engines on vLLM in this process, which is started again for a model with another configuration."""

    exceeds = r"exceeds vLLM's 256; set vllm_max_model_length to 257"

    def __init__(self, folder: Path) -> None:
        if find_spec("vllm") is None:
            pytest.skip("vLLM is not in this environment: make servers")
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
        self.llm: EmbeddedLLM | None = None
        self.key: Any = None
        self.real: dict[str, Any] = {}

    def engine(self, model: Any, faults: set[str] | None = None) -> Engine:
        lm = causal_lm(model)
        key = (type(lm), lm.config.tie_word_embeddings, lm.dtype, has_adapters(model))
        if key != self.key:
            self.stop()
            self.llm, self.key = EmbeddedLLM(model, tiny.tokenizer(), EmbeddedOptions()), key
        assert self.llm is not None
        if faults is not None:
            self.disturb(self.llm, faults)
        # Each test hands over a base of its own.
        self.llm.is_loaded = False
        return VLLMColocatedEngine(model, tiny.tokenizer(), self.llm, bound=1e-6)

    def disturb(self, llm: EmbeddedLLM, faults: set[str]) -> None:
        load, load_adapter = llm.load, llm.load_adapter

        def faulty_load(weights: Mapping[str, Any]) -> None:
            if "keep_head" in faults:
                weights = {name: value for name, value in weights.items() if name != "lm_head.weight"}
            if "ignore_reload" not in faults:
                load(weights)

        llm.load = faulty_load
        llm.load_adapter = lambda name, folder: None if "drop_adapter" in faults else load_adapter(name, folder)

    def proof(self, engine: Any) -> Proof:
        return engine._proof

    def release(self, engine: Engine) -> None:
        for name in ("load", "load_adapter"):
            self.llm.__dict__.pop(name, None)

    def stop(self) -> None:
        if self.llm is not None:
            self.llm.close()
        self.llm = self.key = None
