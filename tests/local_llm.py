"""vLLM in the process, played by a tiny model: the answers of `LocalServer` behind the methods of `EmbeddedLLM`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import tiny
from burnish.rollout.vllm import EmbeddedOptions
from local_server import LocalServer


class LocalLLM:
    """Has no weights of the trainer before `load` and after `sleep`; `calls` names what it was asked to do."""

    def __init__(self, model: Any, options: EmbeddedOptions | None = None) -> None:
        self.options = options or EmbeddedOptions(enable_sleep_mode=True)
        base = copy.deepcopy(model)
        self.server = LocalServer(base.unload() if hasattr(base, "peft_config") else base, tiny.tokenizer())
        self.max_model_length = self.options.max_model_length or 200
        self.is_loaded = self.is_asleep = False
        self.name = "base"
        self.calls: list[str] = []
        self._forget_weights()

    @property
    def faults(self) -> set[str]:
        return self.server.faults

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.calls.append("load")
        self.is_loaded, self.is_asleep, self.name = True, False, "base"
        if "ignore_reload" not in self.faults:
            self.server.model.load_state_dict(weights, strict=False)
            self.server.model.tie_weights()

    def load_adapter(self, name: str, folder: str) -> None:
        self.calls.append("load_adapter")
        self.server.load_adapter(name, folder)
        self.name = name

    def answer(self, asked: Sequence[tuple[Sequence[int], Mapping[str, Any]]]) -> list[dict[str, Any]]:
        assert self.is_loaded
        assert not self.is_asleep
        self.calls.append(f"answer {len(asked)}")
        return [self.server.complete({"model": self.name, "prompt": list(ids), **fields}) for ids, fields in asked]

    def sleep(self) -> None:
        self.calls.append("sleep")
        if self.options.enable_sleep_mode:
            self.is_loaded, self.is_asleep = False, True
            self._forget_weights()

    def _forget_weights(self) -> None:
        with torch.no_grad():
            for parameter in self.server.model.parameters():
                parameter.fill_(torch.nan)

    def close(self) -> None:
        self.calls.append("close")
        self.server.stop()
