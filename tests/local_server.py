"""A small HTTP server that answers as `vllm serve` does, from a tiny model in this process, with faults to order.

The shapes of its answers are those of vLLM 0.32, as recorded in tests/vllm_answers.json. Real servers are tested in
test_vllm_servers.py.
"""

from __future__ import annotations

import base64
import json
import pickle
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from http_server import JsonHandler, ThreadServer

_making_models = threading.Lock()
"""transformers replaces methods of its classes while it makes a model; two threads would leave them replaced."""


class LocalServer(ThreadServer):
    """Serves a model; `faults` change what it does.

    ignore_reload, keep_head, drop_adapter: weights that do not arrive, in whole or in part. hot: samples at twice the
    temperature. raw: log-probabilities before the sampling parameters. logits: no log-probabilities. refuse_rank:
    adapters are refused. half: a load ends half-way. hang: answers no request for completions. deaf: answers nothing.
    break: closes the connection in the middle of an answer. dribble: sends an answer byte by byte, slowly.
    """

    def __init__(self, model: Any, tokenizer: Any, *, port: int = 0, token: str | None = None) -> None:
        self.model, self.tokenizer, self.token = model, tokenizer, token
        self.adapters: dict[str, Any] = {}
        self.weight_version, self.paused, self.tokens = "default", False, 0.0
        self.token_seconds = 0.0
        """Time that a token takes."""
        self.backend: str | None = None
        """Back end of its weight transfer; one of vLLM's registry, or burnish's plug-in."""
        self.plugin: Any = None
        self.is_updating = False
        self.init_info: dict[str, Any] = {}
        self.update_info: dict[str, Any] = {}
        self.faults: set[str] = set()
        self.calls: list[str] = []
        self.sampled: list[dict[str, Any]] = []
        self.before_answer: Callable[[str, dict[str, Any]], None] = lambda path, body: None
        self.lock = threading.Lock()
        super().__init__(_Handler, port)

    # What the routes do.

    def load_weights(self, folder: str) -> None:
        with _making_models:
            fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=self.model.dtype).eval()
        self.take(fresh)

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load weights by their names in a checkpoint; the plug-in calls this as a model's `load_weights`."""
        with _making_models:
            fresh = AutoModelForCausalLM.from_config(self.model.config).to(self.model.dtype).eval()
        fresh.load_state_dict(dict(tensors), strict=False)
        self.take(fresh)

    def take(self, fresh: Any) -> None:
        if "half" in self.faults:
            raise RuntimeError("half of the weights are loaded")
        if "ignore_reload" in self.faults:
            return
        head = self.model.get_output_embeddings().weight.detach().clone()
        if "keep_head" in self.faults:
            fresh.get_output_embeddings().weight = torch.nn.Parameter(head)
        self.model = fresh

    def transfer(self, path: str, body: dict[str, Any]) -> None:
        """Do what the routes of vLLM's weight transfer do; errors of workers have status 500."""
        if self.backend is None:
            raise RuntimeError("Weight transfer not configured.")
        try:
            match path:
                case "/init_weight_transfer_engine":
                    self.init_info = body["init_info"]
                    if self.plugin is not None:
                        self.plugin.init_transfer_engine(self.plugin.parse_init_info(self.init_info))
                case "/start_weight_update":
                    if self.is_updating:
                        raise ValueError("start_weight_update called while a weight update is already active.")
                    self.is_updating = True
                case "/update_weights":
                    self.update_info = body["update_info"]
                    if self.plugin is not None:
                        self.plugin.update_weights(self.update_info)
                    elif self.backend == "ipc":
                        handles = pickle.loads(base64.b64decode(self.update_info["ipc_handles_pickled"]))
                        values = [next(iter(by_gpu.values())) for by_gpu in handles]
                        self.load_tensors(dict(zip(self.update_info["names"], values, strict=True)))
                case _:
                    self.is_updating = False
        except (OSError, ValueError) as error:
            raise RuntimeError(f"Call to {path} method failed: {error}") from error

    def restart(self, model: Any) -> None:
        """Be as after a start with other weights."""
        self.model, self.weight_version, self.paused, self.is_updating = model, "default", False, False

    def load_adapter(self, name: str, folder: str) -> None:
        config = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
        if "refuse_rank" in self.faults:
            raise ValueError(f"LoRA rank {config['r']} is greater than max_lora_rank 1")
        if "drop_adapter" in self.faults:
            self.adapters[name] = self.model
            return
        with _making_models:
            fresh = AutoModelForCausalLM.from_config(self.model.config)
        fresh.load_state_dict(self.model.state_dict())
        self.adapters[name] = PeftModel.from_pretrained(fresh.to(self.model.dtype), folder).eval()

    @torch.no_grad()
    def logprobs(self, model: Any, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
        return (model(input_ids=torch.tensor([ids])).logits[0].float() / temperature).log_softmax(-1)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        name = body["model"]
        model = self.model if name == "base" else self.adapters[name]
        choices: list[dict[str, Any]] = []
        for index in range(body.get("n", 1)):
            ids, values, finish, stop = self._sample(model, body, index)
            choice: dict[str, Any] = {
                "index": index, "text": self.tokenizer.decode(ids), "finish_reason": finish, "stop_reason": stop,
                "token_ids": ids,
                "logprobs": {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": values,
                             "top_logprobs": [{f"token_id:{i}": v} for i, v in zip(ids, values, strict=True)]},
            }  # fmt: skip
            if body.get("prompt_logprobs") is not None:
                rows = self.logprobs(model, body["prompt"])
                known = zip(body["prompt"][1:], rows[:-1], strict=True)
                entries = [{str(t): {"logprob": float(row[t]), "rank": 1, "decoded_token": "?"}} for t, row in known]
                choice["prompt_logprobs"] = [None, *entries]
            choices.append(choice)
        return {"id": "cmpl-1", "object": "text_completion", "model": name, "choices": choices}

    @torch.no_grad()
    def _sample(self, model: Any, body: dict[str, Any], index: int) -> tuple[list[int], list[float], str, Any]:
        generator = torch.Generator().manual_seed(body.get("seed", 0) + index)
        ids, values, prompt = list[int](), list[float](), list(body["prompt"])
        asked = body["temperature"] or 1.0
        used = asked * 2 if "hot" in self.faults else asked
        while True:
            if self.paused:
                return ids, values, "abort", None
            time.sleep(self.token_seconds)
            raw = self.logprobs(model, prompt + ids)[-1]
            row = self.logprobs(model, prompt + ids, used)[-1]
            if (kept := body.get("top_k") or 0) > 0:
                row = row.masked_fill(row < row.topk(kept).values[-1], -torch.inf).log_softmax(-1)
            is_greedy = body["temperature"] == 0
            token = int(row.argmax() if is_greedy else torch.multinomial(row.exp(), 1, generator=generator))
            ids.append(token)
            self.tokens += 1
            values.append(float((raw if "raw" in self.faults else row)[token]) + 3 * ("logits" in self.faults))
            if token in body.get("stop_token_ids", ()):
                return ids, values, "stop", token
            if found := [s for s in body.get("stop", ()) if s in self.tokenizer.decode(ids)]:
                return ids, values, "stop", found[0]
            if len(ids) >= body["max_tokens"]:
                return ids, values, "length", None


class _Handler(JsonHandler):
    server: LocalServer

    def handle_json(self, body: dict[str, Any] | None) -> None:
        body = body or {}
        server, path = self.server, self.path.split("?")[0]
        server.calls.append(path)
        server.before_answer(path, body)
        while "deaf" in server.faults:
            time.sleep(0.05)
        if server.token is not None and self.headers.get("Authorization") != f"Bearer {server.token}":
            return self._send(401, {"error": "Unauthorized"})
        is_sampling = path == "/v1/completions" and body.get("prompt_logprobs") is None and "stop" in body
        if is_sampling:
            server.sampled.append(body)
            while "hang" in server.faults:
                time.sleep(0.05)
        while server.paused and path == "/v1/completions":
            time.sleep(0.01)
        try:
            # Looks are answered, and others sample, while a group is sampled.
            is_free = is_sampling or path in ("/health", "/metrics", "/pause", "/weight_info")
            with nullcontext() if is_free else server.lock:
                answer = self._route(path, body)
        except KeyError as error:
            return self._send(404, {"error": {"message": f"{error} does not exist", "code": 404}})
        except ValueError as error:
            return self._send(400, {"error": {"message": str(error), "code": 400}})
        except RuntimeError as error:
            return self._send(500, {"error": {"message": str(error), "code": 500}})
        return self._send(200, answer, is_sampling=is_sampling)

    def _route(self, path: str, body: dict[str, Any]) -> Any:
        server = self.server
        match path:
            case "/v1/models":
                return {"data": [{"id": "base", "root": "tiny", "parent": None, "max_model_len": 200}]}
            case "/metrics":
                return f'# HELP x\nvllm:generation_tokens_total{{engine="0"}} {server.tokens}\n'
            case "/tokenize":
                ids = server.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
                return {"tokens": ids, "count": len(ids), "max_model_len": 200}
            case "/detokenize":
                return {"prompt": server.tokenizer.decode(body["tokens"])}
            case "/v1/completions":
                return server.complete(body)
            case "/pause" | "/resume":
                server.paused = path == "/pause"
            case "/update_weight_version":
                server.weight_version = body["new_version"]
            case "/weight_info":
                return {"weight_version": server.weight_version}
            case "/collective_rpc":
                server.load_weights(body["kwargs"]["weights_path"])
                return {"results": [None]}
            case "/server_info":
                transfer = None if server.backend is None else {"backend": server.backend}
                parallel = {"world_size": 1, "data_parallel_size": 1}
                return {"vllm_config": {"weight_transfer_config": transfer, "parallel_config": parallel}}
            case "/reset_prefix_cache":
                return {"success": True}
            case _ if path.endswith(("_weight_update", "_weight_transfer_engine", "/update_weights")):
                server.transfer(path, body)
            case "/v1/load_lora_adapter":
                server.load_adapter(body["lora_name"], body["lora_path"])
                return f"Success: LoRA adapter '{body['lora_name']}' added successfully."  # as vLLM: it is no JSON
            case "/v1/unload_lora_adapter":
                del server.adapters[body["lora_name"]]
                return f"Success: LoRA adapter '{body['lora_name']}' removed successfully."
            case _:
                pass
        return {}

    def _send(self, status: int, answer: Any, *, is_sampling: bool = False) -> None:
        data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_head(status, len(data))
        if is_sampling and "break" in self.server.faults:
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        if is_sampling and "dribble" in self.server.faults:
            for byte in data:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.05)
            return
        self.wfile.write(data)
